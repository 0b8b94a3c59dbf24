"""Several choices, log probabilities, bias and structured output over the HTTP surface, in process."""

import asyncio
import math
import re
from pathlib import Path
from typing import Any

import httpx2
import openai
import pydantic
import pytest

from common import metrics
from llm_service.engine.structured_output import StructuredOutput
from llm_service.server import PreparedRequest, choice_seed
from tests.conftest import picture
from tests.services import URL, Services, body, image_part

MAX_INT64 = 2**63 - 1


async def chunks_of(sdk: openai.AsyncOpenAI, **request: Any) -> list[Any]:
    stream = await sdk.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    return [chunk async for chunk in stream]


# Several choices


async def test_each_choice_is_the_answer_alone_with_the_seed_counted_on(sdk: openai.AsyncOpenAI) -> None:
    request = body(image_part(picture()), "Tell me.", max_tokens=16, temperature=1.0)
    group = await sdk.chat.completions.create(**request, n=4, seed=MAX_INT64 - 1)
    texts = [choice.message.content for choice in group.choices]
    assert [choice.index for choice in group.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    for index, text in enumerate(texts):
        seed = choice_seed(MAX_INT64 - 1, index)
        alone = await sdk.chat.completions.create(**request, seed=seed)
        assert alone.choices[0].message.content == text
        assert alone.usage.prompt_tokens == group.usage.prompt_tokens


def test_seeds_of_choices_stay_signed_64_bit_integers() -> None:
    assert [choice_seed(MAX_INT64 - 1, index) for index in range(3)] == [MAX_INT64 - 1, MAX_INT64, -(2**63)]
    assert choice_seed(None, 3) is None


async def test_choices_without_a_seed_differ(sdk: openai.AsyncOpenAI) -> None:
    group = await sdk.chat.completions.create(**body("Tell me.", max_tokens=16, temperature=1.5, n=16))
    assert len({choice.message.content for choice in group.choices}) > 8


async def test_streamed_choices_joined_are_the_whole_ones(sdk: openai.AsyncOpenAI) -> None:
    request = body("Tell me.", max_tokens=16, temperature=1.0, seed=5, n=3)
    whole = await sdk.chat.completions.create(**request)
    chunks = await chunks_of(sdk, **request)
    for index, expected in enumerate(whole.choices):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [choice.delta.role for choice in choices if choice.delta.role] == ["assistant"]
        assert choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in choices) == expected.message.content
        reasons = [choice.finish_reason for choice in choices]
        assert reasons == [None] * (len(reasons) - 1) + [expected.finish_reason]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_a_stop_string_ends_its_own_choice_only(services: Services, sdk: openai.AsyncOpenAI) -> None:
    request = body("Tell me.", max_tokens=40, temperature=1.0, seed=5, n=3)
    texts = [choice.message.content for choice in (await sdk.chat.completions.create(**request)).choices]
    stop = next(texts[0][i : i + 2] for i in range(3, 20) if all(texts[0][i : i + 2] not in text for text in texts[1:]))
    group = await sdk.chat.completions.create(**request, stop=stop)
    assert group.choices[0].message.content == texts[0][: texts[0].index(stop)]
    assert [choice.message.content for choice in group.choices[1:]] == texts[1:]
    assert group.choices[0].finish_reason == "stop"


async def test_a_client_that_leaves_aborts_all_its_choices(services: Services) -> None:
    prepared = await services.prepare("Tell me.", [], max_tokens=4000, n=4, temperature=1.0)
    outputs = services.llm.generate(prepared)
    await anext(outputs)
    assert services.llm.engine.num_running == 4
    await outputs.aclose()
    async with asyncio.timeout(10):
        while services.llm.engine.num_running:  # noqa: ASYNC110 - it changes on another thread
            await asyncio.sleep(0.01)
    services.llm.engine.check_health()  # it has checked its blocks by now


# Log probabilities and bias


async def test_logprobs_have_the_form_of_openai(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(**body("图中有几个?", max_tokens=20, logprobs=True, top_logprobs=5))
    choice = answer.choices[0]
    entries = choice.logprobs.content
    joined = b"".join(bytes(entry.bytes) for entry in entries)
    assert joined.decode(errors="ignore") == choice.message.content.replace("\ufffd", "")
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert (entry.token, entry.logprob, entry.bytes) == (  # greedy
            entry.top_logprobs[0].token, values[0], entry.top_logprobs[0].bytes,
        )  # fmt: skip
        assert sum(map(math.exp, values)) <= 1 + 1e-5
        assert entry.token == bytes(entry.bytes).decode(errors="replace")


async def test_streamed_logprobs_are_the_whole_ones(sdk: openai.AsyncOpenAI) -> None:
    request = body("Tell me.", max_tokens=12, logprobs=True, top_logprobs=2, n=2, temperature=1.0, seed=3)
    whole = await sdk.chat.completions.create(**request)
    chunks = await chunks_of(sdk, **request)
    for index, expected in enumerate(whole.choices):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        entries = [entry for choice in choices for entry in choice.logprobs.content]
        assert entries == expected.logprobs.content


async def test_logprobs_without_top_are_those_of_the_tokens_alone(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(**body("Tell me.", logprobs=True))
    assert [entry.top_logprobs for entry in answer.choices[0].logprobs.content] == [[]] * 6
    plain = await sdk.chat.completions.create(**body("Tell me."))
    assert plain.choices[0].logprobs is None


async def test_bias_forces_and_forbids_tokens(services: Services, sdk: openai.AsyncOpenAI) -> None:
    token = services.llm.prompt.tokenizer.encode("x")[0]
    forced = await sdk.chat.completions.create(**body("Tell me.", logit_bias={str(token): 100}))
    assert forced.choices[0].message.content == "x" * 6
    (first,) = await services.tokens("Tell me.", [], max_tokens=1)
    request = body("Tell me.", logprobs=True, max_tokens=1)
    entries = [
        (await sdk.chat.completions.create(**request, logit_bias=bias)).choices[0].logprobs.content[0]
        for bias in ({}, {str(first): -100})
    ]
    assert bytes(entries[0].bytes) == services.llm.token_texts(first) != bytes(entries[1].bytes)


# Structured output


class Scene(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    colour: str = pydantic.Field(max_length=8)
    count: int = pydantic.Field(ge=0, le=20)


async def test_an_answer_of_a_schema_parses_into_its_model(sdk: openai.AsyncOpenAI) -> None:
    for seed in range(5):
        request = body("Describe.", max_tokens=200, temperature=1.0, seed=seed)
        answer = await sdk.chat.completions.parse(**request, response_format=Scene)
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Scene)


async def test_preempted_answers_follow_their_grammar(tiny_checkpoint: Path) -> None:
    services = Services(tiny_checkpoint, num_kv_blocks=18, max_num_seqs=16)
    wanted = StructuredOutput("json", Scene.model_json_schema(), "response_format")
    prepared = [
        await services.prepare("Describe.", [], 200, n=3, temperature=1.0, seed=seed, structured_output=wanted)
        for seed in range(4)
    ]

    async def texts(one: PreparedRequest) -> list[str]:
        found = [""] * 3
        async for output in services.llm.generate(one):
            found[output.index] += output.text
        return found

    for group in await asyncio.gather(*map(texts, prepared)):
        assert all(Scene.model_validate_json(text) for text in group)
    assert services.llm.engine._engine.scheduler.num_preemptions > 0
    services.llm.engine.check_health()
    services.llm.engine.shutdown()


async def test_choices_under_a_grammar_each_follow_it(sdk: openai.AsyncOpenAI) -> None:
    request = body("Describe.", max_tokens=100, temperature=1.0, seed=1, n=6)
    group = await sdk.chat.completions.create(**request, extra_body={"structured_outputs": {"regex": "[a-z]{3}[0-9]"}})
    texts = [choice.message.content for choice in group.choices]
    assert all(re.fullmatch("[a-z]{3}[0-9]", text) for text in texts)
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
        ({"structured_outputs": {"choice": ["red", "dark blue"]}}, "red|dark blue"),
        ({"structured_outputs": {"json": '{"type": "integer", "maximum": 99}'}}, "-?[0-9]+"),
        ({"response_format": {"type": "text"}}, ".*"),
    ],
)
async def test_every_form_of_structured_output_is_followed(
    http: httpx2.AsyncClient, fields: dict[str, Any], pattern: str
) -> None:
    answer = (await http.post(URL, json=body("Describe.", max_tokens=400, temperature=0.7, seed=2, **fields))).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length" or re.fullmatch(pattern, choice["message"]["content"], re.DOTALL)


async def test_an_answer_cut_by_max_tokens_says_so(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(
        **body("Describe.", max_tokens=3, response_format={"type": "json_object"})
    )
    assert answer.choices[0].finish_reason == "length"


# Refused before anything is scheduled

SCHEMA = {"type": "json_schema", "json_schema": {"name": "a"}}


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}}


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a million choices": ({"n": 10**6}, "n", "less than or equal to 16"),
    "no choice": ({"n": 0}, "n", "greater than or equal to 1"),
    "21 top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    "21 top_logprobs in a stream": (
        {"logprobs": True, "top_logprobs": 21, "stream": True}, "top_logprobs", "less than or equal to 20",
    ),
    "-1 top_logprobs": ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "greater than or equal to 0"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
    "a seed above 64 bits": ({"seed": 2**63}, "seed", "less than 9223372036854775808"),
    "a seed below 64 bits": ({"seed": -(2**63) - 1}, "seed", "greater than or equal to -9223372036854775808"),
    "100000 stop strings": ({"stop": ["a"] * 10**5}, "stop", "at most 16 items"),
    "a long stop string": ({"stop": "a" * 257}, "stop[0]", "at most 256 characters"),
    "a bias above 100": ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
    "a bias for no token": ({"logit_bias": {"9999": 1}}, "logit_bias", "ids below"),
    "a bias for a word": ({"logit_bias": {"red": 1}}, "logit_bias.red.[key]", "valid integer"),
    "1025 biases": ({"logit_bias": {str(index): 1 for index in range(1025)}}, "logit_bias", "at most 1024"),
    "an impossible schema": (
        schema({"type": "string", "minLength": 5, "maxLength": 2}),
        "response_format.json_schema.schema", "nothing satisfies it",
    ),
    "no schema": ({"response_format": SCHEMA}, "response_format.json_schema.schema", "required"),
    "no json_schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    "a grammar above the size limit": (
        schema({"enum": ["x" * 70_000]}), "response_format.json_schema.schema", "bytes, the limit is 65536",
    ),
    "a grammar above the fuel limit": (
        schema({"enum": [f"{index:x}" for index in range(8400)]}), "response_format.json_schema.schema",
        "above the limits on size and work",
    ),
    "a regex that is none": ({"structured_outputs": {"regex": "[a-z"}}, "structured_outputs.regex", "not valid"),
    "two grammars": (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "not 2 of them",
    ),
    "two kinds of format": (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs", "exclude each other",
    ),
    "a schema that is not JSON": ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
    "min_tokens with a grammar": ({"structured_outputs": {"regex": "a"}, "min_tokens": 5}, "min_tokens", "combined"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_bad_input_is_refused_by_name_before_anything_is_scheduled(
    services: Services, http: httpx2.AsyncClient, name: str
) -> None:
    fields, param, words = REFUSED[name]
    before = metrics.snapshot()["fovea_generation_tokens_total"]
    answer = await http.post(URL, json=body(image_part(picture()), "hi", **fields))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]
    assert services.encoder.num_encoded == 0
    assert metrics.snapshot()["fovea_generation_tokens_total"] == before
    assert (await http.post(URL, json=body("Still there?"))).status_code == 200


async def test_300_biases_are_taken(http: httpx2.AsyncClient) -> None:
    fields = {"logit_bias": {str(index): 0.5 for index in range(300)}}
    assert (await http.post(URL, json=body("hi", **fields))).status_code == 200
