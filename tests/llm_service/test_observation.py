"""What dashboards are told of requests, on a tiny model."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common import metrics
from llm_service.admission import RequestContext
from tests.conftest import picture
from tests.services import Services


@pytest.fixture
async def services(tiny_checkpoint: Path) -> AsyncIterator[Services]:
    found = Services(tiny_checkpoint)
    yield found
    found.llm.engine.shutdown()


async def test_one_request_is_counted_once_with_all_its_tokens(services: Services) -> None:
    before = metrics.snapshot()
    image = picture(60, 60, 901)
    tokens = await services.tokens("What is it?", [image], max_tokens=6)
    await services.tokens("What is it?", [image], max_tokens=6)

    def rise(name: str) -> float:
        return metrics.snapshot().get(f"fovea_{name}", 0.0) - before.get(f"fovea_{name}", 0.0)

    assert rise("generation_tokens_total") == rise("request_generation_tokens_sum") == 2 * len(tokens)
    assert rise("time_to_first_token_seconds_count") == rise("e2e_request_latency_seconds_count") == 2
    assert rise("request_prompt_tokens_sum") == rise("prompt_tokens_total") == rise("prefix_cache_queries_total")
    assert 0 <= rise("prefix_cache_hits_total") < rise("prefix_cache_queries_total")
    assert (rise("mm_cache_queries_total"), rise("mm_cache_hits_total")) == (2, 1)
    assert rise('embedding_wait_seconds_count{source="local"}') == 1
    finished = [name for name in metrics.snapshot() if name.startswith("fovea_request_success_total")]
    assert sum(metrics.snapshot()[name] - before.get(name, 0) for name in finished) == 2


async def test_time_of_a_request_is_that_of_its_parts(services: Services) -> None:
    before = metrics.snapshot()
    context = RequestContext(arrived_at=time.perf_counter() - 10)
    prepared = await services.prepare("Tell me.", [], max_tokens=6, context=context)
    async for _ in services.llm.generate(prepared):
        pass
    rise = {name: value - before.get(name, 0.0) for name, value in metrics.snapshot().items()}
    queue, prefill, decode, inference = (
        rise[f"fovea_request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode", "inference")
    )
    assert inference == pytest.approx(prefill + decode)
    assert rise["fovea_time_to_first_token_seconds_sum"] > 10 + queue + prefill
    assert rise["fovea_e2e_request_latency_seconds_sum"] > rise["fovea_time_to_first_token_seconds_sum"] + decode / 2
    assert all(rise[f"fovea_{name}_count"] == 1 for name in ("request_queue_time_seconds", "request_params_n"))
    assert rise["fovea_request_params_max_tokens_sum"] == 6
    assert rise["fovea_iteration_tokens_total_sum"] == prepared.num_prompt_tokens + 5  # the last one is not computed


async def test_gauges_of_an_idle_engine_are_zero(services: Services) -> None:
    running = asyncio.create_task(services.tokens("Tell me a story.", [], max_tokens=40))
    async with asyncio.timeout(10):
        busy = ["fovea_num_requests_running", "fovea_kv_cache_usage_perc"]
        while not all(metrics.snapshot().get(name) for name in busy):  # noqa: ASYNC110  # gauges, without an event
            await asyncio.sleep(0.001)
    await running
    async with asyncio.timeout(10):  # the engine sets one after another
        while any(metrics.snapshot()[name] for name in [*busy, "fovea_num_requests_waiting"]):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
