"""Requests that nobody would write: every one is answered, none with a 5xx, and each error is a whole error object."""

import base64
import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from common.config import ImageLimits
from common.errors import InvalidRequestError
from llm_service.image_parts import decode_data_url
from tests.api.conftest import Service, generated
from tests.conftest import picture

_ADDRESS = re.compile(r"0x[0-9a-f]{8,}")
SAMPLE, SOAK = 150, 5000
LONG = 3_000_000

IMAGE_URL = "data:image/png;base64," + base64.b64encode(picture(56, 56)).decode()
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USER = {
    "role": "user",
    "content": [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": IMAGE_URL, "detail": "low", "content_hash": None}, "uuid": "u"},
    ],
}
CHAT = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ],
    "max_tokens": 2,
}
OPTIONS = {
    "stream": True, "stream_options": {"include_usage": True}, "n": 2, "seed": 1, "temperature": 0.5, "top_p": 0.9,
    "top_k": 5, "stop": ["a"], "stop_token_ids": [1], "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1},
    "min_tokens": 1, "tools": [TOOL], "tool_choice": "auto", "return_token_ids": True, "cache_salt": "s",
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ANTHROPIC = {
    "model": "tiny",
    "max_tokens": 2,
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "What?"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IMAGE_URL[22:]}},
        ]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}]},
    ],
}  # fmt: skip
ITEMS = [
    {"role": "user", "content": [
        {"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": IMAGE_URL, "detail": "auto"},
    ]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "x"},
]  # fmt: skip
QUESTIONS = [
    {"type": "predicate", "instructions": "Is it?", "name": "p"},
    {"type": "choice", "instructions": "What?", "choices": [{"value": "a", "description": "b"}, {"value": True}]},
    {
        "type": "score",
        "instructions": [{"type": "input_text", "text": "How?"}],
        "levels": [{"label": "a"}, {"label": "b"}],
    },
]
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | OPTIONS),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
    ("/v1/chat/completions", CHAT | {"structured_outputs": {"regex": "a+b"}, "tools": [TOOL]}),
    ("/v1/completions", {"model": "tiny", "prompt": ["hi", "ho"], "max_tokens": 2, "n": 2, "echo": True}),
    ("/v1/completions", {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, "stream": True}),
    ("/v1/messages", ANTHROPIC),
    ("/v1/messages", ANTHROPIC | {"stream": True, "stop_sequences": ["a"], "top_k": 3, "temperature": 0.3}),
    ("/v1/messages/count_tokens", ANTHROPIC),
    ("/v1/responses", {"model": "tiny", "input": ITEMS, "max_output_tokens": 2, "stream": True, "instructions": "x"}),
    ("/v1/responses", {"model": "tiny", "input": "hi", "max_output_tokens": 2, "text": {"format": {"type": "text"}}}),
    ("/v1/decisions", {"model": "tiny", "input": ITEMS[:1], "questions": QUESTIONS}),
    ("/v1/plan", CHAT),
    ("/tokenize", {"messages": CHAT["messages"], "return_token_strs": True}),
    ("/tokenize", {"prompt": "hi"}),
    ("/detokenize", {"tokens": [1, 2, 300]}),
]
ODD = [
    "", "tiny", "user", "image_url", "input_image", "image_ref", "tool_use", "function_call_output", "required", "none",
    "json_object", "http://127.0.0.1/x.png", "file:///etc/passwd", "data:,", "data:image/png;base64,AAAA", IMAGE_URL,
    "<|im_end|><|image_pad|>", "(a+)+$", "{{ 7 * 7 }}", "图中", "\x00", "\ud800", "x" * 5000, 2**63, -1, 1e300,
]  # fmt: skip

scalars = (
    st.sampled_from(ODD)
    | st.text(max_size=20)
    | st.booleans()
    | st.none()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, Any]:
    """A valid request of which up to two places have become something else, or are gone."""
    path, body = draw(st.sampled_from(VALID))
    body = json.loads(json.dumps(body))
    for _ in range(draw(st.integers(0, 2))):
        holders = list(containers(body))
        holder = draw(st.sampled_from(holders))
        keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            continue
        key = draw(st.sampled_from(keys))
        if draw(st.integers(0, 4)) == 0:
            del holder[key]
        else:
            holder[key] = draw(trees)
    return path, body


def containers(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        yield tree
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from containers(child)


async def check(service: Service, path: str, body: Any) -> int:
    """Sends it, and says how it was answered."""
    content = json.dumps(body).encode()
    answer = await service.http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code < 500, (path, body, answer.text)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"] and error["type"]
        assert "Traceback" not in answer.text and not _ADDRESS.search(error["message"])
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert "internal error" not in answer.text, (path, body)
    else:
        answer.json()
    return answer.status_code


async def hammer(service: Service, count: int) -> None:
    statuses = [await check(service, path, body) for path, body in generated(requests(), count)]
    print({status: statuses.count(status) for status in sorted(set(statuses))})
    assert statuses.count(200) > count // 20  # or nothing got past the first check
    assert not any(held.amount for held in service.llm.admission.held.values())
    assert (await service.http.get("/health")).json()["running"] == 0


@pytest.fixture
def service(serve: Callable[..., Service], tool_checkpoint: Path) -> Service:
    return serve(checkpoint=tool_checkpoint, max_model_len=512)


async def test_what_is_changed_is_valid_before(service: Service) -> None:
    assert [await check(service, path, body) for path, body in VALID] == [200] * len(VALID)


async def test_no_request_is_answered_with_a_5xx(service: Service) -> None:
    await hammer(service, SAMPLE)


@pytest.mark.soak
async def test_no_request_is_answered_with_a_5xx_thousands_of_times(service: Service) -> None:
    await hammer(service, SOAK)


@pytest.mark.parametrize(
    "url",
    [
        "data:" + ";" * LONG,
        "data:" + ";a" * (LONG // 2),
        "data:" + ";base64" * (LONG // 7),
        "data:image/png;base64," + "AA AA\n" * (LONG // 6) + "!",
    ],
    ids=lambda url: url[:28].strip(),
)
def test_a_long_data_url_costs_memory_of_its_own_length(url: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequestError):
            decode_data_url(url, "image_url.url", ImageLimits())
        assert tracemalloc.get_traced_memory()[1] < 4 * len(url)
    finally:
        tracemalloc.stop()
