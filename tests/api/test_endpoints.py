"""The endpoints beside chat completions: the same answers in other words."""

import json
from collections.abc import Callable
from typing import Any, get_type_hints

import httpx2
import openai
import pytest
from openai.types import completion_create_params, decision_create_params
from openai.types.responses import response_create_params

from common.errors import UnavailableError
from llm_service.api.completions import CompletionRequest
from llm_service.api.decisions import DecisionRequest
from llm_service.api.fields import ApiRequest
from llm_service.api.responses import ResponsesRequest
from llm_service.engine.request import FinishReason
from tests.api.conftest import Service, events_of
from tests.conftest import picture
from tests.services import body, data_url, image_part

CHAT = "/v1/chat/completions"


async def chat(http: httpx2.AsyncClient, *parts: Any, **fields: Any) -> dict[str, Any]:
    return (await http.post(CHAT, json=body(*parts, **fields))).json()


@pytest.mark.parametrize(
    ("sent", "known"),
    [
        (completion_create_params.CompletionCreateParamsNonStreaming, CompletionRequest),
        (decision_create_params.DecisionCreateParams, DecisionRequest),
        (response_create_params.ResponseCreateParamsNonStreaming, ResponsesRequest),
    ],
    ids=["completions", "decisions", "responses"],
)
def test_every_field_of_the_official_client_is_known(sent: type, known: type[ApiRequest]) -> None:
    names = get_type_hints(sent).keys() - known.model_fields.keys() - known.harmless
    assert names - known.not_honoured.keys() == set()


# /v1/completions


async def test_completion_of_a_chat_prompt_is_the_chat_answer(http: httpx2.AsyncClient) -> None:
    answer = await chat(http, "How many?")
    messages = body("How many?")["messages"]
    tokens = (await http.post("/tokenize", json={"messages": messages})).json()["tokens"]
    text = (await http.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
    for prompt in (tokens, text):
        request = {"model": "tiny", "prompt": prompt, "max_tokens": 6}
        completion = (await http.post("/v1/completions", json=request)).json()
        assert completion["choices"][0]["text"] == answer["choices"][0]["message"]["content"]
        assert completion["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]


async def test_several_prompts_are_answered_each_and_streamed_with_their_index(sdk: openai.AsyncOpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "prompt": ["One", "Two", "Three"], "max_tokens": 5}
    whole = await sdk.completions.create(**request)
    alone = [await sdk.completions.create(**request | {"prompt": prompt}) for prompt in request["prompt"]]
    assert [choice.text for choice in whole.choices] == [answer.choices[0].text for answer in alone]
    texts, finishes = [""] * 3, [0] * 3
    async for chunk in await sdk.completions.create(**request, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] += choice.finish_reason is not None
    assert texts == [choice.text for choice in whole.choices]
    assert finishes == [1, 1, 1]
    assert whole.usage.completion_tokens == sum(answer.usage.completion_tokens for answer in alone)


async def test_echo_says_the_prompt_first(sdk: openai.AsyncOpenAI) -> None:
    plain, echoed = [
        await sdk.completions.create(model="tiny", prompt="One", max_tokens=3, echo=echo) for echo in (False, True)
    ]
    assert echoed.choices[0].text == "One" + plain.choices[0].text


async def test_completion_has_the_logprobs_of_the_chat_answer(
    sdk: openai.AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    grammar = {"structured_outputs": {"regex": "[a-z红蓝]{12}"}}  # some tokens are parts of a character
    asked = body("Tell me.", max_tokens=40)
    tokens = (await http.post("/tokenize", json={"messages": asked["messages"]})).json()["tokens"]
    chat_answer = await sdk.chat.completions.create(**asked, logprobs=True, top_logprobs=2, extra_body=grammar)
    entries = chat_answer.choices[0].logprobs.content
    answer = await sdk.completions.create(model="tiny", prompt=tokens, max_tokens=40, logprobs=2, extra_body=grammar)
    found = answer.choices[0].logprobs
    assert found.tokens == [entry.token for entry in entries]
    assert found.token_logprobs == [entry.logprob for entry in entries]
    for top, entry in zip(found.top_logprobs, entries, strict=True):
        assert top == {entry.token: entry.logprob} | {one.token: one.logprob for one in entry.top_logprobs}
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert "\ufffd" in token or answer.choices[0].text.startswith(token, offset)


async def test_streamed_logprobs_of_completions_are_the_whole_ones(sdk: openai.AsyncOpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "prompt": ["One", "Two"], "max_tokens": 8, "logprobs": 0}
    whole = await sdk.completions.create(**request)
    streamed: list[dict[str, list[Any]]] = [{}, {}]
    async for chunk in await sdk.completions.create(**request, stream=True):
        for choice in chunk.choices:
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                streamed[choice.index].setdefault(name, []).extend(values)
    assert streamed == [choice.logprobs.model_dump() for choice in whole.choices]
    assert whole.choices[0].logprobs.text_offset[0] == 0


async def test_completions_accept_the_cache_fields_of_clients(http: httpx2.AsyncClient) -> None:
    sent = {"prompt_cache_key": "k", "prompt_cache_options": {"mode": "explicit", "ttl": "30m"}, "service_tier": "auto"}
    answer = await http.post("/v1/completions", json={"model": "tiny", "prompt": "One", "max_tokens": 1} | sent)
    assert answer.status_code == 200
    assert "x-fovea-ignored-fields" not in answer.headers


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": 1, "echo": True}, "logprobs"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": ["x"] * 17}, "prompt"),
        ({"prompt": ""}, "prompt"),
    ],
    ids=["empty", "many logprobs", "echoed logprobs", "no such token", "suffix", "too many", "no tokens"],
)
async def test_bad_completions_are_refused(http: httpx2.AsyncClient, fields: dict[str, Any], param: str) -> None:
    answer = await http.post("/v1/completions", json={"model": "tiny"} | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


# /v1/messages


def message_body(*blocks: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 6, "messages": [{"role": "user", "content": list(blocks)}]} | fields


def anthropic_image(data: bytes) -> dict[str, Any]:
    encoded = data_url(data).partition(",")[2]
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded}}


QUESTION = {"type": "text", "text": "What?"}


async def test_message_is_the_chat_answer(http: httpx2.AsyncClient) -> None:
    image = picture()
    answer = await chat(http, image_part(image), "What?")
    message = (await http.post("/v1/messages", json=message_body(anthropic_image(image), QUESTION))).json()
    assert message["content"] == [{"type": "text", "text": answer["choices"][0]["message"]["content"]}]
    assert (message["type"], message["role"], message["stop_reason"]) == ("message", "assistant", "max_tokens")
    usage = message["usage"]
    read = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    assert read == answer["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == answer["usage"]["completion_tokens"]
    count = await http.post("/v1/messages/count_tokens", json=message_body(anthropic_image(image), QUESTION))
    assert count.json() == {"input_tokens": answer["usage"]["prompt_tokens"]}


async def test_system_of_a_message_is_the_system_message(http: httpx2.AsyncClient) -> None:
    for system in ("Be brief.", [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]):
        message = (await http.post("/v1/messages", json=message_body(QUESTION, system=system))).json()
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
        answer = (await http.post(CHAT, json={"model": "tiny", "max_tokens": 6, "messages": messages})).json()
        assert message["content"][0]["text"] == answer["choices"][0]["message"]["content"]


async def test_streamed_message_is_the_whole_one_in_events(http: httpx2.AsyncClient) -> None:
    request = message_body(anthropic_image(picture()), QUESTION)
    whole = (await http.post("/v1/messages", json=request)).json()
    answer = await http.post("/v1/messages", json=request | {"stream": True})
    events = events_of(answer.text)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert answer.text.count("event: ") == len(events)
    assert "".join(event["delta"]["text"] for event in events[2:-3]) == whole["content"][0]["text"]
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


async def test_stop_sequence_is_named(serve: Callable[..., Service]) -> None:
    service = serve()
    service.say("one two three")
    message = (await service.http.post("/v1/messages", json=message_body(QUESTION, stop_sequences=["x", "two"]))).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "two")
    assert message["content"][0]["text"] == "one "


@pytest.mark.parametrize(
    ("request_body", "status", "words"),
    [
        ({"model": "tiny", "messages": []}, 400, "max_tokens"),
        (message_body(QUESTION, model="other"), 404, "Could not find"),
        (message_body({"type": "image", "source": {"type": "file"}}), 400, "messages[0].content[0].source"),
        (message_body({"type": "document"}), 400, "document"),
        (message_body(QUESTION, thinking={"type": "enabled", "budget_tokens": 1024}), 400, "thinking"),
        (message_body(*[anthropic_image(picture())] * 17), 400, "17 images"),
    ],
    ids=["no max_tokens", "model", "source", "block", "thinking", "too many images"],
)
async def test_bad_messages_are_refused_in_the_words_of_their_api(
    http: httpx2.AsyncClient, request_body: dict[str, Any], status: int, words: str
) -> None:
    answer = await http.post("/v1/messages", json=request_body)
    assert answer.status_code == status
    assert answer.json()["type"] == "error"
    assert words in answer.json()["error"]["message"]


# /v1/responses


async def test_response_is_the_chat_answer(http: httpx2.AsyncClient, sdk: openai.AsyncOpenAI) -> None:
    image = picture()
    messages = [{"role": "system", "content": "Be brief."}, *body(image_part(image), "What?")["messages"]]
    answer = (await http.post(CHAT, json={"model": "tiny", "max_tokens": 6, "messages": messages})).json()
    content = [{"type": "input_image", "image_url": data_url(image), "detail": "auto"}]
    content.append({"type": "input_text", "text": "What?"})
    response = await sdk.responses.create(
        model="tiny", instructions="Be brief.", input=[{"role": "user", "content": content}], max_output_tokens=6
    )
    assert response.output_text == answer["choices"][0]["message"]["content"]
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.total_tokens == answer["usage"]["total_tokens"]


async def test_streamed_response_is_the_whole_one_in_events(sdk: openai.AsyncOpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "input": "How many?", "max_output_tokens": 6}
    whole = await sdk.responses.create(**request)
    events = [event async for event in await sdk.responses.create(**request, stream=True)]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_whole_response_is_completed(serve: Callable[..., Service]) -> None:
    service = serve()
    service.say("done", FinishReason.STOP)
    answer = (await service.http.post("/v1/responses", json={"model": "tiny", "input": "hi"})).json()
    assert (answer["status"], answer["output"][0]["content"][0]["text"]) == ("completed", "done")
    assert answer["output"][0]["status"] == "completed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]}, "input[0].content[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
    ],
    ids=str,
)
async def test_bad_responses_are_refused_by_name(http: httpx2.AsyncClient, fields: dict[str, Any], param: str) -> None:
    answer = await http.post("/v1/responses", json={"model": "tiny", "input": "hi"} | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


# What a request would be


async def test_tokens_are_those_of_the_request(http: httpx2.AsyncClient) -> None:
    request = body(image_part(picture()), "What?")
    counted = (await http.post("/tokenize", json={"messages": request["messages"], "return_token_strs": True})).json()
    usage = (await http.post(CHAT, json=request)).json()["usage"]
    assert counted["count"] == len(counted["tokens"]) == len(counted["token_strs"]) == usage["prompt_tokens"]


@pytest.mark.parametrize("text", ["What colour is the circle?", "图中有几个图形？ 🎈", "", " \n\t"])
async def test_text_survives_tokenize_and_detokenize(http: httpx2.AsyncClient, text: str) -> None:
    tokens = (await http.post("/tokenize", json={"prompt": text})).json()["tokens"]
    assert (await http.post("/detokenize", json={"tokens": tokens})).json() == {"prompt": text}


async def test_plan_says_what_the_request_then_does(http: httpx2.AsyncClient) -> None:
    request = body(image_part(picture()), "What?")
    cold = (await http.post("/v1/plan", json=request)).json()
    assert (cold["images"][0]["source"], cold["images"][0]["predicted_ms"]) == ("encoder", None)
    assert cold["predicted_time_to_first_token_ms"] is None
    usage = (await http.post(CHAT, json=request)).json()["usage"]
    assert (cold["prompt_tokens"], cold["image_tokens"]) == (
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["image_tokens"],
    )
    assert cold["images"][0] | {"source": "encoder"} == {
        "id": usage["images"][0]["id"],
        "tokens": usage["images"][0]["tokens"],
        "grid": [1, 4, 6],
        "tiers": [],
        "source": "encoder",
        "predicted_ms": None,
    }
    warm = (await http.post("/v1/plan", json=request)).json()
    assert (warm["images"][0]["source"], warm["images"][0]["tiers"]) == ("local", ["local"])
    assert (await http.post(CHAT, json=request)).json()["usage"]["images"][0]["source"] == "local"
    known = (await http.post("/v1/plan", json=body(image_part(picture(seed=1)), "What?"))).json()
    assert known["predicted_time_to_first_token_ms"] >= known["images"][0]["predicted_ms"] > 0


async def test_plan_encodes_nothing(serve: Callable[..., Service]) -> None:
    service = serve()
    answer = await service.http.post("/v1/plan", json=body(image_part(picture())))
    assert answer.status_code == 200
    assert service.encoder.num_encoded == 0


# How it is


async def test_ready_names_every_tier_and_the_one_that_is_missing(
    serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    ready = (await service.http.get("/health/ready")).json()
    assert {name: tier["status"] for name, tier in ready["tiers"].items()} == dict.fromkeys(
        ("decoder", "encoder", "cache", "media"), "ok"
    )

    async def lost() -> None:
        raise UnavailableError("no encoder replica")

    monkeypatch.setattr(service.encoder, "describe", lost)
    answer = await service.http.get("/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert answer.json()["tiers"]["encoder"]["status"] == "unavailable"
    service.llm.engine.shutdown()
    answer = await service.http.get("/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")


async def test_metrics_are_prometheus_text(http: httpx2.AsyncClient) -> None:
    await http.post(CHAT, json=body("hi"))
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert float(lines['fovea_requests_total{status="200"}']) >= 1


async def test_model_card_has_what_clients_read(http: httpx2.AsyncClient) -> None:
    card = (await http.get("/v1/models")).json()["data"][0]
    assert {"id", "object", "created", "owned_by", "max_model_len"} <= card.keys()
    assert (await http.get("/v1/models/none")).status_code == 404
    assert json.dumps((await http.get("/version")).json())
