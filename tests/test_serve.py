"""The whole application on Ray Serve: answers, streams, a client that leaves, a lost encoder replica, scaling."""

import asyncio
import base64
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from deploy import service
from deploy.client import Client
from tests.clips import LOSSLESS, frames, video
from tests.conftest import picture

pytestmark = [
    pytest.mark.serve,
    # Ray's own sockets and files are closed when its processes end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def running(tiny_checkpoint: Path) -> Iterator[service.RunningService]:
    config = service.application_config(model=str(tiny_checkpoint), encoder_replicas=2, port=service.free_port())
    with service.running_service(config, print) as found:
        yield found


@pytest.fixture(scope="module")
def url(running: service.RunningService) -> str:
    return running.url


@pytest.fixture(scope="module")
def dashboard(running: service.RunningService) -> Any:
    return service.connect(running.dashboard)


@pytest.fixture
def client(url: str) -> Client:
    return Client(url)


def encoder_pids(dashboard: Any) -> list[int]:
    replicas = service.details_of(dashboard)["deployments"]["encoder"]["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]


def test_second_question_about_a_picture_is_served_from_the_cache(client: Client) -> None:
    image = picture(100, 100, 1)
    first, second = (client.ask([image], question, max_tokens=8) for question in ("What?", "Where?"))
    assert [first.images[0]["source"], second.images[0]["source"]] == ["encoder", "local"]


def test_two_new_pictures_of_one_request_are_both_encoded(client: Client) -> None:
    answer = client.ask([picture(90, 90, seed) for seed in (2, 3, 4, 5)], "Which?", max_tokens=4)
    assert [image["source"] for image in answer.images] == ["encoder"] * 4


def test_clip_that_grows_by_two_frames_encodes_one_grid(client: Client, tmp_path: Path) -> None:
    shown = frames(62, first=5000)
    for number in (60, 62):
        (tmp_path / f"{number}.mp4").write_bytes(video(shown[:number], **LOSSLESS))
    receipts = [
        client.ask([], "What?", videos=[tmp_path / name], sampling={"fps": 30}, max_tokens=2).images[0]
        for name in ("60.mp4", "62.mp4")
    ]
    assert [(receipt["grids"], receipt["cached_grids"]) for receipt in receipts] == [(30, 0), (31, 30)]


def test_exported_metrics_agree_with_the_receipts_and_gauges_of_an_idle_service_are_0(url: str, client: Client) -> None:
    """Ray's agent exports them some seconds later."""
    client.ask([picture(70, 70, 77)], "Who?", max_tokens=2)
    counters: dict[str, float] = httpx2.get(f"{url}/v1/cache").json()["counters"]
    images = {name: value for name, value in counters.items() if name.startswith("fovea_images_total")}
    found = sum(value for name, value in images.items() if 'source="encoder"' not in name)
    assert 0 < found < sum(images.values())
    wait_until(lambda: exported(url, "mm_cache_queries_total") == sum(images.values()), timeout_s=60)
    assert exported(url, "mm_cache_hits_total") == found
    assert exported(url, "images_total", 'source="encoder"') == sum(images.values()) - found
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        wait_until(lambda gauge=gauge: exported(url, gauge) == 0, timeout_s=60)
    times = [exported(url, f"{name}_count") for name in ("request_queue_time_seconds", "time_to_first_token_seconds")]
    assert times[0] and times[0] == times[1]


def exported(url: str, name: str, label: str = "") -> float | None:
    """The sum over all replicas; None before there is any."""
    lines = httpx2.get(f"{url}/metrics", timeout=10).text.splitlines()
    values = [float(line.split()[-1]) for line in lines if line.startswith(f"ray_fovea_{name}{{") and label in line]
    return sum(values) if values else None


def test_client_that_leaves_frees_the_engine_for_others(url: str, client: Client) -> None:
    body = {
        "model": client.model(),
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": 2000,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert httpx2.get(f"{url}/health").json()["running"] == 1
    wait_until(lambda: httpx2.get(f"{url}/health").json()["running"] == 0, timeout_s=5)
    assert client.ask([], "Hello?", max_tokens=4).num_tokens > 0


def test_another_replica_finds_the_embedding_in_redis(url: str, dashboard: Any, client: Client) -> None:
    """A second LLM replica has an empty local tier, so what it hits is in the shared one."""
    image = picture(110, 90, 6)
    client.ask([image], "What?", max_tokens=2)
    service.scale(dashboard, "llm", 2)
    service.wait_until_scaled(dashboard, "llm", 2, print)
    deadline = time.monotonic() + 30
    sources = set()
    while "redis" not in sources and time.monotonic() < deadline:
        sources.add(client.ask([image], "What?", max_tokens=2).images[0]["source"])
    assert "redis" in sources and "encoder" not in sources


def test_killed_encoder_replica_loses_no_request(url: str, dashboard: Any, client: Client) -> None:
    stop = threading.Event()
    answered: list[str] = []

    def ask_about_new_pictures(worker: int) -> None:
        own = Client(url)
        for index in range(1000):
            if stop.is_set():
                return
            answer = own.ask([picture(80, 80, 10_000 * (worker + 1) + index)], "What?", max_tokens=2)
            answered.append(answer.images[0]["source"])

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(ask_about_new_pictures, worker) for worker in range(4)]
        try:
            wait_until(lambda: len(answered) > 8)
            victim = encoder_pids(dashboard)[0]
            os.kill(victim, signal.SIGKILL)
            num_before = len(answered)
            wait_until(lambda: len(answered) > num_before + 40)
        finally:
            stop.set()
        for worker in workers:
            worker.result()  # raises if any request failed
    assert set(answered) == {"encoder"}
    wait_until(lambda: len(encoder_pids(dashboard)) == 2 and victim not in encoder_pids(dashboard))


def test_the_only_encoder_replica_killed_in_the_middle_still_gives_the_answer(
    url: str, dashboard: Any, client: Client
) -> None:
    service.scale(dashboard, "encoder", 1)
    service.wait_until_scaled(dashboard, "encoder", 1, print)
    wait_until(lambda: len(encoder_pids(dashboard)) == 1)
    images = [picture(200, 200, 500 + index) for index in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(Client(url).ask, [image], "What?", max_tokens=2) for image in images]
        os.kill(encoder_pids(dashboard)[0], signal.SIGKILL)
        assert [answer.result().images[0]["source"] for answer in answers] == ["encoder"] * 6


def test_scaling_the_encoder_leaves_the_llm_replicas_and_requests_alone(
    url: str, dashboard: Any, client: Client
) -> None:
    def llm_pids() -> set[int]:
        return {replica["pid"] for replica in service.details_of(dashboard)["deployments"]["llm"]["replicas"]}

    before = llm_pids()
    stop = threading.Event()

    def keep_asking() -> int:
        own, count = Client(url), 0
        while not stop.is_set():
            own.ask([picture(60, 60, 9000 + count)], "What?", max_tokens=2)
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(keep_asking) for _ in range(2)]
        try:
            service.scale(dashboard, "encoder", 2)
            service.wait_until_scaled(dashboard, "encoder", 2, print)
            service.scale(dashboard, "encoder", 1)
            service.wait_until_scaled(dashboard, "encoder", 1, print)
        finally:
            stop.set()
        assert all(worker.result() > 0 for worker in workers)
    assert llm_pids() == before


def test_changed_setting_is_rolled_out_without_a_failed_request(url: str, dashboard: Any, client: Client) -> None:
    def llm_pids() -> set[int]:
        replicas = service.details_of(dashboard)["deployments"]["llm"]["replicas"]
        return {replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}

    before = llm_pids()
    stop = threading.Event()

    def keep_asking(worker: int) -> int:
        own, count = Client(url), 0
        while not stop.is_set():
            own.ask([picture(60, 60, 20_000 * worker + count % 5)], "What?", max_tokens=8)
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(keep_asking, worker) for worker in range(3)]
        try:
            service.update(dashboard, service.changed(dashboard, ["engine.max_num_seqs=7"]), print)
            wait_until(lambda: before.isdisjoint(llm_pids()))
        finally:
            stop.set()
        assert all(worker.result() > 0 for worker in workers)  # raises if any request failed
    deployed = service.application_of(service.changed(dashboard, []))
    assert deployed["args"]["engine"]["max_num_seqs"] == 7


def test_bad_image_over_serve_is_a_400_that_names_its_field(url: str, client: Client) -> None:
    truncated = base64.b64encode(picture(300, 300)[:4000]).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{truncated}"}}
    body = {"model": client.model(), "messages": [{"role": "user", "content": [part]}]}
    answer = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[0].image_url.url"
    assert "truncated" in answer.json()["error"]["message"]


def test_second_up_and_taken_port_are_one_clear_error(url: str) -> None:
    with pytest.raises(service.ServiceError, match="already serving"):
        service.check_port(url)


async def test_a_hundred_requests_at_once_are_all_answered(url: str) -> None:
    def ask(index: int) -> str:
        return Client(url).ask([picture(64, 64, 700 + index % 10)], "What?", max_tokens=4).text

    with ThreadPoolExecutor(32) as pool:
        loop = asyncio.get_running_loop()
        texts = await asyncio.gather(*(loop.run_in_executor(pool, ask, index) for index in range(100)))
    assert all(texts[index] == texts[index % 10] for index in range(100))


def wait_until(condition: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.05)
