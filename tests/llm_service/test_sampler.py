"""The sampler against transformers' own processors and warpers, and its promises about seeds and company."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm_service.engine.request import Request, SamplingParams
from llm_service.engine.sampler import DrawnRows, Sampler, warp

VOCAB = 50
EOS = 3


def request_of(prompt: list[int] | None = None, output: list[int] | None = None, **sampling: Any) -> Request:
    request = Request("r", prompt or [1, 2], torch.zeros(3, 2), 2, SamplingParams(**sampling), num_pending_tokens=1)
    request.output_token_ids = output or []
    return request


def sample(sampler: Sampler, logits: torch.Tensor, requests: list[Request]) -> list[int | None]:
    return sampler.sample(logits, requests).token_ids()


def say(sampler: Sampler, logits: torch.Tensor, requests: list[Request]) -> list[int | None]:
    """Samples and books the tokens, so that the next ones are drawn anew."""
    tokens = sample(sampler, logits, requests)
    for request, token in zip(requests, tokens, strict=True):
        request.output_token_ids.append(token)
    return tokens


def random_logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.3},
        {"top_k": 5},
        {"top_k": VOCAB + 1},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_the_distribution_is_that_of_transformers(sampling: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **sampling})
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    warpers += [TopPLogitsWarper(params.top_p), MinPLogitsWarper(params.min_p)]
    for seed in range(20):
        logits = random_logits(seed)
        expected = warpers(torch.zeros(1, 1, dtype=torch.long), logits)[0].softmax(-1)
        actual = warp(logits, DrawnRows([0], [params], [0], torch.device("cpu")))[0].softmax(-1)
        assert torch.equal(actual > 0, expected > 0)
        torch.testing.assert_close(actual, expected)


def edited(logits: torch.Tensor, *requests: Request) -> torch.Tensor:
    """The logits that one request's token is chosen from."""
    sampler = Sampler(frozenset())
    sampler.sample(logits, list(requests))
    return sampler._edit(logits)[0]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(0)
    request = request_of([1, 2, 2, 40], [7, 7, 9], repetition_penalty=penalty)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([request.token_ids(0, 7)]), logits.clone())
    assert torch.equal(edited(logits, request), expected[0])


def test_presence_and_frequency_penalties_follow_openai_and_count_the_answer_only() -> None:
    logits = random_logits(1)[0]
    request = request_of([1, 2, 2], [7, 7, 9, 7], presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.clone()
    for token, count in Counter(request.output_token_ids).items():
        expected[token] -= count * 0.25 + 0.5
    assert torch.equal(edited(logits[None], request), expected)


def test_greedy_is_the_argmax_and_leaves_random_state_alone() -> None:
    logits = random_logits(2, rows=8)
    requests = [request_of(temperature=temperature) for temperature in (0.0, 1e-9) * 4]
    state = torch.get_rng_state()
    assert sample(Sampler(frozenset()), logits, requests) == logits.argmax(-1).tolist()
    assert torch.equal(torch.get_rng_state(), state)


def test_penalties_hold_for_greedy_too() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 2.0, 1.9
    request = request_of(output=[5], repetition_penalty=1.5)
    assert sample(Sampler(frozenset()), logits, [request]) == [6]


def test_the_same_seed_draws_the_same_tokens_in_any_company() -> None:
    sampler = Sampler(frozenset())
    logits = [random_logits(seed) for seed in range(30)]
    seeded = {"temperature": 1.0, "seed": 11}

    alone = request_of(**seeded)
    expected = [say(sampler, row, [alone])[0] for row in logits]
    assert len(set(expected)) > 5

    torch.manual_seed(99)
    company, unseeded = request_of(**seeded), request_of(temperature=2.0)
    batches = [torch.cat([random_logits(1000 + index), row]) for index, row in enumerate(logits)]
    assert [say(sampler, batch, [unseeded, company])[1] for batch in batches] == expected


def test_requests_without_a_seed_differ() -> None:
    sampler = Sampler(frozenset())
    flat = torch.zeros(1, VOCAB)
    first, second = request_of(temperature=1.0), request_of(temperature=1.0)
    answers = [say(sampler, flat.expand(2, -1), [first, second]) for _ in range(20)]
    assert any(a != b for a, b in answers)


def test_drawing_follows_the_distribution() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, :3] = torch.tensor([0.5, 0.3, 0.2]).log()
    request = request_of(temperature=1.0, seed=0)
    sampler = Sampler(frozenset())
    counts = Counter(say(sampler, logits, [request])[0] for _ in range(3000))
    assert [counts[token] / 3000 for token in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_are_masked_until_min_tokens(temperature: float) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 8], logits[0, 9] = 90.0, 80.0, 50.0
    sampler = Sampler(frozenset([EOS]))

    def token(num_output: int, **sampling: Any) -> int | None:
        request = request_of(output=[1] * num_output, min_tokens=3, temperature=temperature, **sampling)
        return sample(sampler, logits, [request])[0]

    assert token(2) == 8
    assert token(2, stop_token_ids=frozenset([8])) == 9
    assert token(2, ignore_eos=True) == EOS
    assert token(3) == EOS
    assert logits[0, EOS] == 90.0  # the caller's logits are not touched


@pytest.mark.parametrize("temperature", [1e-4, 1e-300, 1e300])
def test_no_temperature_overflows(temperature: float) -> None:
    request = request_of(temperature=temperature, top_p=0.9, min_p=0.1, seed=1)
    (token,) = sample(Sampler(frozenset()), random_logits(3), [request])
    assert token is not None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_choose_nothing(value: float) -> None:
    logits = random_logits(4, rows=3)
    logits[1, 7] = value
    tokens = sample(Sampler(frozenset()), logits, [request_of(temperature=t) for t in (0.0, 1.0, 1.0)])
    assert [token is None for token in tokens] == [False, True, False]


def test_a_row_of_a_large_batch_is_the_row_alone() -> None:
    """Whatever its neighbours ask for; odd sizes, so that no row begins where a vector register does."""
    vocab = 997
    logits = torch.randn(61, vocab, generator=torch.Generator().manual_seed(5)) * 4
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
        {
            "temperature": 0.9,
            "top_p": 0.95,
            "top_k": 100,
            "frequency_penalty": 0.5,
            "logit_bias": ((5, 3.0), (6, -9.0)),
        },
        {"min_tokens": 50, "presence_penalty": 1.0},
    ]

    def requests() -> list[Request]:
        return [request_of([1, 2], seed=row, logprobs=row % 4, **ways[row % len(ways)]) for row in range(61)]

    together, alone = requests(), requests()
    sampler, others = Sampler(frozenset([EOS])), [Sampler(frozenset([EOS])) for _ in range(61)]
    for turn in range(6):
        rows = logits.roll(turn, 1)
        sampled = sampler.sample(rows, together)
        singly = [one.sample(rows[row : row + 1], [alone[row]]) for row, one in enumerate(others)]
        assert sampled.token_ids() == [one.token_ids()[0] for one in singly]
        assert sampled.logprobs() == [(one.logprobs() or [None])[0] for one in singly]
        for request, other, token in zip(together, alone, sampled.token_ids(), strict=True):
            assert token is not None
            request.output_token_ids.append(token)
            other.output_token_ids.append(token)


def test_penalties_follow_requests_that_come_and_go() -> None:
    sampler = Sampler(frozenset())
    requests = [request_of([row], repetition_penalty=1.5, presence_penalty=0.5) for row in range(5)]
    for turn in range(12):
        running = [request for row, request in enumerate(requests) if (turn + row) % 3]
        logits = random_logits(turn, rows=len(running))
        say(sampler, logits, running)
        fresh = Sampler(frozenset())
        for request in running:
            said = request.output_token_ids.pop()
            row = running.index(request)
            assert sample(fresh, logits[row : row + 1], [request]) == [said]
            request.output_token_ids.append(said)
