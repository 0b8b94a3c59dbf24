"""Forks: several answers to one prompt share its computation, and each is the answer it would have been alone."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_service.engine.request import Request, RequestStatus
from tests.llm_service.test_engine import Workload, workloads
from tests.llm_service.test_scheduler import request_of, scheduler_of, step

NUM_SEEDS = 6
MAX_TOKENS = 12


def answer_of(model: Any, index: int, seed: int, request_id: str = "r", max_tokens: int = MAX_TOKENS) -> Request:
    """Even seeds are greedy, so that both ways of choosing are forked."""
    return model.prompts[index].request(request_id, temperature=seed % 2, seed=seed, max_tokens=max_tokens)


def fork_workloads(model: Any, count: int, seed: int) -> Iterator[tuple[Workload, list[list[Request]]]]:
    """Groups of one to six requests for one prompt, in the configurations of the other workloads."""
    rng = random.Random(seed)
    for workload in workloads(model, count, seed):
        groups = []
        for place, index in enumerate(workload.indices[:4]):
            seeds = rng.sample(range(NUM_SEEDS), rng.choice([1, 2, 3, 6]))
            length = rng.randint(1, MAX_TOKENS)
            groups.append([answer_of(model, index, one, f"{place}-{index}-{one}", length) for one in seeds])
        yield workload, groups


def serve_groups(engine: Any, groups: list[list[Request]], arrivals: list[int]) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {request.request_id: [] for group in groups for request in group}
    pending = sorted(zip(arrivals, range(len(groups)), strict=False))
    now = 0
    while pending or engine.has_unfinished_requests():
        while pending and pending[0][0] <= now:
            first, *forks = groups[pending.pop(0)[1]]
            engine.add_request(first, forks)
        if engine.has_unfinished_requests():
            for output in engine.step():
                answers[output.request_id] += output.token_ids
        now += 1
    return answers


def check_forks(model: Any, numerics: str, count: int, seed: int) -> None:
    alone: dict[tuple[int, int], tuple[list[int], torch.Tensor]] = {}
    for index in range(len(model.prompts)):
        for one in range(NUM_SEEDS):
            engine = model.engine(numerics, enable_prefix_caching=False)
            tokens = engine.serve([answer_of(model, index, one)])["r"]
            alone[index, one] = tokens, torch.stack(engine.logits["r"])
    num_preemptions = num_groups = num_forked = 0
    for workload, groups in fork_workloads(model, count, seed):
        engine = model.engine(numerics, **{**workload.config, "prefill_chunk_size": 16})
        answers = serve_groups(engine, groups, workload.arrivals)
        for request_id, tokens in answers.items():
            expected, logits = alone[tuple(map(int, request_id.split("-")[1:]))]
            assert tokens == expected[: len(tokens)], (workload, request_id)
            assert len(tokens) == len(engine.logits[request_id])
            if numerics == "exact":
                assert torch.equal(torch.stack(engine.logits[request_id]), logits[: len(tokens)])
        num_preemptions += engine.num_preemptions
        num_forked += engine.num_forked
        num_groups += len(groups)
    assert num_preemptions > count / 10
    assert num_forked > num_groups / 2


def test_an_exact_fork_has_the_tokens_and_logits_of_the_request_alone(wide_model: Any) -> None:
    check_forks(wide_model, "exact", 100, seed=20)


def test_a_fast_fork_has_the_tokens_of_the_request_alone(model: Any) -> None:
    check_forks(model, "fast", 100, seed=21)


@pytest.mark.soak
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_forks_are_the_requests_alone_in_a_thousand_workloads(model: Any, numerics: str) -> None:
    check_forks(model, numerics, 1000, seed=22)


def test_forks_compute_their_prompt_once(model: Any) -> None:
    engine = model.engine("exact", block_size=8, num_kv_blocks=64, enable_prefix_caching=False)
    requests = [model.prompt(*range(44)).request(str(index), temperature=1.0, seed=index) for index in range(4)]
    engine.add_request(requests[0], requests[1:])
    for _ in range(3):  # 44 tokens are three chunks
        assert len(engine.scheduler.running) <= 1
        engine.step()
    assert len(engine.scheduler.running) == 4
    tables = [request.block_table for request in requests]
    assert all(table == tables[0][:6] for table in tables)  # even the sixth, which holds four tokens
    engine.step()
    assert len({request.block_table[5] for request in requests}) == 4  # written by everybody, so everybody's own
    assert all(request.block_table[:5] == tables[0][:5] for request in requests)
    assert engine.kv_cache_manager.num_available_blocks == 64 - 5 - 4


def test_followers_reuse_what_they_have_in_common(model: Any) -> None:
    context = [*range(40), model.picture(1)]
    prompts = [model.prompt(*context, 100 + question, 7) for question in range(20)]
    for numerics in ("exact", "fast"):
        engine = model.engine(numerics, max_num_seqs=8)
        first, *others = [prompt.request(str(index), max_tokens=1) for index, prompt in enumerate(prompts)]
        answers = serve_groups(engine, [[first, *others]], [0])
        assert first.num_cached_tokens == 0
        assert {request.num_cached_tokens for request in others} == {48 if numerics == "exact" else 56}  # of 62
        for index, prompt in enumerate(prompts[:3]):
            assert model.refer(prompt).check_tokens(answers[str(index)])


def test_one_fork_of_two_that_are_not_alike_shares_nothing_of_the_other_image(model: Any) -> None:
    first, other = (model.prompt(1, model.picture(seed), *range(20)) for seed in (1, 2))
    engine = model.engine()
    answers = serve_groups(engine, [[first.request("first"), other.request("other")]], [0])
    assert model.refer(first).check_tokens(answers["first"])
    assert model.refer(other).check_tokens(answers["other"])
    assert answers["first"] != answers["other"]


def group_of(scheduler: Any, size: int, num_prompt_tokens: int = 20, max_tokens: int = 100) -> list[Request]:
    requests = [request_of("a", num_prompt_tokens, max_tokens) for _ in range(size)]
    for index, request in enumerate(requests):
        request.request_id = f"a{index}"
    scheduler.add(requests[0], requests[1:])
    return requests


def test_forks_get_their_seats_with_the_first() -> None:
    scheduler = scheduler_of(max_num_seqs=4)
    scheduler.add(request_of("b", 4, max_tokens=2))
    group = group_of(scheduler, 4)
    scheduler.add(request_of("c", 4))
    assert step(scheduler) == {"b": 4}  # beside b there are three seats
    assert step(scheduler) == {"b": 1}
    assert step(scheduler) == {"a0": 16}
    assert step(scheduler) == {"a0": 4}
    assert step(scheduler) == {request.request_id: 1 for request in group}
    assert [request.request_id for request in scheduler.waiting] == ["c"]


def test_more_forks_than_seats_are_all_served() -> None:
    scheduler = scheduler_of(max_num_seqs=2)
    group = group_of(scheduler, 5, max_tokens=3)
    while scheduler.running or scheduler.waiting:
        assert len(scheduler.running) <= 2
        step(scheduler)
    assert [len(request.output_token_ids) for request in group] == [3] * 5
    scheduler.kv_cache_manager.check_integrity()


@pytest.mark.parametrize("num_steps", range(5))
@pytest.mark.parametrize("victim", range(3))
def test_any_of_a_group_can_be_aborted_at_any_time(num_steps: int, victim: int) -> None:
    scheduler = scheduler_of(max_num_seqs=8)
    group = group_of(scheduler, 3, max_tokens=6)
    follower = request_of("a", 26, max_tokens=2)
    group[0].followers.append(follower)
    for _ in range(num_steps):
        step(scheduler)
    scheduler.abort(group[victim])
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    lengths = [len(request.output_token_ids) for request in (*group, follower)]
    assert lengths[:victim] + lengths[victim + 1 :] == [6, 6, 2]
    assert all(request.status is RequestStatus.FINISHED for request in (*group, follower))
    scheduler.kv_cache_manager.check_integrity()
