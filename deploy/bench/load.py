"""Sends requests to an OpenAI-compatible endpoint, in a closed or an open loop, and times what streams back."""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from deploy.bench.workloads import Sample
from deploy.client import ClientError, authorization, wants_key

TIMEOUT_S = 600.0

Done = Callable[["Timing"], None]


@dataclass(slots=True)
class Timing:
    """One request, in seconds from when it was sent. `gaps_s` are those between events with text.

    With an `error` the times up to it are meaningless. `sources` is empty unless the service has Fovea's receipts.
    """

    ttft_s: float = 0.0
    e2e_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    sources: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def itl_s(self) -> float:
        """The mean time between two tokens; events may hold several."""
        return (self.e2e_s - self.ttft_s) / max(1, self.output_tokens - 1)


class Endpoint:
    """One model behind one URL. To be entered, in the event loop that uses it."""

    def __init__(self, url: str, model: str | None, api_key: str | None, fields: dict[str, Any]) -> None:
        """`fields` go into every request."""
        headers = {"content-type": "application/json"} | authorization(api_key)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=256)
        self._http = httpx2.AsyncClient(base_url=base_url(url), headers=headers, timeout=TIMEOUT_S, limits=limits)
        self._fields = fields
        self.model = model or ""

    async def __aenter__(self) -> "Endpoint":
        if not self.model:
            self.model = await self._only_model()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()

    async def ask(self, sample: Sample) -> Timing:
        """Never raises for what the service does; a benchmark counts its errors."""
        timing = Timing()
        body = self._body(sample)  # made before the clock starts
        started = time.perf_counter()
        try:
            async with self._http.stream("POST", "chat/completions", content=body) as response:
                if response.status_code != 200:
                    timing.error = f"{response.status_code} {(await response.aread()).decode(errors='replace')[:300]}"
                    return timing
                await self._read(response, timing, started)
        except (httpx2.HTTPError, ValueError, KeyError) as exc:
            timing.error = f"{type(exc).__name__} {exc}"
        return timing

    async def _read(self, response: httpx2.Response, timing: Timing, started: float) -> None:
        last = 0.0
        finished = False
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            now = time.perf_counter() - started
            if "error" in chunk:
                timing.error = str(chunk["error"].get("message"))
                return
            if usage := chunk.get("usage"):
                timing.prompt_tokens, timing.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                timing.sources = [receipt["source"] for receipt in usage.get("images", ())]
            for choice in chunk["choices"]:
                finished = finished or choice.get("finish_reason") is not None
                # a token that is a part of a character has no text yet, and one that ends has none at all
                if not choice["delta"].get("content") and choice.get("finish_reason") is None:
                    continue
                if last:
                    timing.gaps_s.append(now - last)
                else:
                    timing.ttft_s = now
                last = timing.e2e_s = now
        if not finished:
            timing.error = "the stream ended without a finish reason"

    def _body(self, sample: Sample) -> bytes:
        pictures = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"}}
            for image in sample.images
        ]
        content = [*pictures, {"type": "text", "text": sample.text}]
        return json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": sample.max_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self._fields,
            }
        ).encode()

    async def _only_model(self) -> str:
        try:
            response = await self._http.get("models")
            if response.status_code in (401, 403):
                raise ClientError(wants_key(self._http.base_url))
            name: str = response.raise_for_status().json()["data"][0]["id"]
        except (httpx2.HTTPError, ValueError, KeyError, IndexError) as exc:
            raise ClientError(
                f"{self._http.base_url}models lists no model; is --url OpenAI-compatible, or is --model needed?"
            ) from exc
        return name


def base_url(url: str) -> str:
    """With /v1, which may be left out."""
    stripped = url.rstrip("/")
    return stripped + "/" if stripped.endswith("/v1") else stripped + "/v1/"


async def closed_loop(endpoint: Endpoint, samples: Sequence[Sample], concurrency: int, done: Done) -> None:
    """As many callers, each of whom asks again when answered."""
    waiting = iter(samples)

    async def caller() -> None:
        for sample in waiting:
            done(await endpoint.ask(sample))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(caller())


async def open_loop(endpoint: Endpoint, samples: Sequence[Sample], times: Sequence[float], done: Done) -> None:
    """Each request is sent at its time, whatever became of those before it."""
    started = time.perf_counter()

    async def one(sample: Sample) -> None:
        done(await endpoint.ask(sample))

    async with asyncio.TaskGroup() as group:
        for sample, at in zip(samples, times, strict=True):
            await asyncio.sleep(started + at - time.perf_counter())
            group.create_task(one(sample))


@contextlib.asynccontextmanager
async def probing(endpoint: Endpoint, rate: float, make: Callable[[], Sample]) -> AsyncIterator[list[Timing]]:
    """Small requests at a steady rate beside whatever runs inside; the list grows as they are answered."""
    answered: list[Timing] = []
    sent: set[asyncio.Task[None]] = set()

    async def one() -> None:
        answered.append(await endpoint.ask(make()))

    async def send() -> None:
        while True:
            task = asyncio.create_task(one())
            sent.add(task)
            task.add_done_callback(sent.discard)
            await asyncio.sleep(1 / rate)

    sender = asyncio.create_task(send()) if rate else None
    try:
        yield answered
    finally:
        if sender is not None:
            sender.cancel()
            await asyncio.gather(*sent)
