"""The engine against the one-piece model, against itself alone, and at its limits."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from common.embedding import VisionEmbedding
from common.errors import InvalidRequestError
from llm_service.engine.request import FinishReason, Request, RequestOutput, RequestStatus

EOS = 7


@dataclass(frozen=True)
class Workload:
    """Some prompts of a model, each with its own length of answer, their arrival steps, and a configuration."""

    indices: list[int]
    max_tokens: list[int]
    arrivals: list[int]
    config: dict[str, Any]

    def requests(self, model: Any) -> list[Request]:
        return [
            model.prompts[index].request(f"{place}-{index}", max_tokens=max_tokens)
            for place, (index, max_tokens) in enumerate(zip(self.indices, self.max_tokens, strict=True))
        ]


def workloads(model: Any, count: int, seed: int) -> Iterator[Workload]:
    """Chunks that split images, budgets of one to a few chunks, and few blocks, so that requests are preempted."""
    rng = random.Random(seed)
    longest = max(len(prompt.token_ids) for prompt in model.prompts) + 24
    for _ in range(count):
        number = rng.randint(2, 8)
        block_size = rng.choice([4, 8, 16])
        chunk_size = 16 if block_size == 16 else rng.choice([8, 16])
        yield Workload(
            indices=[rng.randrange(len(model.prompts)) for _ in range(number)],
            max_tokens=[rng.randint(1, 24) for _ in range(number)],
            arrivals=[rng.randrange(12) for _ in range(number)],
            config={
                "block_size": block_size,
                "prefill_chunk_size": chunk_size,
                "max_num_batched_tokens": rng.choice([16, 17, 24, 40, 64, 256]),
                "max_num_seqs": rng.choice([1, 3, 8, 8]),
                "num_kv_blocks": math.ceil(longest / block_size) + rng.randrange(3),
                "enable_prefix_caching": rng.random() < 0.8,
            },
        )


def check_against_one_piece_model(model: Any, numerics: str, count: int, seed: int) -> None:
    num_preemptions = num_cached_tokens = num_answers = num_near_ties = 0
    for workload in workloads(model, count, seed):
        engine = model.engine(numerics, **workload.config)
        requests = workload.requests(model)
        answers = engine.serve(requests, workload.arrivals)
        for request, index, max_tokens in zip(requests, workload.indices, workload.max_tokens, strict=True):
            answer = answers[request.request_id]
            assert len(answer) == max_tokens
            num_near_ties += not model.prompts[index].check_tokens(answer)
            num_cached_tokens += request.num_cached_tokens
        num_answers += len(requests)
        num_preemptions += engine.num_preemptions
    assert num_near_ties <= num_answers / 100
    assert num_preemptions > count / 10
    assert num_cached_tokens > 0


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_tokens_are_those_of_the_one_piece_model(each_model: Any, numerics: str) -> None:
    check_against_one_piece_model(each_model, numerics, 40, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_tokens_are_those_of_the_one_piece_model_in_thousands_of_workloads(each_model: Any, numerics: str) -> None:
    check_against_one_piece_model(each_model, numerics, 1000, seed=1)


def check_exact(model: Any, count: int, seed: int, *, asynchronous: bool = False) -> None:
    """Everything about the engine may vary but the chunk size, which is part of the numerics."""
    alone: dict[int, torch.Tensor] = {}
    for index, prompt in enumerate(model.prompts):
        engine = model.engine(enable_prefix_caching=False)
        engine.serve([prompt.request()])
        alone[index] = torch.stack(engine.logits["r"])
    num_preemptions = num_cached_tokens = 0
    for workload in workloads(model, count, seed):
        engine = model.engine(**{**workload.config, "prefill_chunk_size": 16}, asynchronous=asynchronous)
        requests = workload.requests(model)
        engine.serve(requests, workload.arrivals)
        for request, index, max_tokens in zip(requests, workload.indices, workload.max_tokens, strict=True):
            logits = torch.stack(engine.logits[request.request_id])
            assert len(request.output_token_ids) == max_tokens
            assert torch.equal(logits, alone[index][:max_tokens]), (workload, request.request_id)
            num_cached_tokens += request.num_cached_tokens
        num_preemptions += engine.num_preemptions
    assert num_preemptions > count / 10
    assert num_cached_tokens > 0


def test_exact_logits_do_not_depend_on_company_budget_preemption_or_prefix(wide_model: Any) -> None:
    check_exact(wide_model, 40, seed=2)


def test_steps_launched_before_the_last_tokens_are_read_change_no_bit(wide_model: Any) -> None:
    check_exact(wide_model, 20, seed=6, asynchronous=True)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_an_end_that_is_seen_late_ends_the_answer_where_it_should(model: Any, numerics: str) -> None:
    requests = [[prompt.request(str(index)) for index, prompt in enumerate(model.prompts)] for _ in range(2)]
    eos = [prompt.reference_tokens[place] for place, prompt in enumerate(model.prompts)]
    engines = [model.engine(numerics, eos, asynchronous=late, num_kv_blocks=40) for late in (False, True)]
    answers = [engine.serve(these, range(len(these))) for engine, these in zip(engines, requests, strict=True)]
    assert answers[0] == answers[1]
    assert any(len(answer) < 24 for answer in answers[1].values())
    assert any(len(answer) == 24 or answer[-1] in eos for answer in answers[1].values())


def test_a_request_aborted_while_its_token_is_on_the_device_leaves_no_trace(model: Any) -> None:
    engine = model.engine(asynchronous=True)
    first, second = model.prompts[1].request("first"), model.prompts[1].request("second")
    engine.add_request(first)
    engine.add_request(second)
    for _ in range(6):
        engine.step()
    engine.abort_request("first")
    while engine.has_unfinished_requests():
        assert {output.request_id for output in engine.step()} <= {"second"}
    assert model.prompts[1].check_tokens(second.output_token_ids)
    engine.step()  # nothing is left in flight


def test_exact_logits_do_not_depend_on_how_deepstack_rows_are_cut(wide_deepstack_model: Any) -> None:
    check_exact(wide_deepstack_model, 20, seed=4)


def test_deepstack_rows_count(wide_deepstack_model: Any) -> None:
    picture = wide_deepstack_model.picture(1)
    tensors = {**picture.embedding.tensors, "deepstack_1": torch.zeros_like(picture.embedding.features)}
    without = replace(picture, embedding=replace(picture.embedding, tensors=tensors))
    answers = []
    for image in (picture, without):
        prompt = wide_deepstack_model.refer(wide_deepstack_model.prompt(1, image, *range(20)))
        answers.append(wide_deepstack_model.engine().serve([prompt.request()])["r"])
        assert prompt.check_tokens(answers[-1])
    assert answers[0] != answers[1]


@pytest.mark.soak
def test_exact_logits_do_not_change_in_thousands_of_workloads(wide_model: Any) -> None:
    check_exact(wide_model, 1000, seed=3)


def test_exact_logits_of_a_second_turn_do_not_depend_on_the_first(wide_model: Any) -> None:
    engine = wide_model.engine()
    parts = [1, wide_model.picture(1), *range(100, 130)]
    answer = engine.serve([wide_model.prompt(*parts).request("first")])["first"]
    second = wide_model.prompt(*parts, *answer, *range(20)).request("second")
    engine.serve([second])
    assert second.num_cached_tokens == 48  # whole chunks of the first prompt's 53 tokens, nothing of its answer
    alone = wide_model.engine()
    alone.serve([wide_model.prompt(*parts, *answer, *range(20)).request("second")])
    assert torch.equal(torch.stack(engine.logits["second"]), torch.stack(alone.logits["second"]))


def test_exact_logits_are_the_same_in_a_large_batch(wide_model: Any) -> None:
    requests = [
        prompt.request(f"{copy}-{index}") for copy in range(8) for index, prompt in enumerate(wide_model.prompts)
    ]
    engine = wide_model.engine(num_kv_blocks=4096, max_num_seqs=256, max_num_batched_tokens=2048)
    engine.serve(requests)
    for index in range(len(wide_model.prompts)):
        logits = [torch.stack(engine.logits[f"{copy}-{index}"]) for copy in range(8)]
        assert all(torch.equal(logits[0], others) for others in logits[1:])


def test_seeded_answers_do_not_depend_on_company_or_preemption(wide_model: Any) -> None:
    def requests() -> list[Request]:
        return [
            prompt.request(str(index), temperature=0.9, top_p=0.95, seed=index, max_tokens=12)
            for index, prompt in enumerate(wide_model.prompts)
        ]

    alone = {}
    for request in requests():
        alone |= wide_model.engine().serve([request])
    engine = wide_model.engine(num_kv_blocks=20)
    assert engine.serve(requests()) == alone
    assert engine.num_preemptions > 0


def shared_blocks(first: Request, second: Request) -> int:
    """Leading blocks with equal hashes."""
    pairs = zip(first.block_hashes, second.block_hashes, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(second.block_hashes))


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_two_images_are_two_images(model: Any, numerics: str) -> None:
    before, after = list(range(40)), list(range(50, 70))
    prompts = [model.prompt(*before, model.picture(seed), *after) for seed in (1, 2)]
    requests = [prompt.request(str(index)) for index, prompt in enumerate(prompts)]
    engine = model.engine(numerics)
    answers = [engine.serve([request])[request.request_id] for request in requests]
    # 40 tokens and vision_start precede the first placeholder: five blocks of eight, two chunks of sixteen.
    assert requests[1].num_cached_tokens == (32 if numerics == "exact" else 40)
    assert shared_blocks(*requests) == 5
    assert answers[0] != answers[1]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert model.refer(prompt).check_tokens(answer)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_one_image_twice_is_computed_once(model: Any, numerics: str) -> None:
    prompt = model.prompt(*range(10), model.picture(1), *range(20))
    engine = model.engine(numerics)
    first, second = prompt.request("0"), prompt.request("1")
    answers = engine.serve([first]), engine.serve([second])
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)  # of 52
    assert answers[0]["0"] == answers[1]["1"]


def test_another_cache_salt_shares_nothing(model: Any) -> None:
    engine = model.engine()
    requests = [model.prompt(*range(60)).request(salt, cache_salt=salt) for salt in ("", "a", "b", "a ")]
    for request in requests:
        engine.serve([request])
    assert [request.num_cached_tokens for request in requests] == [0, 0, 0, 0]


def test_a_fully_known_prompt_computes_its_last_token_again(model: Any) -> None:
    prompt = model.prompt(*range(48))
    for numerics, expected in (("exact", 32), ("fast", 40)):
        engine = model.engine(numerics)
        first, second = prompt.request("0"), prompt.request("1")
        assert engine.serve([first])["0"] == engine.serve([second])["1"]
        assert second.num_cached_tokens == expected


def test_fast_reuses_generated_tokens_and_exact_does_not(model: Any) -> None:
    prompt = model.prompt(*range(30))
    for numerics, expected in (("exact", 16), ("fast", 48)):
        engine = model.engine(numerics)
        answer = engine.serve([prompt.request()])["r"]
        longer = model.prompt(*range(30), *answer, 5, 6).request("longer")
        engine.serve([longer])
        assert longer.num_cached_tokens == expected


def test_fast_reuses_a_part_of_a_large_block(model: Any) -> None:
    engine = model.engine("fast", block_size=256, num_kv_blocks=4, prefill_chunk_size=256)
    prompts = [model.prompt(*range(100), last) for last in (1, 2)]
    requests = [prompt.request(str(index)) for index, prompt in enumerate(prompts)]
    answers = [engine.serve([request])[request.request_id] for request in requests]
    assert requests[1].num_cached_tokens == 96
    for prompt, answer in zip(prompts, answers, strict=True):
        assert model.refer(prompt).check_tokens(answer)
    again = prompts[0].request("again")
    assert engine.serve([again])["again"] == answers[0]
    assert again.num_cached_tokens == 96  # of 101: the last one is always computed


@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_fast_tokens_do_not_depend_on_reused_parts_of_blocks(model: Any, block_size: int) -> None:
    rng = random.Random(block_size)
    engine = model.engine("fast", block_size=block_size, num_kv_blocks=1024 // block_size, prefill_chunk_size=256)
    num_cached_tokens = num_near_ties = 0
    for turn in range(8):
        picked = rng.sample(range(len(model.prompts)), 6)
        requests = [model.prompts[index].request(f"{turn}-{index}") for index in picked]
        answers = engine.serve(requests, [rng.randrange(12) for _ in requests])
        for index, request in zip(picked, requests, strict=True):
            num_near_ties += not model.prompts[index].check_tokens(answers[request.request_id])
            num_cached_tokens += request.num_cached_tokens
    assert num_near_ties <= 1
    assert num_cached_tokens > 300


def test_placeholders_are_split_by_small_chunks(model: Any) -> None:
    prompt = model.refer(model.prompt(1, 2, model.picture(3, (1, 12, 14)), 4))  # 42 placeholders
    engine = model.engine(max_num_batched_tokens=16)
    answer = engine.serve([prompt.request()])["r"]
    assert prompt.check_tokens(answer)
    assert engine.num_steps == 3 + 23  # 47 tokens are three chunks, of which the last yields the first token


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_aborted_requests_leave_nothing_behind(model: Any, numerics: str) -> None:
    rng = random.Random(4)
    for workload in workloads(model, 30, seed=5):
        engine = model.engine(numerics, **workload.config)
        requests = workload.requests(model)
        for request in requests:
            engine.add_request(request)
        doomed = {rng.randrange(30): request for request in rng.sample(requests, rng.randint(1, len(requests)))}
        answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
        for step in range(31):
            if engine.has_unfinished_requests():
                for output in engine.step():
                    answers[output.request_id] += output.token_ids
            if step in doomed:
                engine.abort_request(doomed[step].request_id)
                assert doomed[step].block_table == []
        for request, index in zip(requests, workload.indices, strict=True):
            assert model.prompts[index].check_tokens(answers[request.request_id])
        for request in requests:
            engine.abort_request(request.request_id)
        assert not engine.has_unfinished_requests()
        engine.kv_cache_manager.check_integrity()


def test_a_leak_is_noticed_when_the_engine_becomes_idle(model: Any) -> None:
    engine = model.engine()
    leaked = model.prompt(1, 2, 3).request("leaked")
    engine.kv_cache_manager.allocate(leaked, 1)
    engine.add_request(model.prompt(1, 2, 3).request(max_tokens=1))
    with pytest.raises(AssertionError, match="1 of 256 KV blocks are owned by nobody"):
        engine.step()


def finish(engine: Any, request: Request) -> tuple[list[int], FinishReason | None]:
    tokens = engine.serve([request])[request.request_id]
    return tokens, request.finish_reason


def test_answers_end_for_the_reason_they_should(model: Any) -> None:
    prompt = model.prompts[5]
    reference = prompt.reference_tokens
    end, stop = reference[6], reference[3]
    engine = model.engine(eos=[end])
    assert finish(engine, prompt.request()) == (reference[:7], FinishReason.STOP)
    assert finish(engine, prompt.request(stop_token_ids=frozenset([stop]))) == (reference[:4], FinishReason.STOP)
    assert finish(engine, prompt.request(max_tokens=2)) == (reference[:2], FinishReason.LENGTH)
    assert finish(engine, prompt.request(max_tokens=1)) == (reference[:1], FinishReason.LENGTH)
    assert finish(engine, prompt.request(ignore_eos=True)) == (reference, FinishReason.LENGTH)
    tokens, reason = finish(engine, prompt.request(min_tokens=10))
    assert tokens[:6] == reference[:6]
    assert end not in tokens[:10]
    assert reason is not None


def test_an_answer_ends_at_the_model_length_or_the_kv_memory(model: Any) -> None:
    prompt = model.prompt(*range(20))
    for limits in ({"max_model_len": 32}, {"max_model_len": 512, "num_kv_blocks": 4}):
        engine = model.engine(**limits)
        assert engine.max_model_len == 32
        tokens, reason = finish(engine, prompt.request(max_tokens=None))
        assert (len(tokens), reason) == (12, FinishReason.LENGTH)
    assert model.engine(max_model_len=10**6, num_kv_blocks=1000).max_model_len == 4096  # the model's own


@pytest.mark.parametrize("limits", [{"max_model_len": 32}, {"max_model_len": 512, "num_kv_blocks": 4}])
def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers(model: Any, limits: dict[str, int]) -> None:
    engine = model.engine(**limits)
    with pytest.raises(InvalidRequestError, match=r"has 32 tokens.* exceeds 32, .*max_model_len.*num_kv_blocks"):
        engine.add_request(model.prompt(*range(32)).request())
    assert not engine.has_unfinished_requests()
    assert len(engine.serve([model.prompt(*range(31)).request()])["r"]) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", -2.5),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("stop_token_ids", frozenset([320])),
        ("stop_token_ids", frozenset(range(320))),
    ],
)
def test_meaningless_sampling_parameters_are_refused_by_name(model: Any, name: str, value: Any) -> None:
    engine = model.engine(eos=[EOS])
    with pytest.raises(InvalidRequestError, match=name) as caught:
        engine.add_request(model.prompt(1).request(**{name: value}))
    assert caught.value.param == name
    assert not engine.has_unfinished_requests()


def test_requests_that_do_not_fit_together_are_refused(model: Any) -> None:
    engine = model.engine()
    good = model.prompt(1, model.picture(1), 2).request("good")
    (feature,) = good.mm_features
    bad = {
        "positions": replace(good, positions=good.positions[:, 1:]),
        "below 320": replace(good, prompt_token_ids=[*good.prompt_token_ids[:-1], 320]),
        "must have tokens": replace(good, prompt_token_ids=[]),
        "features of shape": replace(
            good, mm_features=[replace(feature, embedding=VisionEmbedding({"features": torch.zeros(3, 32)}, (1, 2, 6)))]
        ),
        "out of order": replace(good, mm_features=[feature, feature]),
    }
    for message, request in bad.items():
        with pytest.raises(ValueError, match=message):
            engine.add_request(request)
    engine.add_request(good)
    with pytest.raises(ValueError, match="already being served"):
        engine.add_request(replace(good))
    while engine.has_unfinished_requests():
        engine.step()
    assert good.status is RequestStatus.FINISHED


def test_features_that_are_not_numbers_end_their_own_request_only(model: Any) -> None:
    bad = model.picture(1)
    bad.embedding.features[3, 5] = math.nan
    good = model.prompts[5]
    engine = model.engine()
    engine.add_request(model.prompt(1, bad, 2).request("bad", temperature=1.0))
    engine.add_request(good.request("good"))
    outputs: list[RequestOutput] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output for output in outputs if output.request_id == "bad"] == [
        RequestOutput("bad", [], finish_reason=FinishReason.ERROR)
    ]
    assert good.check_tokens([token for output in outputs if output.request_id == "good" for token in output.token_ids])


def test_an_image_is_served_again_after_its_features_were_not_numbers(model: Any) -> None:
    picture = model.picture(1)
    prompt = model.refer(model.prompt(1, picture, *range(20)))
    damaged = replace(
        picture, embedding=VisionEmbedding({"features": picture.embedding.features * math.nan}, (1, 8, 10))
    )
    engine = model.engine()
    assert finish(engine, model.prompt(1, damaged, *range(20)).request()) == ([], FinishReason.ERROR)
    tokens, reason = finish(engine, prompt.request())
    assert prompt.check_tokens(tokens)
    assert reason is FinishReason.LENGTH


def test_models_that_would_be_computed_wrong_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text_config = model.loaded.model.model.language_model.config
    monkeypatch.setattr(text_config, "layer_types", ["full_attention", "linear_attention"])
    with pytest.raises(ValueError, match="layers of \\['linear_attention'\\]"):
        model.engine()
    monkeypatch.undo()
    monkeypatch.setitem(text_config.rope_parameters, "rope_type", "dynamic")
    with pytest.raises(ValueError, match="rope type 'dynamic'"):
        model.engine()
    monkeypatch.undo()
    monkeypatch.setattr(text_config, "model_type", "gemma2")
    with pytest.raises(ValueError, match="text model 'gemma2' is not supported"):
        model.engine()


def test_a_sliding_window_is_the_longest_request(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.loaded.model.model.language_model.config, "sliding_window", 40)
    monkeypatch.setattr(model.loaded.config.text_config, "sliding_window", 40)
    assert model.engine().max_model_len == 40
