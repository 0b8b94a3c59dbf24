"""`fovea bench serving`: latency and throughput of any OpenAI-compatible endpoint, at several loads.

A request is good if its first token came within the limit on TTFT and its tokens within that on ITL, on average;
goodput counts good requests only. Percentiles are over requests, of ITL over the gaps between events with text.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.bench import plot, report
from deploy.bench.load import Endpoint, Timing, closed_loop, open_loop, probing
from deploy.bench.workloads import WORKLOADS, Shape, arrival_times, probe
from deploy.client import ClientError

IDLE_PROBE_S = 3.0
NUM_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Slo:
    ttft_s: float
    itl_s: float

    def is_met(self, timing: Timing) -> bool:
        return timing.error is None and timing.ttft_s <= self.ttft_s and timing.itl_s <= self.itl_s

    def __str__(self) -> str:
        return f"TTFT {self.ttft_s * 1000:g} ms and ITL {self.itl_s * 1000:g} ms"


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop of so many callers, or requests per second."""

    concurrency: int = 0
    rate: float = 0.0

    def __str__(self) -> str:
        return f"{self.concurrency} at once" if self.concurrency else f"{self.rate:g} req/s"


@dataclass(frozen=True, slots=True)
class Settings:
    workload: str
    shape: Shape
    loads: Sequence[Load]
    num_requests: int
    cv: float
    probe_rate: float
    slo: Slo
    seed: int


def run(endpoint: Endpoint, settings: Settings, *, output: Path, picture: Path) -> None:
    """Prints a table, writes the figures and a plot. Raises ClientError if the service answers nothing at all."""
    plot.check_installed()
    rows = asyncio.run(_measure(endpoint, settings))
    report.show(
        f"{settings.workload} at {endpoint.model}: p50 / p99 in ms; good: {settings.slo}", [shown(row) for row in rows]
    )
    result = {
        "circumstances": report.circumstances(),
        "model": endpoint.model,
        "workload": settings.workload,
        "slo": {"ttft_s": settings.slo.ttft_s, "itl_s": settings.slo.itl_s},
        "seed": settings.seed,
        "rows": rows,
    }
    report.write(output, result)
    plot.serving(picture, rows, title=f"{settings.workload}, {endpoint.model}, {settings.slo}")


async def _measure(endpoint: Endpoint, settings: Settings) -> list[dict[str, Any]]:
    random = np.random.default_rng(settings.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with endpoint:
        with Progress(*columns, transient=True) as progress:
            await _warm_up(endpoint, settings, random)
            rows = [await _idle_probes(endpoint, settings, random)] if settings.probe_rate else []
            for load in settings.loads:
                rows.append(await _point(endpoint, settings, load, random, progress))
    return rows


async def _warm_up(endpoint: Endpoint, settings: Settings, random: Generator) -> None:
    """Not counted. Says what is wrong if nothing works."""
    for sample in WORKLOADS[settings.workload](random, NUM_WARM_UP, settings.shape):
        if error := (await endpoint.ask(sample)).error:
            raise ClientError(f"the first request failed: {error}")


async def _idle_probes(endpoint: Endpoint, settings: Settings, random: Generator) -> dict[str, Any]:
    """What the probes take when nothing else is asked."""
    started = time.perf_counter()
    async with probing(endpoint, settings.probe_rate, lambda: probe(random)) as probes:
        await asyncio.sleep(IDLE_PROBE_S)
    return summary("no load", [], probes, time.perf_counter() - started, settings.slo)


async def _point(
    endpoint: Endpoint, settings: Settings, load: Load, random: Generator, progress: Progress
) -> dict[str, Any]:
    """One row. Pictures are new at every point."""
    task = progress.add_task(f"{load}: drawing pictures", total=None)
    samples = await asyncio.to_thread(WORKLOADS[settings.workload], random, settings.num_requests, settings.shape)
    progress.update(task, description=f"{load}: asking", total=settings.num_requests)
    timings: list[Timing] = []

    def done(timing: Timing) -> None:
        timings.append(timing)
        progress.advance(task)

    started = time.perf_counter()
    async with probing(endpoint, settings.probe_rate, lambda: probe(random)) as probes:
        if load.concurrency:
            await closed_loop(endpoint, samples, load.concurrency, done)
        else:
            times = arrival_times(random, len(samples), load.rate, settings.cv)
            await open_loop(endpoint, samples, times, done)
    return summary(str(load), timings, probes, time.perf_counter() - started, settings.slo)


def summary(load: str, timings: Sequence[Timing], probes: Sequence[Timing], seconds: float, slo: Slo) -> dict[str, Any]:
    """One row: rates per second, times in milliseconds, shares of one. What was not measured is None."""
    answered = [timing for timing in timings if timing.error is None]
    sources = [source for timing in answered for source in timing.sources]
    num_good = sum(map(slo.is_met, timings))
    gaps = [gap for timing in answered for gap in timing.gaps_s]
    row: dict[str, Any] = {
        "load": load,
        "requests": len(timings),
        "errors": len(timings) - len(answered),
        "req_s": len(answered) / seconds,
        "out_tok_s": sum(timing.output_tokens for timing in answered) / seconds,
        "good_req_s": num_good / seconds,
        "good": num_good / len(timings) if timings else None,
        **percentiles("ttft", [timing.ttft_s for timing in answered]),
        **percentiles("itl", gaps),
        **percentiles("e2e", [timing.e2e_s for timing in answered]),
        "prompt_tokens": sum(timing.prompt_tokens for timing in answered) / len(answered) if answered else None,
        "hits": sum(source != "encoder" for source in sources) / len(sources) if sources else None,
        **percentiles("probe", [timing.e2e_s for timing in probes if timing.error is None]),
    }
    errors = sorted({timing.error for timing in (*timings, *probes) if timing.error is not None})
    return row | {"error_messages": errors[:5]}


def percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """`name_p50_ms` and so on."""
    return {
        f"{name}_p{percent}_ms": report.percentile(seconds, percent) * 1000 if seconds else None
        for percent in (50, 90, 99)
    }


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of the table on the screen: medians and 99th percentiles in milliseconds."""

    def times(name: str) -> str:
        median, last = row[f"{name}_p50_ms"], row[f"{name}_p99_ms"]
        return "-" if median is None else f"{median:.{1 if median < 10 else 0}f} / {last:.0f}"

    def share(name: str) -> str:
        return "-" if row[name] is None else f"{row[name]:.0%}"

    return {
        "load": row["load"],
        "ok": f"{row['requests'] - row['errors']}/{row['requests']}",
        "req/s": row["req_s"],
        "tok/s": row["out_tok_s"],
        "TTFT": times("ttft"),
        "ITL": times("itl"),
        "E2E": times("e2e"),
        "hits": share("hits"),
        "good": share("good"),
        "good/s": row["good_req_s"],
        "probe": times("probe"),
    }


def numbers(text: str | None, option: str) -> Iterator[float]:
    """Of a comma-separated list. Raises ClientError that names the option."""
    for word in [] if text is None else text.split(","):
        try:
            number = float(word)
        except ValueError:
            number = 0.0
        if not number > 0:
            raise ClientError(f"{option} is a list of numbers above 0 such as 1,4,16, not {text!r}")
        yield number
