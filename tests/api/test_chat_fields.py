"""Every field of a chat completion is honoured, refused by name, harmless, or ignored; streams keep their form."""

from collections.abc import Callable
from typing import Any, get_type_hints

import httpx2
import openai
import pytest
from openai.types.chat import completion_create_params

from common import metrics
from llm_service.api import stream
from llm_service.api.chat_completions import ChatCompletionRequest
from tests.api.conftest import Service, events_of
from tests.conftest import picture
from tests.services import body, image_part

URL = "/v1/chat/completions"

REFUSED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "bad_words": ["x"],
    "best_of": 2,
    "chat_template": "{{ 1 }}",
    "echo": True,
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "guided_json": {},
    "guided_regex": "a+",
    "include_stop_str_in_output": True,
    "length_penalty": 2.0,
    "media_io_kwargs": {"video": {"num_frames": 4}},
    "mm_processor_kwargs": {"code_revision": "x"},
    "moderation": {},
    "priority": 3,
    "prompt_logprobs": 1,
    "reasoning_effort": "high",
    "truncate_prompt_tokens": 10,
    "use_beam_search": True,
    "verbosity": "high",
    "web_search_options": {},
}

HARMLESS: dict[str, Any] = {
    "metadata": {"a": "b"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "key",
    "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "me",
    "service_tier": "auto",
    "store": False,
    "user": "me",
    "modalities": "multi-images",
    "reasoning_effort": "none",
    "priority": 0,
    "parallel_tool_calls": True,
    "request_id": "mine",
    "chat_template_kwargs": {"enable_thinking": False},
}


async def test_every_field_of_the_official_client_is_known() -> None:
    sent = get_type_hints(completion_create_params.CompletionCreateParamsNonStreaming).keys()
    known = ChatCompletionRequest.model_fields.keys() | ChatCompletionRequest.harmless
    assert sent - known - ChatCompletionRequest.not_honoured.keys() == set()


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_not_honoured_is_refused_by_name(http: httpx2.AsyncClient, name: str) -> None:
    answer = await http.post(URL, json=body("hi") | {name: REFUSED[name]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")


async def test_harmless_fields_change_nothing(http: httpx2.AsyncClient) -> None:
    plain, loaded = [(await http.post(URL, json=body("hi") | fields)).json() for fields in ({}, HARMLESS)]
    assert plain["choices"] == loaded["choices"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
        ({"cache_salt": "a b"}, "cache_salt"),
        ({"top_k": 2**40}, "top_k"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"temperature": 3}, "temperature"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "x"}] * 1025}, "messages"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ],
    ids=str,
)
async def test_values_out_of_range_are_refused_by_name(
    http: httpx2.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    answer = await http.post(URL, json=body("hi") | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


async def test_deep_json_is_refused(http: httpx2.AsyncClient) -> None:
    for depth in (100, 100_000):
        deep = '{"model":"tiny","messages":[],"x":' + "[" * depth + "]" * depth + "}"
        answer = await http.post(URL, content=deep, headers={"content-type": "application/json"})
        assert answer.status_code == 400


async def test_an_unknown_field_is_counted(http: httpx2.AsyncClient) -> None:
    before = metrics.snapshot()["fovea_ignored_fields_total"]
    answer = await http.post(URL, json=body("hi") | {"a b": 1, "zzz": 2})
    assert answer.headers["x-fovea-ignored-fields"] == "a?b, zzz"
    assert metrics.snapshot()["fovea_ignored_fields_total"] == before + 2


async def test_the_answer_goes_on_in_the_final_message(http: httpx2.AsyncClient) -> None:
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "There are"}]
    layout = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    tokens = (await http.post("/tokenize", json=layout)).json()["tokens"]
    prompt = (await http.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
    assert prompt.endswith("There are")
    answer = await http.post(URL, json={"model": "tiny", "max_tokens": 3} | layout)
    assert answer.json()["usage"]["prompt_tokens"] == len(tokens)


async def test_token_ids_are_returned_and_are_the_text(http: httpx2.AsyncClient) -> None:
    request = body("hi", return_token_ids=True, skip_special_tokens=False)
    answer = (await http.post(URL, json=request)).json()
    choice = answer["choices"][0]
    text = (await http.post("/detokenize", json={"tokens": choice["token_ids"]})).json()["prompt"]
    assert text == choice["message"]["content"]
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    events = events_of((await http.post(URL, json=request | {"stream": True})).text)[:-1]
    ids = [token for event in events for choice in event["choices"] for token in choice["token_ids"]]
    assert ids == choice["token_ids"]


async def test_usage_adds_up(http: httpx2.AsyncClient) -> None:
    request = body(image_part(picture()), "Describe the picture. " * 30)
    for _ in range(2):
        usage = (await http.post(URL, json=request)).json()["usage"]
        details = usage["prompt_tokens_details"]
        assert details["image_tokens"] + details["text_tokens"] == usage["prompt_tokens"]
        assert 0 < details["cached_tokens"] + details["cache_write_tokens"] <= usage["prompt_tokens"]
    assert details["cache_write_tokens"] == 0


# Streams


async def test_stream_has_one_role_one_finish_and_one_usage(http: httpx2.AsyncClient) -> None:
    request = body("hi", stream=True, stream_options={"include_usage": True})
    answer = await http.post(URL, json=request)
    *chunks, last, done = events_of(answer.text)
    assert done == "[DONE]"
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 6)
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert [choice["finish_reason"] is not None for choice in choices] == [False] * (len(choices) - 1) + [True]
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


async def test_continuous_usage_grows(http: httpx2.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await http.post(URL, json=body("hi", stream=True, stream_options=options, return_token_ids=True))
    counts = [event["usage"]["completion_tokens"] for event in events_of(answer.text)[:-1]]
    assert counts[:-1] == sorted(set(counts))
    assert counts[-1] == counts[-2]


async def test_without_usage_no_chunk_has_one(http: httpx2.AsyncClient) -> None:
    answer = await http.post(URL, json=body("hi", stream=True, stream_options={"include_usage": False}))
    assert not any(chunk.get("usage") for chunk in events_of(answer.text)[:-1])


async def test_comments_keep_a_waiting_stream_alive(
    serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "KEEP_ALIVE_S", 0.02)
    service = serve()
    service.say("ab", pause_s=0.1)
    answer = await service.http.post(URL, json=body("hi", stream=True))
    assert ": keep-alive\n\n" in answer.text
    client = openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=service.http)
    chunks = [chunk async for chunk in await client.chat.completions.create(**body("hi"), stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ab"


# Requests


async def test_every_answer_has_a_request_id(http: httpx2.AsyncClient) -> None:
    sent = await http.post(URL, json=body("hi"), headers={"x-request-id": "mine"})
    refused = await http.post(URL, json={})
    unsafe = await http.get("/health", headers={"x-request-id": "a b"})
    assert sent.headers["x-request-id"] == "mine"
    assert all(answer.headers["x-request-id"].startswith("req-") for answer in (refused, unsafe))
