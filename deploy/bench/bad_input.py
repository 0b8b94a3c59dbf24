"""`fovea bench bad-input`: how long a refusal takes, over the HTTP surface in process, and what it costs the others."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx2

from common.cache import LocalTier, TieredCache
from common.config import MIB, ModelConfig
from deploy.bench import report
from deploy.bench.image_bombs import BOMBS
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.api.app import create_app
from llm_service.config import EngineConfig
from llm_service.server import LLMServer

_URL = "/v1/chat/completions"
_NAME = "shapes"
_PROCESS = Path("/proc/self")


def run(model_path: Path, rounds: int, output: Path) -> None:
    """Every case must be a 400; a 200 or a 500 is an AssertionError, and so is an engine that does not go on."""
    rows = refusals(model_path, rounds)
    report.show("Refusals, ms; the longest stall is the event loop's; memory is that of client and service", rows)
    report.write(output, {"circumstances": report.circumstances(model=str(model_path)), "rows": rows})


def refusals(model_path: Path, rounds: int) -> list[dict[str, Any]]:
    """A row for each case: the time of `rounds` refusals, the longest stall, and the memory they took at most."""
    return asyncio.run(_measure(model_path, rounds))


def cases() -> dict[str, dict[str, Any]]:
    """Fields that no answer can have."""
    return {
        "an impossible schema": _schema({"type": "string", "minLength": 5, "maxLength": 2}),
        "a schema of 70 kB": _schema({"enum": ["x" * 70_000]}),
        "a schema above the fuel limit": _schema({"enum": [f"{index:x}" for index in range(8400)]}),
        "a regex of 40 kB": {"structured_outputs": {"regex": "a?" * 20_000}},
        "a regex that is none": {"structured_outputs": {"regex": "[a-z"}},
        "n of a million": {"n": 10**6},
        "top_logprobs 21": {"logprobs": True, "top_logprobs": 21},
        "a seed above 64 bits": {"seed": 2**63},
        "100,000 stop strings": {"stop": ["a"] * 10**5},
        "a bias for no token": {"logit_bias": {"999999": 1}},
        **{name: _picture(make()) for name, make in BOMBS.items()},
    }


def _picture(data: bytes) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


async def _measure(model_path: Path, rounds: int) -> list[dict[str, Any]]:
    async with _client(model_path) as client:
        await _ask(client, {}, 200)
        rows = []
        for name, fields in cases().items():
            durations, stalls = [], []
            with _peak_memory() as peak:
                for _ in range(rounds):
                    async with _longest_stall() as stall:
                        started = time.perf_counter()
                        await _ask(client, fields, 400)
                        durations.append(time.perf_counter() - started)
                    stalls.append(stall[0])
            stall_ms = max(stalls) * 1000
            rows.append(
                {"case": name, **report.milliseconds(durations), "longest_stall_ms": stall_ms, "memory_mib": peak[0]}
            )
        await _ask(client, {}, 200)  # the engine goes on
    return rows


async def _ask(client: httpx2.AsyncClient, fields: dict[str, Any], status: int) -> None:
    body = {"model": _NAME, "messages": [{"role": "user", "content": "How many?"}], "max_tokens": 4, **fields}
    answer = await client.post(_URL, json=body)
    assert answer.status_code == status, answer.text[:500]


@asynccontextmanager
async def _client(model_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    model = ModelConfig(path=str(model_path), served_name=_NAME)
    encoder = EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(MIB), None))
    server = LLMServer(model, EngineConfig(), TieredCache(LocalTier(MIB), None), encoder)
    transport = httpx2.ASGITransport(create_app(server))
    try:
        async with httpx2.AsyncClient(transport=transport, base_url="http://in-process") as client:
            yield client
    finally:
        server.engine.shutdown()


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """One number: by how many MiB the process's resident memory was larger at its peak than in the beginning."""
    (_PROCESS / "clear_refs").write_text("5")  # the peak is what is resident now
    before = _resident_mib("VmRSS")
    peak = [0.0]
    yield peak
    peak[0] = _resident_mib("VmHWM") - before


def _resident_mib(name: str) -> float:
    line = next(line for line in (_PROCESS / "status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


@asynccontextmanager
async def _longest_stall(interval_s: float = 0.001) -> AsyncIterator[list[float]]:
    """One number: the longest time that the event loop kept a task waiting beyond its interval, in seconds."""
    longest = [0.0]

    async def watch() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(interval_s)
            longest[0] = max(longest[0], time.perf_counter() - started - interval_s)

    task = asyncio.create_task(watch())
    await asyncio.sleep(0)
    try:
        yield longest
        await asyncio.sleep(2 * interval_s)  # so that a stall that lasted to the end is seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
