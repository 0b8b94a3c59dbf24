"""One encode for one new image, however many requests and replicas there are, on Ray Serve."""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from deploy import service
from deploy.client import Answer, Client
from tests.conftest import picture

pytestmark = [
    pytest.mark.serve,
    # Ray's own sockets and files are closed when its processes end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NUM_REQUESTS = 64
NUM_REPLICAS = 2


class Cluster:
    """Two LLM replicas, two encoder replicas, and what each of them counts."""

    def __init__(self, running: service.RunningService) -> None:
        self._dashboard = service.connect(running.dashboard)
        self._encoder = serve.get_deployment_handle("encoder", service.APPLICATION)
        self._llm = serve.get_deployment_handle("llm", service.APPLICATION)
        self.client = Client(running.url)
        self.client.model()

    def ask_all(self, pool: ThreadPoolExecutor, image: bytes) -> list[Future[Answer]]:
        return [pool.submit(self.client.ask, [image], "What?", max_tokens=2) for _ in range(NUM_REQUESTS)]

    def pids(self, deployment: str) -> dict[str, int]:
        replicas = service.details_of(self._dashboard)["deployments"][deployment]["replicas"]
        return {replica["replica_id"]: replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}

    def encoder_stats(self) -> dict[str, dict[str, Any]]:
        """Of each encoder replica, by its id, once all run. The hash of a session decides which is asked."""
        found: dict[str, dict[str, Any]] = {}
        sessions = itertools.count()
        deadline = time.monotonic() + 60
        while len(found) < NUM_REPLICAS:
            assert time.monotonic() < deadline, f"only {found.keys()} answer"
            stats = self._encoder.options(session_id=str(next(sessions))).stats.remote().result(timeout_s=30)
            found[stats["producer"]] = stats
        return found

    def num_encoded(self) -> int:
        return sum(stats["encoded"] for stats in self.encoder_stats().values())

    def llm_reports(self) -> dict[str, dict[str, Any]]:
        """Of each LLM replica, by its id."""
        found: dict[str, dict[str, Any]] = {}
        while len(found) < NUM_REPLICAS:
            report = self._llm.cache_report.remote().result(timeout_s=30)
            found[report["replica"]] = report
        return found


@pytest.fixture(scope="module")
def cluster(tiny_checkpoint: Path) -> Iterator[Cluster]:
    config = service.application_config(
        model=str(tiny_checkpoint), encoder_replicas=NUM_REPLICAS, llm_replicas=NUM_REPLICAS, port=service.free_port()
    )
    with service.running_service(config, print) as running:
        found = Cluster(running)
        yield found
        found.client.close()


def test_new_image_asked_for_by_everyone_at_once_is_encoded_once(cluster: Cluster) -> None:
    encodes = []
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        for round_number in range(20):
            before = cluster.num_encoded()
            answers = [future.result() for future in cluster.ask_all(pool, picture(150, 150, round_number))]
            encodes.append(cluster.num_encoded() - before)
            assert len({answer.text for answer in answers}) == 1
    print(f"{NUM_REQUESTS} requests at once, 20 rounds: {encodes} encodes")
    assert encodes == [1] * 20
    shares = [report["counters"] for report in cluster.llm_reports().values()]
    assert all(any(name.startswith("fovea_images_total") for name in share) for share in shares), (
        "both replicas took part"
    )


def test_encoder_killed_while_it_encodes_costs_no_answer_and_one_more_encode(cluster: Cluster) -> None:
    image = picture(8000, 8000, seed=99, format="JPEG")  # as large as is allowed: a second of decoding
    before = cluster.encoder_stats()
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        futures = cluster.ask_all(pool, image)
        victim = wait_for_encoding(cluster)
        os.kill(cluster.pids("encoder")[victim], signal.SIGKILL)
        killed_at = time.monotonic()
        answers = [future.result() for future in futures]
    print(f"all answered {time.monotonic() - killed_at:.1f} s after the kill")
    assert len({answer.text for answer in answers}) == 1
    after = cluster.encoder_stats()
    assert victim not in after
    # The victim was in its first encode; what it had counted before is gone with it.
    num_encoded = 1 + sum(
        stats["encoded"] - before.get(name, {"encoded": 0})["encoded"] for name, stats in after.items()
    )
    print(f"{num_encoded} encodes, the one that was killed among them")
    assert num_encoded <= 2


def wait_for_encoding(cluster: Cluster) -> str:
    """The id of the replica that is encoding."""
    for _ in range(2000):
        for name, stats in cluster.encoder_stats().items():
            if stats["in_flight"]:
                return name
    raise AssertionError("no replica ever encoded")
