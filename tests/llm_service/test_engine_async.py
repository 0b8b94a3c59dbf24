"""The engine behind its thread: every caller gets an answer or an error, and leaving costs nobody anything."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from common.errors import InvalidRequestError, ServingError, UnavailableError
from llm_service.engine.async_engine import AsyncLLMEngine
from llm_service.engine.request import FinishReason, Request, RequestOutput


@pytest.fixture
async def engine(model: Any) -> AsyncIterator[AsyncLLMEngine]:
    engine = AsyncLLMEngine(model.engine())
    engine.start()
    yield engine
    engine.shutdown()
    assert not [thread for thread in threading.enumerate() if thread.name == "llm-engine"]


async def collect(engine: AsyncLLMEngine, request: Request) -> list[RequestOutput]:
    async with asyncio.timeout(20):  # an answer or an error: nobody waits for ever
        return [output async for output in engine.generate(request)]


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the condition changes on another thread
            await asyncio.sleep(0.002)


def is_idle(engine: AsyncLLMEngine) -> bool:
    return engine.num_running == engine.num_waiting == 0


async def test_requests_at_once_get_their_own_answers(engine: AsyncLLMEngine, model: Any) -> None:
    requests = [prompt.request(str(index)) for index, prompt in enumerate(model.prompts)]
    answers = await asyncio.gather(*(collect(engine, request) for request in requests))
    for prompt, outputs in zip(model.prompts, answers, strict=True):
        assert prompt.check_tokens(tokens_of(outputs))
        assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + [FinishReason.LENGTH]
    assert is_idle(engine)


async def test_a_slow_reader_gets_outputs_merged_and_slows_nobody(engine: AsyncLLMEngine, model: Any) -> None:
    slow, fast = model.prompts[1], model.prompts[2]
    async with aclosing(engine.generate(slow.request("slow"))) as stream:
        outputs = [await anext(stream)]
        assert fast.check_tokens(tokens_of(await collect(engine, fast.request("fast"))))
        await until(lambda: is_idle(engine))
        await asyncio.sleep(0)
        outputs += [output async for output in stream]
    assert len(outputs) == 2
    assert outputs[1].finish_reason is FinishReason.LENGTH
    assert slow.check_tokens(tokens_of(outputs))


async def test_leaving_the_iterator_aborts_the_request(engine: AsyncLLMEngine, model: Any) -> None:
    async with aclosing(engine.generate(model.prompts[1].request(max_tokens=None))) as stream:
        await anext(stream)
        assert engine.num_running == 1
    await until(lambda: is_idle(engine))


async def test_a_cancelled_reader_aborts_the_request(engine: AsyncLLMEngine, model: Any) -> None:
    task = asyncio.create_task(collect(engine, model.prompts[1].request(max_tokens=None)))
    await until(lambda: engine.num_running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: is_idle(engine))


async def test_many_readers_that_leave_at_any_point_leave_nothing(engine: AsyncLLMEngine, model: Any) -> None:
    async def read(index: int) -> None:
        prompt = model.prompts[index % len(model.prompts)]
        async with aclosing(engine.generate(prompt.request(str(index)))) as stream:
            seen: list[int] = []
            async for output in stream:
                seen += output.token_ids
                if len(seen) > index % 24:
                    break
        assert prompt.check_tokens(seen)

    await asyncio.gather(*(read(index) for index in range(60)))
    await until(lambda: is_idle(engine))  # the engine has checked its blocks by then, or it would be dead
    engine.check_health()
    engine._engine.kv_cache_manager.check_integrity()


async def test_a_refused_request_raises_before_the_first_output(engine: AsyncLLMEngine, model: Any) -> None:
    with pytest.raises(InvalidRequestError, match="exceeds 512"):
        await anext(engine.generate(model.prompt(*[1] * 600).request()))
    engine.check_health()


async def test_a_request_refused_for_its_id_does_not_abort_the_other(engine: AsyncLLMEngine, model: Any) -> None:
    prompt = model.prompts[1]
    async with asyncio.timeout(20), aclosing(engine.generate(prompt.request("same"))) as stream:
        outputs = [await anext(stream)]
        with pytest.raises(ValueError, match="already being served"):
            await collect(engine, prompt.request("same"))
        outputs += [output async for output in stream]
    assert prompt.check_tokens(tokens_of(outputs))
    assert outputs[-1].finish_reason is FinishReason.LENGTH


async def test_logits_that_are_not_finite_are_an_error_of_one_request(engine: AsyncLLMEngine, model: Any) -> None:
    picture = model.picture(1)
    picture.embedding.features.fill_(float("nan"))
    bad = collect(engine, model.prompt(1, picture, 2).request("bad"))
    good = collect(engine, model.prompts[1].request("good"))
    failure, outputs = await asyncio.gather(bad, good, return_exceptions=True)
    assert isinstance(failure, ServingError)
    assert failure.code == "non_finite_logits"
    assert model.prompts[1].check_tokens(tokens_of(outputs))


async def test_an_exception_in_the_engine_reaches_every_caller(
    engine: AsyncLLMEngine, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = threading.Event()
    step = engine._engine.step

    def step_until_broken() -> list[RequestOutput]:
        if broken.is_set():
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(engine._engine, "step", step_until_broken)
    requests = [prompt.request(str(index), max_tokens=None) for index, prompt in enumerate(model.prompts)]
    tasks = [asyncio.create_task(collect(engine, request)) for request in requests]
    await until(lambda: engine.num_running == len(requests))
    with caplog.at_level(logging.ERROR):
        broken.set()
        errors = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert all(isinstance(error, UnavailableError) for error in errors)
    assert all(str(error.__cause__) == "out of memory" for error in errors)
    assert "Traceback" in caplog.text
    assert "out of memory" in caplog.text
    with pytest.raises(UnavailableError, match="the engine has failed") as caught:
        engine.check_health()
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(UnavailableError, match="the engine has failed"):
        await collect(engine, model.prompts[0].request("late"))


async def test_requests_that_race_with_the_engine_s_end_are_all_answered(model: Any) -> None:
    for _ in range(20):
        engine = AsyncLLMEngine(model.engine())
        engine.start()
        tasks = [asyncio.create_task(collect(engine, model.prompts[0].request(str(index)))) for index in range(8)]
        await asyncio.sleep(0)
        ending = asyncio.to_thread(engine.shutdown)
        results = await asyncio.wait_for(asyncio.gather(*tasks, ending, return_exceptions=True), 10)
        assert all(isinstance(result, list | UnavailableError | None) for result in results)


async def test_shutdown_ends_requests_in_flight(model: Any) -> None:
    engine = AsyncLLMEngine(model.engine())
    with pytest.raises(UnavailableError, match="not started"):
        engine.check_health()
    engine.start()
    task = asyncio.create_task(collect(engine, model.prompts[1].request(max_tokens=None)))
    await until(lambda: engine.num_running == 1)
    await asyncio.to_thread(engine.shutdown)
    with pytest.raises(UnavailableError, match="shut down"):
        await task
    with pytest.raises(UnavailableError, match="shut down"):
        engine.check_health()
    engine.shutdown()  # once more is no error


async def test_the_engine_sleeps_when_there_is_nothing_to_do(
    engine: AsyncLLMEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await collect(engine, model.prompts[0].request())
    num_steps = engine._engine.num_steps
    await asyncio.sleep(0.05)
    assert engine._engine.num_steps == num_steps
    assert model.prompts[0].check_tokens(tokens_of(await collect(engine, model.prompts[0].request())))
