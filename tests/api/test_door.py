"""What every request passes first: keys, tenants, limits, time, and what is said to those who have to wait."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from common import metrics
from common.errors import OverloadedError
from llm_service.config import AdmissionConfig, ApiConfig, ApiKey
from tests.api.conftest import Service, events_of
from tests.conftest import picture
from tests.services import body, image_part

URL = "/v1/chat/completions"


def key(name: str, **fields: Any) -> ApiKey:
    return ApiKey(name=name, sha256=hashlib.sha256(f"secret-of-{name}".encode()).hexdigest(), **fields)


def as_caller(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer secret-of-{name}"}


@pytest.fixture
def keyed(serve: Callable[..., Service]) -> Service:
    return serve(ApiConfig(keys=(key("ann", tenant="a"), key("bob", tenant="b"), key("root", admin=True))))


# Keys


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models", "/v1/chat/completions", "/tokenize", "/metrics", "/health/ready", "/docs", "/openapi.json",
        "/v1/media", "/nothing", "//health", "/health/", "/Health", "/health%2f..", "/health;x", "/./health", "//",
        "/v1/../health", "/health/../v1/models",
    ],
)  # fmt: skip
async def test_without_a_key_every_path_but_the_public_ones_is_a_401(keyed: Service, path: str) -> None:
    assert [await raw_status(keyed, method, path) for method in ("GET", "POST", "HEAD")] == [401] * 3


async def test_missing_key_has_the_whole_error_object(keyed: Service) -> None:
    answer = await keyed.http.get("/v1/models")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"


async def test_public_paths_need_no_key(keyed: Service) -> None:
    assert (await keyed.http.get("/health")).status_code == 200
    assert (await keyed.http.get("/")).status_code == 200
    assert (await keyed.http.post("/health")).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "Bearer secret-of-ann"}, 200),
        ({"authorization": "bearer  secret-of-ann"}, 200),
        ({"x-api-key": "secret-of-ann"}, 200),
        ({"authorization": "Basic secret-of-ann"}, 401),
        ({"authorization": "Bearer secret-of-eve"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer " + hashlib.sha256(b"secret-of-ann").hexdigest()}, 401),
        ({"x-api-key": ""}, 401),
    ],
    ids=str,
)
async def test_a_key_is_known_by_its_hash(keyed: Service, headers: dict[str, str], status: int) -> None:
    assert (await keyed.http.get("/v1/models", headers=headers)).status_code == status


async def test_anthropic_form_of_a_missing_key(keyed: Service) -> None:
    answer = await keyed.http.post("/v1/messages", json={})
    assert answer.json() == {
        "type": "error",
        "error": {"type": "authentication_error", "message": answer.json()["error"]["message"]},
    }


async def test_only_an_administrator_may_use_the_cache_api(keyed: Service) -> None:
    answers = [await keyed.http.get("/v1/cache", headers=as_caller(name)) for name in ("ann", "root")]
    assert [answer.status_code for answer in answers] == [403, 200]


# Tenants


async def test_another_tenant_is_served_as_if_it_were_the_first(keyed: Service) -> None:
    """Its embedding, its KV blocks and its media are its own: nothing it sees tells what others did."""
    request = body(image_part(picture(84, 84)), "Describe the picture. " * 30)

    async def usage(name: str) -> dict[str, Any]:
        answer = await keyed.http.post(URL, json=request, headers=as_caller(name))
        return answer.json()["usage"]

    first, again, other = [await usage(name) for name in ("ann", "ann", "bob")]
    assert [used["images"][0]["source"] for used in (first, again, other)] == ["encoder", "local", "encoder"]
    cached = [used["prompt_tokens_details"]["cached_tokens"] for used in (first, again, other)]
    assert cached[0] == cached[2] == 0 < cached[1]


async def test_media_and_aliases_are_their_tenants(keyed: Service) -> None:
    added = await keyed.http.post("/v1/media", content=picture(), headers=as_caller("ann"))
    media_id = added.json()["id"]
    shown = [await keyed.http.get(f"/v1/media/{media_id}", headers=as_caller(name)) for name in ("ann", "bob")]
    assert [answer.status_code for answer in shown] == [200, 404]
    lists = [(await keyed.http.get("/v1/media", headers=as_caller(name))).json()["data"] for name in ("ann", "bob")]
    assert [len(found) for found in lists] == [1, 0]
    named = [
        body({"type": "image_url", "image_url": {"url": image_part(data)["image_url"]["url"]}, "uuid": "one"}, "What?")
        for data in (picture(seed=1), picture(seed=2))
    ]
    for request, name in zip(named, ("ann", "bob"), strict=True):  # the same name for other bytes
        assert (await keyed.http.post(URL, json=request, headers=as_caller(name))).status_code == 200
    conflict = await keyed.http.post(URL, json=named[1], headers=as_caller("ann"))
    assert (conflict.status_code, conflict.headers["x-should-retry"]) == (409, "false")


async def test_cache_salt_keeps_prefixes_apart(serve: Callable[..., Service]) -> None:
    service = serve()
    cached = []
    for salt in ("one", "one", "two"):
        answer = await service.http.post(URL, json=body("Describe the picture. " * 30, cache_salt=salt))
        cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == cached[2] == 0 < cached[1]


# Limits


async def test_a_key_has_its_own_rate_and_says_when_to_come_back(serve: Callable[..., Service]) -> None:
    service = serve(ApiConfig(keys=(key("ann", max_requests_per_minute=2),)))
    answers = [await service.http.post("/tokenize", json={"prompt": "a"}, headers=as_caller("ann")) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 30
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"


async def test_a_key_that_has_enough_running_waits_and_others_do_not(serve: Callable[..., Service]) -> None:
    service = serve(ApiConfig(keys=tuple(key(name, max_concurrent_requests=1) for name in ("ann", "bob"))))
    service.say("slow " * 20, pause_s=0.02)
    running = asyncio.create_task(service.http.post(URL, json=body("hi"), headers=as_caller("ann")))
    await asyncio.sleep(0.1)
    answers = [await service.http.post(URL, json=body("hi"), headers=as_caller(name)) for name in ("ann", "bob")]
    assert [answer.status_code for answer in answers] == [429, 200]
    assert (await running).status_code == 200
    assert (await service.http.post(URL, json=body("hi"), headers=as_caller("ann"))).status_code == 200


@pytest.mark.parametrize(
    ("limit", "request_body", "reason"),
    [
        ({"max_requests": 1}, body("hi"), "requests"),
        ({"max_held_bytes": 400}, body("hi " * 100), "bytes"),
        ({"max_queued_prompt_tokens": 100}, body("word " * 60), "prompt_tokens"),
    ],
    ids=["requests", "bytes", "prompt tokens"],
)
async def test_a_full_service_refuses_and_takes_the_same_request_later(
    serve: Callable[..., Service], limit: dict[str, int], request_body: dict[str, Any], reason: str
) -> None:
    counter = f'fovea_admission_rejections_total{{reason="{reason}"}}'
    before = metrics.snapshot().get(counter, 0.0)
    service = serve(ApiConfig(admission=AdmissionConfig(**limit)))
    slow = service.say("slow " * 20, pause_s=0.3)
    running = asyncio.create_task(service.http.post(URL, json=request_body))
    await asyncio.sleep(0.1)
    refused = await service.http.post(URL, json=request_body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert metrics.snapshot()[counter] == before + 1
    slow.pause_s = 0.0
    assert (await running).status_code == 200
    assert (await service.http.post(URL, json=request_body)).status_code == 200
    assert not any(held.amount for held in service.llm.admission.held.values())


async def test_nobody_is_told_to_come_back_later_than_clients_wait(
    serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(item: object) -> bytes:
        raise OverloadedError("1000 images wait for this encoder", retry_after_s=3600.0)

    service = serve()
    monkeypatch.setattr(service.encoder, "encode", refuse)
    refused = await service.http.post(URL, json=body(image_part(picture()), "What?"))
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_counted(serve: Callable[..., Service], stream: bool) -> None:
    service = serve()
    service.say("slow " * 20, pause_s=0.3)
    before = metrics.snapshot()
    leaving = asyncio.create_task(service.http.post(URL, json=body("hi", stream=stream)))
    await asyncio.sleep(0.1)
    leaving.cancel()
    await asyncio.wait([leaving])
    assert (await service.http.get("/health")).status_code == 200
    name = "fovea_http_requests_client_disconnected_total"
    assert metrics.snapshot()[name] == before[name] + 1


async def test_status_is_told_while_the_service_is_full(serve: Callable[..., Service]) -> None:
    service = serve(ApiConfig(admission=AdmissionConfig(max_requests=1)))
    service.say("slow " * 20, pause_s=0.02)
    running = asyncio.create_task(service.http.post(URL, json=body("hi")))
    await asyncio.sleep(0.05)
    for path in ("/health", "/health/ready", "/v1/models", "/metrics"):
        assert (await service.http.get(path)).status_code == 200, path
    await running


async def test_compressed_body_is_refused(serve: Callable[..., Service]) -> None:
    answer = await serve().http.post(URL, content=b"x", headers={"content-encoding": "gzip"})
    assert answer.status_code == 415


async def test_body_without_a_length_is_refused_where_it_becomes_too_large(serve: Callable[..., Service]) -> None:
    service = serve(ApiConfig(max_body_bytes=1000))
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 100
            yield b" " * 100

    answer = await service.http.post(URL, content=chunks(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert sent < 2000


async def test_body_that_does_not_arrive_is_a_408_that_is_not_tried_again(serve: Callable[..., Service]) -> None:
    service = serve(ApiConfig(body_timeout_s=0.05))

    async def chunks() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    answer = await service.http.post(URL, content=chunks(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (408, "false")


async def test_over_limit_request_then_a_normal_one(serve: Callable[..., Service]) -> None:
    service = serve()
    many = body(*[image_part(picture()) for _ in range(17)], "What?")
    statuses = [
        (await service.http.post(URL, json=request)).status_code
        for request in (many, body(image_part(picture()), "What?"), many, body("hi"))
    ]
    assert statuses == [400, 200, 400, 200]


# Time


async def test_deadline_is_a_504_that_is_not_tried_again_and_frees_the_engine(serve: Callable[..., Service]) -> None:
    service = serve()
    engine = service.say("slow " * 50, pause_s=0.05)
    started = time.monotonic()
    answer = await service.http.post(URL, json=body("hi"), headers={"x-request-timeout-seconds": "0.2"})
    assert time.monotonic() - started < 1
    assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert engine.num_running == 0


async def test_deadline_in_a_stream_is_an_error_event(serve: Callable[..., Service]) -> None:
    service = serve()
    service.say("slow " * 50, pause_s=0.05)
    answer = await service.http.post(URL, json=body("hi", stream=True), headers={"x-request-timeout-seconds": "0.3"})
    assert answer.status_code == 200
    *chunks, error, done = events_of(answer.text)
    assert chunks and error["error"]["code"] == "deadline_exceeded" and done == "[DONE]"


async def test_deadline_reaches_the_encoder(serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    service = serve()
    deadlines = []
    encode = service.encoder.encode

    async def noting(item: Any) -> bytes:
        deadlines.append(item.deadline)
        return await encode(item)

    monkeypatch.setattr(service.encoder, "encode", noting)
    headers = {"x-request-timeout-seconds": "30"}
    assert (await service.http.post(URL, json=body(image_part(picture())), headers=headers)).status_code == 200
    assert 20 < deadlines[0] - time.time() <= 30


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e9", "soon", "99999999"])
async def test_bad_time_limit_is_refused(serve: Callable[..., Service], seconds: str) -> None:
    answer = await serve().http.post(URL, json=body("hi"), headers={"x-request-timeout-seconds": seconds})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout-seconds")


# Ends


@pytest.mark.parametrize("path", [URL, "/v1/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("end", [RuntimeError("a bug"), None], ids=["a bug", "no end"])
async def test_a_stream_that_cannot_finish_says_so(
    serve: Callable[..., Service], path: str, end: Exception | None
) -> None:
    service = serve()
    service.say("half an answer", end)
    requests: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "hi"},
        "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 50},
        "/v1/responses": {"input": "hi"},
    }
    request = {"model": "tiny", "stream": True} | requests.get(path, {"messages": [{"role": "user", "content": "hi"}]})
    before = metrics.snapshot()["fovea_streams_cut_total"]
    answer = await service.http.post(path, json=request)
    events = [event for event in events_of(answer.text) if event != "[DONE]"]
    assert events[-1].get("type") == "error" or "error" in events[-1]
    assert '"finish_reason":"' not in answer.text
    assert "response.completed" not in answer.text and "message_stop" not in answer.text
    assert metrics.snapshot()["fovea_streams_cut_total"] == before + 1


async def test_abort_of_three_long_requests_returns_every_gauge_to_0(serve: Callable[..., Service]) -> None:
    service = serve()

    async def leave_after_the_first_chunk(index: int) -> None:
        request = body(image_part(picture(seed=index)), "Tell me.", max_tokens=3000, ignore_eos=True, stream=True)
        generation = await start(service, request)
        assert service.llm.engine.num_running >= 1
        await generation()

    await asyncio.gather(*(leave_after_the_first_chunk(index) for index in range(3)))
    await until(lambda: service.llm.engine.num_running == service.llm.engine.num_waiting == 0)
    assert not any(held.amount for held in service.llm.admission.held.values())
    manager = service.llm.engine._engine.kv_cache_manager  # type: ignore[attr-defined]
    assert manager.num_available_blocks == manager.num_blocks


def scope_of(method: str, path: str) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json")], "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip


async def raw_status(service: Service, method: str, path: str) -> int:
    """Of a path that no client has tidied up."""
    statuses = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status"))

    await service.app(scope_of(method, path), receive, send)
    return statuses[0]


async def start(service: Service, request: dict[str, Any]) -> Callable[[], Any]:
    """Begins a request as an ASGI server would, and returns what its client's leaving is."""
    left = asyncio.Event()
    begun = asyncio.Event()
    payload = [{"type": "http.request", "body": json.dumps(request).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if payload:
            return payload.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body" and message.get("body"):
            begun.set()

    task = asyncio.create_task(service.app(scope_of("POST", URL), receive, send))
    await asyncio.wait_for(begun.wait(), 30)

    async def leave() -> None:
        left.set()
        await task

    return leave


async def test_client_that_leaves_before_the_answer_frees_the_engine(serve: Callable[..., Service]) -> None:
    """Serve cancels the call of a client that has left."""
    service = serve()
    engine = service.say("slow " * 100, pause_s=0.05)
    task = asyncio.create_task(service.http.post(URL, json=body("hi")))
    await until(lambda: engine.num_running == 1)
    task.cancel()
    await until(lambda: engine.num_running == 0)
    assert not any(held.amount for held in service.llm.admission.held.values())


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not reached in time"
        await asyncio.sleep(0.01)
