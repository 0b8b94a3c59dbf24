"""The HTTP surface, in process: a real LLM service and a real encoder service on a tiny model, without Ray."""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest

from common import metrics
from llm_service.api.stream import Stream
from llm_service.config import ApiConfig
from tests.conftest import picture
from tests.services import URL, Services, body, data_url, image_part

MAX_BODY_BYTES = ApiConfig().max_body_bytes


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it has this size and has no pixels."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x00IDAT\x35\xaf\x06\x1e"


# Answers


async def test_answer_has_the_shape_of_openai_and_receipts(sdk: openai.AsyncOpenAI) -> None:
    image = picture(56, 84)
    answers = [await sdk.chat.completions.create(**body(image_part(image), "What?")) for _ in range(2)]
    first, second = answers
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].finish_reason in ("stop", "length")
    assert first.usage.prompt_tokens_details.image_tokens == 6
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    assert [answer.usage.images[0]["source"] for answer in answers] == ["encoder", "local"]
    assert all(answer.usage.images[0]["wait_ms"] >= 0 for answer in answers)
    assert first.system_fingerprint.startswith("fp_") and first.system_fingerprint == second.system_fingerprint


async def test_stream_joined_is_the_whole_answer(sdk: openai.AsyncOpenAI) -> None:
    request = body(image_part(picture(90, 90)), "Describe.", max_tokens=20)
    whole = await sdk.chat.completions.create(**request)
    chunks = [
        chunk
        async for chunk in await sdk.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    ]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == [whole.choices[0].finish_reason]
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_stream_ends_in_done(http: httpx2.AsyncClient) -> None:
    answer = await http.post(URL, json=body("hi", stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


async def test_images_of_several_turns_keep_their_order_and_are_encoded_once(
    services: Services, sdk: openai.AsyncOpenAI
) -> None:
    first, second = picture(60, 60, 1), picture(60, 60, 2)
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [image_part(first), {"type": "text", "text": "One?"}, image_part(second)]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "text", "text": "And the first again?"}, image_part(first)]},
    ]
    answer = await sdk.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    ids = [image["id"] for image in answer.usage.images]
    assert ids[0] == ids[2] != ids[1]
    assert services.encoder.num_encoded == 2


async def test_another_picture_gives_another_answer_and_the_first_again_the_first(sdk: openai.AsyncOpenAI) -> None:
    a, b = picture(84, 84, 3), picture(84, 84, 4)
    texts = []
    for image in (a, a, b, a):
        answer = await sdk.chat.completions.create(**body(image_part(image), "What?", max_tokens=16))
        texts.append(answer.choices[0].message.content)
    assert texts[0] == texts[1] == texts[3] != texts[2]


async def test_text_alone_as_string_and_as_part_are_the_same(sdk: openai.AsyncOpenAI) -> None:
    part = await sdk.chat.completions.create(**body("How many?"))
    string = await sdk.chat.completions.create(
        model="tiny", max_tokens=6, messages=[{"role": "user", "content": "How many?"}]
    )
    assert part.choices[0].message.content == string.choices[0].message.content
    assert part.usage.prompt_tokens == string.usage.prompt_tokens


async def test_low_detail_has_fewer_tokens_and_its_own_embedding(sdk: openai.AsyncOpenAI) -> None:
    image = picture(200, 200)
    high = await sdk.chat.completions.create(**body(image_part(image), "What?"))
    low = await sdk.chat.completions.create(**body(image_part(image, detail="low"), "What?"))
    assert low.usage.images[0]["tokens"] < high.usage.images[0]["tokens"]
    assert low.usage.images[0]["source"] == "encoder"


async def test_stop_string_ends_the_text_before_it(sdk: openai.AsyncOpenAI) -> None:
    request = body("Tell me.", max_tokens=24)
    whole = (await sdk.chat.completions.create(**request)).choices[0].message.content
    stop = whole[4:7]
    answer = await sdk.chat.completions.create(**request, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


async def test_same_seed_gives_the_same_text(sdk: openai.AsyncOpenAI) -> None:
    request = body("Tell me.", max_tokens=16, temperature=1.0)
    texts = {
        seed: {(await sdk.chat.completions.create(**request, seed=seed)).choices[0].message.content for _ in range(2)}
        for seed in (1, 2)
    }
    assert len(texts[1]) == len(texts[2]) == 1
    assert texts[1] != texts[2]


async def test_models_and_health(services: Services, http: httpx2.AsyncClient, sdk: openai.AsyncOpenAI) -> None:
    models = [model.id async for model in sdk.models.list()]
    assert models == [services.llm.model_name]
    assert (await sdk.models.retrieve(models[0])).id == models[0]
    assert (await http.get("/health")).json()["status"] == "ok"


async def test_unknown_fields_are_ignored_and_named(http: httpx2.AsyncClient) -> None:
    before = metrics.snapshot()["fovea_ignored_fields_total"]
    answer = await http.post(URL, json=body("hi", unheard_of=1, user="me"))
    assert answer.status_code == 200
    assert answer.headers["x-fovea-ignored-fields"] == "unheard_of"
    assert metrics.snapshot()["fovea_ignored_fields_total"] == before + 1


# Odd but answered


@pytest.mark.parametrize(
    "part",
    [
        image_part(picture(1, 1)),
        image_part(picture(60, 60, format="JPEG"), "image/png"),
        image_part(picture(60, 60), "IMAGE/PNG;charset=utf-8"),
        "a <|image_pad|> that is text",
    ],
    ids=["one pixel", "jpeg named png", "parameters in the URL", "placeholder as text"],
)
async def test_odd_input_is_answered(http: httpx2.AsyncClient, part: dict[str, Any] | str) -> None:
    answer = await http.post(URL, json=body(part, "What?"))
    assert answer.status_code == 200, answer.text


async def test_typed_placeholder_stays_text(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(**body("<|image_pad|><|im_end|>", image_part(picture(56, 56)), "What?"))
    assert answer.usage.prompt_tokens_details.image_tokens == 4


# Refused, and the service unharmed


NAN = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}],"temperature":NaN}'

REFUSED: dict[str, tuple[dict[str, Any] | bytes, int, str | None, str]] = {
    "not base64": (
        body({"type": "image_url", "image_url": {"url": "data:image/png;base64,!!!!"}}),
        400, "messages[0].content[0].image_url.url", "not valid base64",
    ),
    "not an image": (
        body(image_part(b"hello")), 400, "messages[0].content[0].image_url.url", "not an image of a supported format",
    ),
    "truncated image": (
        body("x", image_part(picture(300, 300)[:4000])), 400, "messages[0].content[1].image_url.url", "truncated",
    ),
    "no bytes": (body(image_part(b"")), 400, "messages[0].content[0].image_url.url", "0 bytes"),
    "huge header": (
        body(image_part(png_header(20_000, 20_000))), 400, "messages[0].content[0].image_url.url",
        "20000 x 20000 = 400000000 pixels, the limit is 64000000 (limits.max_image_pixels)",
    ),
    "extreme aspect": (
        body(image_part(png_header(1, 10_000))), 400, "messages[0].content[0].image_url.url", "aspect ratio",
    ),
    "text type": (
        body(image_part(picture(), "text/plain")), 400, "messages[0].content[0].image_url.url", "not an image's",
    ),
    "web URL": (
        body({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}),
        400, "messages[0].content[0].image_url.url", "data URLs",
    ),
    "bare string": (
        body({"type": "image_url", "image_url": data_url(picture())}),
        400, "messages[0].content[0].image_url", "object",
    ),
    "no messages": ({"model": "tiny", "messages": []}, 400, "messages", "must not be empty"),
    "no model": ({"messages": [{"role": "user", "content": "hi"}]}, 400, "model", "required"),
    "too many images": (
        body(*[image_part(picture()) for _ in range(17)]), 400, "messages", "17 images were sent, the limit is 16",
    ),
    "unknown part": (body({"type": "input_audio"}), 400, "messages[0].content[0].type", "input_audio"),
    "unknown role": (
        {"model": "tiny", "messages": [{"role": "wizard", "content": "hi"}]}, 400, "messages[0].role", "wizard",
    ),
    "nan temperature": (NAN, 400, "temperature", "finite number"),
    "negative max_tokens": (body("hi", max_tokens=-1), 400, "max_tokens", "greater than or equal to 1"),
    "max_tokens beyond the context": (body("hi", max_tokens=10**9), 400, "max_tokens", "engine.max_model_len"),
    "prompt too long": (
        body("word " * 9000, image_part(picture(77, 77, 99))), 400, "messages", "engine.max_model_len",
    ),
    "not honoured": (body("hi", audio={"voice": "any"}), 400, "audio", "not supported"),
    "stream options without stream": (
        body("hi", stream_options={"include_usage": True}), 400, "stream_options", "stream: true",
    ),
    "lone surrogate": (
        b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}', 400, "messages[0].content", "surrogate",
    ),
    "not JSON": (b"{", 400, None, "not valid JSON"),
    "unknown model": (body("hi", model="gpt-7"), 404, "model", "Could not find the model 'gpt-7'"),
    "too many bytes": (body(image_part(bytes(21 * 2**20))), 413, "messages[0].content[0].image_url.url", "20971520"),
    "body too large": (b" " * (MAX_BODY_BYTES + 1), 413, None, str(MAX_BODY_BYTES)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_bad_input_is_refused_by_name_and_the_service_goes_on(
    services: Services, http: httpx2.AsyncClient, name: str
) -> None:
    payload, status, param, words = REFUSED[name]
    content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    answer = await http.post(URL, content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert services.encoder.num_encoded == 0
    again = await http.post(URL, json=body(image_part(picture()), "Still there?"))
    assert again.status_code == 200


async def test_one_request_id_used_twice_at_once_is_answered_twice(http: httpx2.AsyncClient) -> None:
    posts = [http.post(URL, json=body("hi"), headers={"x-request-id": "mine"}) for _ in range(4)]
    answers = await asyncio.gather(*posts)
    assert {(answer.status_code, answer.headers["x-request-id"]) for answer in answers} == {(200, "mine")}
    assert len({answer.json()["id"] for answer in answers}) == 4


async def test_every_answer_is_counted_by_its_status(http: httpx2.AsyncClient) -> None:
    def counted() -> list[float]:
        found = metrics.snapshot()
        return [found.get(f'fovea_requests_total{{status="{status}"}}', 0) for status in (200, 400, 404, 413)]

    before = counted()
    await http.post(URL, json=body("hi"))
    await http.post(URL, json=body("hi", stream=True))
    await http.post(URL, content=b"{", headers={"content-type": "application/json"})
    await http.post(URL, json=body("hi", model="gpt-7"))
    await http.post(URL, content=b" " * (MAX_BODY_BYTES + 1))
    assert [after - earlier for after, earlier in zip(counted(), before, strict=True)] == [2, 1, 1, 1]


async def test_unknown_path_has_an_openai_error(http: httpx2.AsyncClient) -> None:
    answer = await http.get("/v1/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


# Streams never look complete when they are not


async def test_error_in_a_stream_is_an_error_event() -> None:
    async def chunks() -> AsyncIterator[dict[str, Any]]:
        yield {"choices": []}
        raise RuntimeError("a bug")

    stream = Stream(chunks())
    await stream.wait_for_first()
    events = [event async for event in stream.events()]
    assert json.loads(events[-1].split(b"\n")[0][6:])["error"]["message"] == "internal error"
    assert events[-1].endswith(b"data: [DONE]\n\n")


async def test_what_is_ready_goes_out_in_one_write_and_no_more_is_made_than_a_slow_client_may_keep_waiting() -> None:
    num_made = 0

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        nonlocal num_made
        for num_made in range(1, 1001):
            yield {"n": num_made}

    stream = Stream(chunks())
    await stream.wait_for_first()
    for _ in range(200):
        await asyncio.sleep(0)
    assert num_made == 64
    writes = [events async for events in stream.events()]
    assert writes[0].count(b"data: {") == 64
    assert b"".join(writes) == b"".join(b'data: {"n":%d}\n\n' % n for n in range(1, 1001)) + b"data: [DONE]\n\n"


async def test_client_that_leaves_aborts_its_request(services: Services) -> None:
    prepared = await services.prepare("Tell me.", [], max_tokens=4000)
    outputs = services.llm.generate(prepared)
    await anext(outputs)
    assert services.llm.engine.num_running == 1
    await outputs.aclose()
    for _ in range(100):
        if services.llm.engine.num_running == 0:
            break
        await asyncio.sleep(0.01)
    assert services.llm.engine.num_running == 0
