"""Who gets how many tokens, without a model: the tests book made-up tokens."""

from typing import Any
from zlib import crc32

import pytest
import torch

from llm_service.config import EngineConfig
from llm_service.engine.kv_cache import KVCacheManager
from llm_service.engine.request import FinishReason, Request, RequestStatus, SamplingParams
from llm_service.engine.scheduler import Scheduler

CHUNK = 16


def scheduler_of(*, exact: bool = True, num_kv_blocks: int = 64, **config: Any) -> Scheduler:
    engine_config = EngineConfig(
        **{"block_size": 4, "num_kv_blocks": num_kv_blocks, "prefill_chunk_size": CHUNK, **config}
    )
    blocks = KVCacheManager(num_kv_blocks, 4, prefix_multiple=CHUNK if exact else 4, position_rule="qwen")
    return Scheduler(engine_config, blocks, max_num_tokens=num_kv_blocks * 4, eos_token_ids=frozenset(), exact=exact)


def request_of(request_id: str, num_prompt_tokens: int, max_tokens: int = 100) -> Request:
    """A request whose tokens are its own, so that it shares no prefix."""
    token_ids = [crc32(f"{request_id}{index}".encode()) for index in range(num_prompt_tokens)]
    positions = torch.arange(num_prompt_tokens).expand(3, -1)
    return Request(request_id, token_ids, positions, num_prompt_tokens, SamplingParams(max_tokens=max_tokens))


def add(scheduler: Scheduler, request_id: str, num_prompt_tokens: int, max_tokens: int = 100) -> Request:
    request = request_of(request_id, num_prompt_tokens, max_tokens)
    scheduler.add(request)
    return request


def step(scheduler: Scheduler) -> dict[str, int]:
    """One step with token 1 for everybody; returns the number of scheduled tokens by request."""
    output = scheduler.schedule()
    scheduler.update(output, [1] * len(output.yielding_requests))
    return {item.request.request_id: item.num_scheduled_tokens for item in output.scheduled}


def test_decode_and_prefill_share_a_step() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", 5)
    assert step(scheduler) == {"a": 5}
    add(scheduler, "b", 20)
    assert step(scheduler) == {"a": 1, "b": 16}
    assert step(scheduler) == {"a": 1, "b": 4}
    assert step(scheduler) == {"a": 1, "b": 1}


def test_fast_prefill_fills_the_budget() -> None:
    scheduler = scheduler_of(exact=False, max_num_batched_tokens=20)
    add(scheduler, "a", 5)
    add(scheduler, "b", 50)
    assert step(scheduler) == {"a": 5, "b": 15}
    assert step(scheduler) == {"a": 1, "b": 19}
    assert step(scheduler) == {"a": 1, "b": 16}
    assert step(scheduler) == {"a": 1, "b": 1}


def test_an_exact_chunk_runs_whole_or_waits() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=24)
    add(scheduler, "a", 40)
    add(scheduler, "b", 9)
    assert step(scheduler) == {"a": 16}  # 8 are left, b wants 9
    assert step(scheduler) == {"a": 16}
    assert step(scheduler) == {"a": 8, "b": 9}


def test_nobody_overtakes() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=24)
    for request_id, num_prompt_tokens in (("a", 20), ("b", 16), ("c", 2)):
        add(scheduler, request_id, num_prompt_tokens)
    assert step(scheduler) == {"a": 16}  # c would fit, but b is before it
    assert step(scheduler) == {"a": 4, "b": 16, "c": 2}


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = scheduler_of(max_num_seqs=2)
    for request_id in "abc":
        add(scheduler, request_id, 4, max_tokens=2)
    assert step(scheduler) == {"a": 4, "b": 4}
    assert len(scheduler.waiting) == 1
    assert step(scheduler) == {"a": 1, "b": 1}
    assert step(scheduler) == {"c": 4}


def test_a_request_waits_until_all_its_blocks_are_there() -> None:
    scheduler = scheduler_of(num_kv_blocks=10)
    add(scheduler, "a", 20, max_tokens=2)
    b = add(scheduler, "b", 24)  # six blocks, five are left
    assert step(scheduler) == {"a": 16}
    assert step(scheduler) == {"a": 4}
    assert b.block_table == []
    assert step(scheduler) == {"a": 1}
    assert step(scheduler) == {"b": 16}


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    scheduler = scheduler_of(num_kv_blocks=6)
    a, b = add(scheduler, "a", 8, max_tokens=8), add(scheduler, "b", 8)
    c = add(scheduler, "c", 8)
    step(scheduler)
    step(scheduler)  # a takes a third block; b and c hold two each, c must go
    assert (a.status, b.status, c.status) == (RequestStatus.RUNNING, RequestStatus.RUNNING, RequestStatus.PREEMPTED)
    assert list(scheduler.waiting) == [c]
    assert (c.num_computed_tokens, c.block_table) == (0, [])
    add(scheduler, "d", 1)
    while a.status is RequestStatus.RUNNING:
        assert set(step(scheduler)) <= {"a", "b"}
    assert [request.request_id for request in scheduler.waiting] == ["b", "c", "d"]  # by arrival, as ever
    assert scheduler.num_preemptions == 2


@pytest.mark.parametrize("exact", [True, False])
def test_a_preempted_request_is_computed_anew(exact: bool) -> None:
    scheduler = scheduler_of(exact=exact, num_kv_blocks=10, enable_prefix_caching=False)
    add(scheduler, "a", 20, max_tokens=6)
    b = add(scheduler, "b", 12)
    steps = []
    while b.status is not RequestStatus.PREEMPTED:
        steps.append(step(scheduler))
    num_generated = len(b.output_token_ids)
    assert num_generated > 1
    while b.status is RequestStatus.PREEMPTED:
        steps.append(step(scheduler))
    again = steps[-1]["b"], *(step(scheduler)["b"] for _ in range(num_generated))
    # Exact: the prompt as prefill, then what it had said token by token. Fast: all at once, then it goes on.
    assert again == ((12, *[1] * num_generated) if exact else (12 + num_generated, *[1] * num_generated))
    assert len(b.output_token_ids) == num_generated + (1 if exact else num_generated + 1)


def test_replayed_tokens_yield_nothing_new() -> None:
    scheduler = scheduler_of()
    request = add(scheduler, "a", 20)
    request.output_token_ids = [7, 8, 9]
    counts = []
    for _ in range(5):
        output = scheduler.schedule()
        counts.append((output.scheduled[0].num_scheduled_tokens, len(output.yielding_requests)))
        scheduler.update(output, [1] * len(output.yielding_requests))
    assert counts == [(16, 0), (4, 0), (1, 0), (1, 0), (1, 1)]


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    scheduler = scheduler_of()
    first = add(scheduler, "a", 40)
    for _ in range(3):
        step(scheduler)
    second = add(scheduler, "a", 40)
    assert step(scheduler) == {"a": 8}
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert second.block_table[:8] == first.block_table[:8]


def test_prefix_caching_can_be_switched_off() -> None:
    scheduler = scheduler_of(enable_prefix_caching=False)
    for _ in range(2):
        request = add(scheduler, "a", 40, max_tokens=1)
        while request.status is not RequestStatus.FINISHED:
            step(scheduler)
        assert request.num_cached_tokens == 0
    scheduler.kv_cache_manager.check_integrity()


@pytest.mark.parametrize("num_steps", range(4))
def test_a_request_can_be_aborted_in_every_state(num_steps: int) -> None:
    scheduler = scheduler_of(num_kv_blocks=10)
    requests = [add(scheduler, request_id, 12) for request_id in "abcd"]
    for _ in range(num_steps):
        step(scheduler)
    for request in requests:
        scheduler.abort(request)
        assert (request.status, request.finish_reason) == (RequestStatus.FINISHED, FinishReason.ABORT)
    assert not scheduler.waiting
    assert not scheduler.running
    scheduler.kv_cache_manager.check_integrity()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_size": 16, "prefill_chunk_size": 24}, "prefill_chunk_size 24 is not a multiple of block_size 16"),
        ({"max_num_batched_tokens": 32}, "prefill_chunk_size 64 is above max_num_batched_tokens 32"),
    ],
)
def test_chunks_that_could_never_run_are_refused(config: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**config)
