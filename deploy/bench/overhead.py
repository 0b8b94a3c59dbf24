"""`fovea bench overhead`: what HTTP, Serve and the API add to the bare engine, until the first token and per token.

The same greedy requests about one cached picture, so that nothing is encoded: once as prepared requests to an engine
of this process, once as streams over HTTP to a running service. Rounds of both alternate; medians count. Then
50 questions about a new picture, one decision beside 50 chat requests; and clients that leave, as this process and as
they themselves see it.
"""

import asyncio
import base64
import contextlib
import io
import json
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from common.cache import LocalTier, TieredCache
from common.config import MIB, ModelConfig
from deploy import service
from deploy.app import EMBEDDED_MODEL, resolve_model
from deploy.bench import report
from deploy.demo import PICTURES
from deploy.shapes.scenes import render
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.api.app import create_app
from llm_service.chat import ChatMessage, ImagePart
from llm_service.config import EngineConfig
from llm_service.server import GenerationOptions, LLMServer

CONCURRENCIES = (1, 16)
_QUESTION = "What colour is the circle?"
_IGNORED_ROUNDS = 1  # the first one warms both up
_NUM_LEAVING = 10
_LONG = {"max_tokens": 2000}
_SCOPE = {
    "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
    "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"", "root_path": "",
    "headers": [(b"content-type", b"application/json")], "server": ("bench", 80), "client": ("bench", 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one request: seconds from its start to its first token, and between two tokens after that."""

    first_s: float
    per_token_s: float


Ask = Callable[[], Awaitable[Timing]]


async def timed(outputs: AsyncIterator[int]) -> Timing:
    """`outputs` says how many tokens are there at each of its steps."""
    started = time.perf_counter()
    first = last = started
    num_tokens = num_first = 0
    async for count in outputs:
        last = time.perf_counter()
        if not num_tokens:
            first, num_first = last, count
        num_tokens = count
    return Timing(first - started, (last - first) / max(1, num_tokens - num_first))


class BareEngine:
    """The engine of this process, given requests that are prepared already."""

    def __init__(self, image: bytes, num_tokens: int) -> None:
        model = resolve_model(ModelConfig(path=EMBEDDED_MODEL))
        encoder = EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(64 * MIB), None))
        self._server = LLMServer(model, EngineConfig(), TieredCache(LocalTier(64 * MIB), None), encoder)
        self._app = create_app(self._server)
        self._messages = [ChatMessage("user", [ImagePart(image, "auto", "image"), _QUESTION])]
        self._options = GenerationOptions(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)

    async def ask(self) -> Timing:
        prepared = await self._server.prepare(self._messages, self._options, uuid.uuid4().hex)

        async def counts() -> AsyncIterator[int]:
            count = 0
            async with contextlib.aclosing(self._server.engine.generate(prepared.request)) as outputs:
                async for output in outputs:
                    count += len(output.token_ids)
                    yield count

        return await timed(counts())

    async def disconnect(self, body: dict[str, Any]) -> float:
        """Seconds from the news that the client has left its stream to the engine's having freed its KV blocks."""
        has_begun, has_left = asyncio.Event(), asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message.get("body"):
                has_begun.set()

        serving = asyncio.create_task(self._app(_SCOPE, receive, send))
        await has_begun.wait()
        started = time.perf_counter()
        has_left.set()
        while self._server.engine.num_running:  # noqa: ASYNC110  # another thread's number
            await asyncio.sleep(0)
        seconds = time.perf_counter() - started
        await serving
        return seconds

    async def aclose(self) -> None:
        await self._server.media.deletions.aclose()
        self._server.engine.shutdown()


class OverHttp:
    """A running service."""

    def __init__(self, url: str, image: bytes, num_tokens: int) -> None:
        self._http = httpx2.AsyncClient(base_url=url, timeout=600, limits=httpx2.Limits(max_connections=64))
        self.body = {
            "model": EMBEDDED_MODEL,
            "messages": [{"role": "user", "content": [image_part(image), {"type": "text", "text": _QUESTION}]}],
            "temperature": 0,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }

    async def ask(self) -> Timing:
        async def counts() -> AsyncIterator[int]:
            count = 0
            async with self._http.stream("POST", "/v1/chat/completions", json=self.body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        count += len(json.loads(line[6:])["choices"][0]["token_ids"])
                        yield count

        return await timed(counts())

    async def decide(self, questions: list[dict[str, Any]], image: bytes) -> float:
        """Seconds for all questions in one decision."""
        content = [{"type": "input_image", "image_url": data_url(image)}]
        body = {"model": EMBEDDED_MODEL, "input": [{"role": "user", "content": content}], "questions": questions}
        started = time.perf_counter()
        (await self._http.post("/v1/decisions", json=body)).raise_for_status()
        return time.perf_counter() - started

    async def chat(self, questions: list[dict[str, Any]], image: bytes) -> float:
        """Seconds for as many chat requests, 16 at a time, with an answer of a few tokens each."""
        free = asyncio.Semaphore(max(CONCURRENCIES))

        async def one(question: dict[str, Any]) -> None:
            content = [image_part(image), {"type": "text", "text": question["instructions"]}]
            body = {"model": EMBEDDED_MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
            async with free:
                (await self._http.post("/v1/chat/completions", json=body)).raise_for_status()

        started = time.perf_counter()
        await asyncio.gather(*map(one, questions))
        return time.perf_counter() - started

    async def leave(self) -> float:
        """Seconds from a client's leaving its stream to the service saying that no request runs."""
        async with self._http.stream("POST", "/v1/chat/completions", json=self.body | _LONG) as stream:
            await anext(stream.aiter_lines())
        left = time.perf_counter()
        while (await self._http.get("/health")).json()["running"]:
            pass
        return time.perf_counter() - left

    async def aclose(self) -> None:
        await self._http.aclose()


def run(*, rounds: int, num_tokens: int, output: Path) -> None:
    config = service.application_config(port=service.free_port())
    with service.running_service(config, print) as running:
        overheads, decisions, leaving = asyncio.run(_measure(running.url, rounds, num_tokens))
    circumstances = report.circumstances(model=EMBEDDED_MODEL)
    report.show(f"{num_tokens} tokens an answer, medians of {rounds} rounds", overheads)
    report.show("50 questions about one new picture", decisions)
    report.show("from a client's leaving until its KV blocks are free", leaving)
    found = {"overhead": overheads, "decisions": decisions, "leaving": leaving}
    report.write(output, {"circumstances": circumstances, **found})


async def _measure(url: str, rounds: int, num_tokens: int) -> tuple[list[dict[str, Any]], ...]:
    image = png(0)
    bare, http = BareEngine(image, num_tokens), OverHttp(url, image, num_tokens)
    overheads = [await _overhead(bare.ask, http.ask, concurrency, rounds) for concurrency in CONCURRENCIES]
    decisions = [await _decisions(http, round_) for round_ in range(3)]
    left_s = {
        "by the replica, from its news of it": [await bare.disconnect(http.body | _LONG) for _ in range(_NUM_LEAVING)],
        "by the client, over HTTP": [await http.leave() for _ in range(_NUM_LEAVING)],
    }
    await bare.aclose()
    await http.aclose()
    leaving = [
        {"seen": name, "times": len(seconds), **report.milliseconds(seconds), "max_ms": max(seconds) * 1000}
        for name, seconds in left_s.items()
    ]
    return overheads, decisions, leaving


async def _overhead(bare: Ask, http: Ask, concurrency: int, rounds: int) -> dict[str, Any]:
    """Medians of all requests; and of the best rounds, where other work on the machine is least in the way."""
    timings: dict[str, list[list[Timing]]] = {"bare": [], "http": []}
    for round_ in range(rounds + _IGNORED_ROUNDS):
        for name, ask in (("bare", bare), ("http", http)):
            found = await asyncio.gather(*(ask() for _ in range(concurrency)))
            if round_ >= _IGNORED_ROUNDS:
                timings[name].append(found)
    first_ms = {name: [[one.first_s * 1000 for one in round_] for round_ in found] for name, found in timings.items()}
    token_ms = {
        name: [[one.per_token_s * 1000 for one in round_] for round_ in found] for name, found in timings.items()
    }
    first, best_first = _medians(first_ms), _best(first_ms)
    token, best_token = _medians(token_ms), _best(token_ms)
    return {
        "concurrency": concurrency,
        "engine_ttft_ms": first["bare"],
        "added_ttft_ms": first["http"] - first["bare"],
        "engine_ms_per_token": token["bare"],
        "added_percent": 100 * (token["http"] / token["bare"] - 1),
        "best_engine_ttft_ms": best_first["bare"],
        "best_added_ttft_ms": best_first["http"] - best_first["bare"],
        "best_engine_ms_per_token": best_token["bare"],
        "best_added_percent": 100 * (best_token["http"] / best_token["bare"] - 1),
    }


def _medians(rounds: dict[str, list[list[float]]]) -> dict[str, float]:
    return {name: statistics.median(value for one in found for value in one) for name, found in rounds.items()}


def _best(rounds: dict[str, list[list[float]]]) -> dict[str, float]:
    return {name: min(statistics.median(one) for one in found) for name, found in rounds.items()}


async def _decisions(http: OverHttp, round_: int) -> dict[str, Any]:
    """Each on a picture of its own, so that both encode it once."""
    choices = [{"value": colour} for colour in ("red", "blue", "green", "yellow")]
    questions = [
        {"type": "choice", "instructions": f"What colour is the {shape}?", "choices": choices}
        for shape in ("circle", "square", "triangle", "diamond", "cross") * 10
    ]
    decided_s = await http.decide(questions, png(2 * round_ + 1))
    chat_s = await http.chat(questions, png(2 * round_ + 2))
    return {"round": round_ + 1, "one_decision_s": decided_s, "50_chat_requests_s": chat_s}


def png(mark: int) -> bytes:
    """The picture of the demo; with another mark, other bytes."""
    image = render(PICTURES["two-shapes.png"])
    image.putpixel((0, 0), (mark, mark, mark))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def image_part(image: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}
