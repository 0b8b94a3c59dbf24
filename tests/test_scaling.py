"""Encoder replicas on Ray Serve that come, go and die while requests are answered."""

import contextlib
import copy
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from deploy import service
from deploy.bench import scaling
from deploy.client import Client
from tests.conftest import picture
from tests.services import URL, body, image_part

pytestmark = [
    pytest.mark.serve,
    # Ray's own sockets and files are closed when its processes end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> dict[str, Any]:
    config = service.application_config(model=str(tiny_checkpoint), encoder_replicas=1, port=service.free_port())
    service.application_of(config)["args"]["api"] = {"encoder_wait_s": 1}
    return config


@pytest.fixture(scope="module")
def running(config: dict[str, Any]) -> Iterator[service.RunningService]:
    with service.running_service(config, print) as found:
        yield found


@pytest.fixture(scope="module")
def asked(running: service.RunningService) -> list[scaling.Asked]:
    return scaling.known_answers(running.url)


def num_running(running: service.RunningService) -> int:
    found = service.statuses(service.details_of(service.connect(running.dashboard)))
    return sum(deployment.num_running for deployment in found if deployment.name == "encoder")


def wait_until(condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.2)


def test_no_request_is_lost_while_replicas_go_from_one_to_four_and_back(
    running: service.RunningService, asked: list[scaling.Asked]
) -> None:
    rows, ledger = scaling.drill(running, asked, (1, 4, 1), callers=4, hold_s=2, progress=print)
    print(*rows, sep="\n")
    assert all(row["requests"] for row in rows)
    assert [entry for entry in ledger.entries if entry.outcome != "right"] == []


def test_without_an_encoder_cached_pictures_are_answered_and_new_ones_are_told_when_to_come_back(
    running: service.RunningService,
) -> None:
    known = picture(100, 100, seed=1)
    with Client(running.url) as client:
        model = client.model()
        client.ask([known], "What?", max_tokens=4)
        replicas = service.details_of(service.connect(running.dashboard))["deployments"]["encoder"]["replicas"]
        for replica in replicas:
            with contextlib.suppress(ProcessLookupError):  # it was to go
                os.kill(replica["pid"], signal.SIGKILL)
        new = body(image_part(picture(100, 100, seed=2)), "What?", model=model)
        refused = httpx2.post(running.url + URL, json=new, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "encoder_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.ask([known], "Where?", max_tokens=4).images[0]["source"] == "local"
        assert client.ask([], "Hello?", max_tokens=4).num_tokens
        wait_until(lambda: httpx2.post(running.url + URL, json=new, timeout=60).status_code == 200)


def test_replicas_follow_the_predicted_seconds_of_what_waits(
    running: service.RunningService, config: dict[str, Any], asked: list[scaling.Asked]
) -> None:
    autoscaled = copy.deepcopy(config)
    encoder = service.application_of(autoscaled)["deployments"][0]
    del encoder["num_replicas"]
    policy = {
        "policy_function": "deploy.autoscaling:BacklogPolicy",
        "policy_kwargs": {"target_seconds": 1e-4},  # a hundredth of what one of these pictures takes
    }
    delays = {"metrics_interval_s": 0.5, "look_back_period_s": 3, "upscale_delay_s": 0, "downscale_delay_s": 1}
    encoder["autoscaling_config"] = {"min_replicas": 1, "max_replicas": 2, "policy": policy, **delays}
    service.connect(running.dashboard).deploy_applications(autoscaled)
    with scaling.Ledger(running.url, asked, callers=4) as ledger:
        wait_until(lambda: num_running(running) == 2)
    wait_until(lambda: num_running(running) == 1)
    assert [entry for entry in ledger.entries if entry.outcome != "right"] == []
