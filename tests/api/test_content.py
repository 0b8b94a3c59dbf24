"""Content parts of chat completions: the forms that clients of OpenAI, vLLM and SGLang send."""

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from common.identity import mm_hash
from llm_service.config import ApiConfig, FetchConfig
from llm_service.fetch import ImageFetcher
from tests.api.conftest import Service
from tests.conftest import picture
from tests.services import body, data_url, image_part

URL = "/v1/chat/completions"


async def ask(http: httpx2.AsyncClient, *parts: Any, **fields: Any) -> dict[str, Any]:
    answer = await http.post(URL, json=body(*parts, **fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_all_forms_of_one_image_are_one_image(http: httpx2.AsyncClient) -> None:
    url = data_url(picture())
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": url, "detail": "default"}},
        {"type": "image_url", "image_url": {"url": url.replace("data:", "DATA:")}},
        {"type": "image_url", "image_url": {"url": url}, "cache_control": {"type": "ephemeral"}},
        {"type": "image_url", "image_url": {"url": url}, "prompt_cache_breakpoint": {"mode": "explicit"}},
        {"image_url": url},
    ]
    answers = [await ask(http, part, "What?") for part in parts]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert len({answer["usage"]["images"][0]["id"] for answer in answers}) == 1


async def test_images_may_stand_in_any_message(http: httpx2.AsyncClient) -> None:
    part = image_part(picture())
    messages = [
        {"role": "system", "content": [part, {"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]},
        {"role": "tool", "tool_call_id": "x", "content": [part]},
        {"role": "user", "content": [part]},
    ]
    answer = await http.post(URL, json={"model": "tiny", "messages": messages, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["usage"]["images"]) == 3


async def test_ten_images_in_one_message(http: httpx2.AsyncClient) -> None:
    answer = await ask(http, *(image_part(picture(56, 56, seed)) for seed in range(10)), "What happens?")
    assert len({image["id"] for image in answer["usage"]["images"]}) == 10


async def test_uuid_alone_is_enough_once_its_bytes_were_sent(http: httpx2.AsyncClient) -> None:
    sent = image_part(picture()) | {"uuid": "photo-1"}
    first = await ask(http, sent, "What?")
    for part in ({"type": "image_url", "image_url": {}}, {"type": "image_url", "image_url": None}):
        again = await ask(http, part | {"uuid": "photo-1"}, "What?")
        assert again["choices"] == first["choices"]
    unknown = await http.post(URL, json=body({"type": "image_url", "image_url": {}, "uuid": "photo-2"}))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, "unknown_uuid")


async def test_uuid_of_other_bytes_is_a_conflict_and_is_never_answered_with_them(http: httpx2.AsyncClient) -> None:
    await ask(http, image_part(picture(seed=1)) | {"uuid": "photo"}, "What?")
    answer = await http.post(URL, json=body(image_part(picture(seed=2)) | {"uuid": "photo"}, "What?"))
    assert (answer.status_code, answer.json()["error"]["param"]) == (409, "messages[0].content[0].uuid")


@pytest.mark.parametrize("form", ["{blake3}", "blake3:{blake3}", "sha256:{sha256}"])
async def test_content_hash_is_checked(http: httpx2.AsyncClient, form: str) -> None:
    def hash_of(data: bytes) -> str:
        return form.format(blake3=mm_hash(data), sha256=hashlib.sha256(data).hexdigest())

    one, other = picture(seed=1), picture(seed=2)
    await ask(http, image_part(one, content_hash=hash_of(one)) | {"uuid": "one"}, "What?")
    named = {"type": "image_url", "image_url": {"content_hash": hash_of(one)}, "uuid": "one"}
    await ask(http, named, "What?")
    for wrong in (
        image_part(one, content_hash=hash_of(other)),
        named | {"image_url": {"content_hash": hash_of(other)}},
    ):
        answer = await http.post(URL, json=body(wrong, "What?"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_hash_mismatch")


async def test_content_hash_alone_names_an_image_that_is_kept(http: httpx2.AsyncClient) -> None:
    image = picture()
    part = {"type": "image_url", "image_url": {"content_hash": mm_hash(image)}}
    assert (await http.post(URL, json=body(part, "What?"))).status_code == 404
    await http.post("/v1/media", content=image)
    named, sent = [await ask(http, each, "What?") for each in (part, image_part(image))]
    assert named["choices"] == sent["choices"]


async def test_image_or_frame_behind_a_url_is_answered_as_its_bytes(serve: Callable[..., Service]) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.215.14"]

    service = serve(ApiConfig(fetch=FetchConfig(allowed_hosts=("example.org",))))
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, content=picture()))
    service.llm.media._fetcher = ImageFetcher(service.llm.api.fetch, 2**20, resolve, transport)
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    assert (await ask(service.http, part, "What?"))["choices"] == (
        await ask(service.http, image_part(picture()), "What?")
    )["choices"]
    clips = [{"type": "video", "video": [url, url]} for url in ("https://example.org/a.png", data_url(picture()))]
    fetched, sent = [(await ask(service.http, clip, "What?"))["usage"]["images"][0] for clip in clips]
    assert (fetched["id"], fetched["frames"], sent["cached_grids"]) == (sent["id"], 2, 1)
    refused = await service.http.post(
        URL, json=body({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}})
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages[0].content[0].image_url.url")


async def test_frames_behind_urls_are_fetched_once_a_few_at_once_and_only_those_that_are_taken(
    serve: Callable[..., Service],
) -> None:
    service = serve(ApiConfig(fetch=FetchConfig(allowed_hosts=("example.org",))))
    held = service.llm.admission.held["bytes"]
    fetched: list[str] = []
    running: list[str] = []
    most: list[int] = []

    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.215.14"]

    async def answer(request: httpx2.Request) -> httpx2.Response:
        fetched.append(request.url.path)
        running.append(request.url.path)
        most.append(len(running))
        await asyncio.sleep(0.01)
        running.remove(request.url.path)
        return httpx2.Response(200, content=picture(seed=int(request.url.path[1:])))

    service.llm.media._fetcher = ImageFetcher(service.llm.api.fetch, 2**20, resolve, httpx2.MockTransport(answer))
    clip = {"type": "video", "video": [f"https://example.org/{index}" for index in range(100)], "num_frames": 20}
    question = {"type": "predicate", "name": "moves", "instructions": "Does it move?"}
    message = {"type": "message", "role": "user", "content": [clip]}
    questions = [question | {"name": f"moves-{index}"} for index in range(4)]
    decision = {"model": "tiny", "input": [message], "questions": questions}
    answered = (await service.http.post("/v1/decisions", json=decision)).raise_for_status()
    assert sorted(fetched) == sorted(f"/{index}" for index in range(0, 100, 5))
    assert max(most) == 8
    assert held.amount == 0
    held.limit = len(answered.request.content) + 3 * len(picture())
    held.take(1)
    fetched.clear()
    refused = await service.http.post("/v1/decisions", json=decision)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert 0 < len(fetched) < 20 and held.amount == 1


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": data_url(picture())}, "image_url"),
        ({"type": "image_url", "image_url": {}}, "image_url"),
        ({"type": "image_url", "image_url": {"url": 1}}, "image_url"),
        ({"type": "image_url", "image_url": {"url": data_url(picture()), "detail": "ultra"}}, "image_url.detail"),
        ({"type": "image_url", "image_url": {"url": data_url(picture())}, "uuid": "a b"}, "uuid"),
        ({"type": "image_url", "image_url": {"url": data_url(picture())}, "uuid": "x" * 129}, "uuid"),
        (
            {"type": "image_url", "image_url": {"url": data_url(picture()), "content_hash": "x"}},
            "image_url.content_hash",
        ),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "type"),
        ({"type": "video_url", "video_url": {"url": "x"}}, "video_url.url"),
        ({"type": "file", "file": {"file_id": "x"}}, "type"),
        ({"type": "image_embeds", "image_embeds": "x"}, "type"),
        ({"type": "text", "text": None}, "text"),
        ({}, "type"),
    ],
)
async def test_bad_parts_are_refused_by_name(http: httpx2.AsyncClient, part: dict[str, Any], param: str) -> None:
    answer = await http.post(URL, json=body("a", part))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"messages[0].content[1].{param}")
