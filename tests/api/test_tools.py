"""Tools over HTTP: what the model is told, what it says, and how each API carries it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from llm_service.engine.request import FinishReason
from tests.api.conftest import Service, events_of
from tests.conftest import picture
from tests.services import body, image_part

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
URL = "/v1/chat/completions"


@pytest.fixture
def service(serve: Callable[..., Service], tool_checkpoint: Path) -> Service:
    return serve(checkpoint=tool_checkpoint)


@pytest.fixture
def client(service: Service) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=service.http, max_retries=0)


async def test_call_of_a_tool_is_answered_whole(service: Service, client: openai.AsyncOpenAI) -> None:
    service.say(f"I will look.\n{CALL}")
    answer = await client.chat.completions.create(**body("Weather?", tools=[TOOL]))
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I will look.")
    call = choice.message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}


async def test_streamed_calls_are_those_of_the_whole_answer(service: Service, client: openai.AsyncOpenAI) -> None:
    service.say(f"Both.\n{CALL}\n{CALL}")
    request = body("Weather?", tools=[TOOL])
    whole = (await client.chat.completions.create(**request)).choices[0].message
    calls: dict[int, dict[str, str]] = {}
    finishes = []
    async for chunk in await client.chat.completions.create(**request, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.id:
                assert call.index not in calls
                calls[call.index] = {"name": call.function.name, "arguments": ""}
            calls[call.index]["arguments"] += call.function.arguments
        finishes.append(chunk.choices[0].finish_reason)
    assert list(calls.values()) == [call.function.model_dump() for call in whole.tool_calls]
    assert len(calls) == 2
    assert [reason for reason in finishes if reason] == ["tool_calls"]


async def test_without_parallel_calls_the_first_one_ends_the_answer(
    service: Service, client: openai.AsyncOpenAI
) -> None:
    engine = service.say(CALL + CALL)
    answer = await client.chat.completions.create(**body("Weather?", tools=[TOOL], parallel_tool_calls=False))
    assert len(answer.choices[0].message.tool_calls) == 1
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage.completion_tokens < len(engine.token_ids)
    assert engine.num_running == 0


async def test_tool_choice_none_tells_the_model_of_no_tools(service: Service, client: openai.AsyncOpenAI) -> None:
    service.say(CALL)
    answer = await client.chat.completions.create(**body("Weather?", tools=[TOOL], tool_choice="none"))
    plain = await client.chat.completions.create(**body("Weather?"))
    assert answer.choices[0].message.content == CALL
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens


async def test_the_template_is_given_tools_calls_and_results_with_their_images(service: Service) -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}, image_part(picture())]},
    ]
    answer = await service.http.post("/tokenize", json={"messages": messages, "tools": [TOOL]})
    prompt = (await service.http.post("/detokenize", json={"tokens": answer.json()["tokens"]})).json()["prompt"]
    assert '"name": "get_weather"' in prompt and "The weather" in prompt
    assert CALL in prompt
    assert "<tool_response>\nsunny<|vision_start|>" in prompt


async def test_a_call_that_is_cut_is_finished_by_length(service: Service) -> None:
    service.say(CALL[:-30], FinishReason.LENGTH)
    answer = await service.http.post(URL, json=body("Weather?", tools=[TOOL], stream=True))
    last = events_of(answer.text)[-2]
    assert last["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "not a name"}}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL | {"function": {"name": f"f{index}"}} for index in range(129)]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": "y" * 70_000}}}]},
            "tools[0]",
        ),
    ],
    ids=["name", "twice", "too many", "type", "schema"],
)
async def test_bad_tools_are_refused_by_name(service: Service, fields: dict[str, Any], param: str) -> None:
    answer = await service.http.post(URL, json=body("Weather?", **fields))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_model_that_knows_no_tools_refuses_them(serve: Callable[..., Service]) -> None:
    answer = await serve().http.post(URL, json=body("Weather?", tools=[TOOL]))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


async def test_anthropic_messages_carry_the_same_call(service: Service) -> None:
    service.say(f"I will look.\n{CALL}")
    request = {
        "model": "tiny",
        "max_tokens": 50,
        "tools": [{"name": "get_weather", "input_schema": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "get_weather", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "sunny"}]},
        ],
    }
    answer = (await service.http.post("/v1/messages", json=request)).json()
    assert [block["type"] for block in answer["content"]] == ["text", "tool_use"]
    assert (answer["stop_reason"], answer["content"][1]["input"]) == ("tool_use", {"city": "Paris"})
    events = events_of((await service.http.post("/v1/messages", json=request | {"stream": True})).text)
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["text", "tool_use"]
    pieces = [event["delta"].get("partial_json", "") for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == {"city": "Paris"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_responses_carry_the_same_call(service: Service, client: openai.AsyncOpenAI) -> None:
    service.say(f"I will look.\n{CALL}")
    request: dict[str, Any] = {
        "model": "tiny",
        "input": [
            {"role": "user", "content": "Weather?"},
            {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "sunny"},
        ],
        "tools": [{"type": "function", "name": "get_weather", "parameters": {}, "strict": False}],
    }
    answer = await client.responses.create(**request)
    assert [item.type for item in answer.output] == ["message", "function_call"]
    assert json.loads(answer.output[1].arguments) == {"city": "Paris"}
    events = [event async for event in await client.responses.create(**request, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [json.loads(event.arguments) for event in done] == [{"city": "Paris"}]
    assert [item.model_dump(exclude={"id", "call_id"}) for item in events[-1].response.output] == [
        item.model_dump(exclude={"id", "call_id"}) for item in answer.output
    ]


# Calls that have to be made: the model writes nothing else


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
async def test_required_call_is_one_of_the_tools_with_arguments_of_its_schema(
    client: openai.AsyncOpenAI, choice: Any
) -> None:
    """A model with random weights would never call a tool by itself."""
    schema = {"type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"]}
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    tool, other = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name, parameters in (("get_weather", schema | {"additionalProperties": False}), ("look", nothing))
    ]
    request = body("Weather?", tools=[tool, other], tool_choice=choice, parallel_tool_calls=False, max_tokens=200)
    answer = await client.chat.completions.create(**request)
    [call] = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert not answer.choices[0].message.content
    arguments = json.loads(call.function.arguments)
    assert arguments in ([{"days": 1}, {"days": 2}] if call.function.name == "get_weather" else [{}])
    if choice != "required":
        assert call.function.name == "get_weather"


async def test_anthropic_any_tool_is_a_call(service: Service) -> None:
    request = {
        "model": "tiny",
        "max_tokens": 200,
        "tools": [
            {"name": "look", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
        ],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "messages": [{"role": "user", "content": "Look."}],
    }
    answer = (await service.http.post("/v1/messages", json=request)).json()
    assert [(block["type"], block["name"], block["input"]) for block in answer["content"]] == [("tool_use", "look", {})]


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
        {"tools": [TOOL], "tool_choice": "sometimes"},
    ],
    ids=["no tools", "another tool", "two forms", "no such choice"],
)
async def test_bad_tool_choice_is_refused_by_name(service: Service, fields: dict[str, Any]) -> None:
    answer = await service.http.post(URL, json=body("Weather?", **fields))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("tool_choice")
