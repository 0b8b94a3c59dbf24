"""How long a call of the encoder waits while none of its replicas runs."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from common.errors import UnavailableError
from llm_service.deployment import EncoderHandle, Outage


class Controller:
    """What Serve says of the replicas of `encoder`; None: the application is not listed."""

    def __init__(self, **states: int) -> None:
        self.states: dict[str, int] | None = states
        self.is_down = False
        self.answers = threading.Event()
        self.answers.set()
        self.num_asked = 0

    def status(self) -> Any:
        self.num_asked += 1
        self.answers.wait(timeout=30)
        if self.is_down:
            raise ConnectionError("restarting")
        deployment = SimpleNamespace(replica_states=self.states)
        application = SimpleNamespace(deployments={"encoder": deployment})
        return SimpleNamespace(applications={} if self.states is None else {"fovea": application})


class WaitingHandle:
    """Routes nothing until there is a replica, as Serve's."""

    app_name, deployment_name = "fovea", "encoder"

    def __init__(self) -> None:
        self.routed = asyncio.Event()
        self.num_cancelled = 0
        self.describe = SimpleNamespace(remote=self._remote)

    async def _remote(self, image: str | None) -> str:
        try:
            await self.routed.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return "namespace"


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    found = Controller()
    monkeypatch.setattr(serve, "status", found.status)
    monkeypatch.setattr(Outage, "POLL_S", 0.02)
    return found


async def test_call_is_given_up_after_the_wait_and_the_next_one_at_once(controller: Controller) -> None:
    controller.states = {"STARTING": 1}
    handle = WaitingHandle()
    encoder = EncoderHandle(handle, wait_s=1)  # type: ignore[arg-type]
    loop = asyncio.get_running_loop()
    started = loop.time()
    for least_s, most_s in ((1, 30), (0, 1)):
        began = loop.time()
        with pytest.raises(UnavailableError, match="no encoder replica runs") as caught:
            await encoder.describe()
        assert least_s <= loop.time() - began < most_s
    await asyncio.sleep(0)
    assert (caught.value.code, caught.value.retry_after_s, handle.num_cancelled) == ("encoder_unavailable", 5.0, 2)
    assert controller.num_asked <= (loop.time() - started) / Outage.POLL_S


@pytest.mark.parametrize("states", [{"RUNNING": 1, "STARTING": 3}, {"UPDATING": 1}, None])
async def test_busy_replica_is_waited_for(controller: Controller, states: dict[str, int] | None) -> None:
    controller.states = states
    handle = WaitingHandle()
    call = asyncio.create_task(EncoderHandle(handle, wait_s=0).describe())  # type: ignore[arg-type]
    await asyncio.sleep(0.2)
    assert not call.done() and controller.num_asked > 1
    handle.routed.set()
    assert await call == "namespace"


async def test_replica_that_comes_in_time_answers_and_the_outage_is_forgotten(controller: Controller) -> None:
    controller.states = {}
    handle = WaitingHandle()
    encoder = EncoderHandle(handle, wait_s=1)  # type: ignore[arg-type]
    call = asyncio.create_task(encoder.describe())
    await asyncio.sleep(0.1)
    controller.states = {"RUNNING": 1}
    await asyncio.sleep(1.2)
    assert not call.done()
    handle.routed.set()
    assert await call == "namespace"


async def test_controller_that_does_not_answer_says_nothing_about_replicas(controller: Controller) -> None:
    controller.is_down = True
    handle = WaitingHandle()
    call = asyncio.create_task(EncoderHandle(handle, wait_s=0).describe())  # type: ignore[arg-type]
    await asyncio.sleep(0.15)
    assert not call.done()
    handle.routed.set()
    assert await call == "namespace"


async def test_fast_answer_asks_nobody(controller: Controller) -> None:
    handle = WaitingHandle()
    handle.routed.set()
    assert await EncoderHandle(handle, wait_s=0).describe() == "namespace"  # type: ignore[arg-type]
    assert controller.num_asked == 0


async def test_answer_does_not_wait_for_a_controller_that_takes_its_time(controller: Controller) -> None:
    controller.answers.clear()
    handle = WaitingHandle()
    call = asyncio.create_task(EncoderHandle(handle, wait_s=0).describe())  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        while not controller.num_asked:  # noqa: ASYNC110  # counted by a thread
            await asyncio.sleep(0.01)
        handle.routed.set()
        assert await call == "namespace"
    assert controller.num_asked == 1
    controller.answers.set()


async def test_answer_ends_an_outage_and_the_next_one_is_waited_for_anew(controller: Controller) -> None:
    controller.states = {}
    handle = WaitingHandle()
    encoder = EncoderHandle(handle, wait_s=1)  # type: ignore[arg-type]
    loop = asyncio.get_running_loop()
    for _ in range(2):
        began = loop.time()
        with pytest.raises(UnavailableError):
            await encoder.describe()
        assert loop.time() - began >= 1
        handle.routed.set()
        await encoder.describe()
        handle.routed.clear()


async def test_outage_of_long_ago_refuses_nobody_while_the_controller_restarts(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outage, "FRESH_S", 0.1)
    controller.states = {}
    handle = WaitingHandle()
    encoder = EncoderHandle(handle, wait_s=0)  # type: ignore[arg-type]
    with pytest.raises(UnavailableError):
        await encoder.describe()
    controller.is_down = True
    await asyncio.sleep(0.3)
    call = asyncio.create_task(encoder.describe())
    await asyncio.sleep(0.2)
    assert not call.done()
    handle.routed.set()
    assert await call == "namespace"
