"""`fovea bench serving`: what it sends, what it measures, and that it measures any endpoint."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from typer.testing import CliRunner

from deploy.bench.load import Timing, base_url
from deploy.bench.serving import Slo, summary
from deploy.bench.workloads import Shape, arrival_times, new, production, repeated
from deploy.cli import app
from deploy.client import ClientError
from tests.conftest import serving

SHAPE = Shape(width=64, height=48, text_tokens=5, output_tokens=4, questions_per_image=4, scale=1.0)
WAIT_S = 0.05


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def scripted(requests: list[dict[str, Any]], *, fail_every: int = 0) -> FastAPI:
    """Not Fovea: a service that waits, then streams two words, with OpenAI's fields only."""
    service = FastAPI()

    @service.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "scripted"}]}

    @service.post("/v1/chat/completions")
    async def chat(http: Request) -> Any:
        requests.append(await http.json())
        if fail_every and len(requests) % fail_every == 0:
            return JSONResponse({"error": {"message": "too much"}}, status_code=429)
        return StreamingResponse(words(), media_type="text/event-stream")

    async def words() -> AsyncIterator[str]:
        for content, reason in (("red", None), (" circle", None), ("", "stop")):
            await asyncio.sleep(WAIT_S)
            choice = {"index": 0, "delta": {"content": content}, "finish_reason": reason}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 9, 'completion_tokens': 3}})}\n\n"
        yield "data: [DONE]\n\n"

    return service


def bench(url: str, directory: Path, *arguments: str) -> dict[str, Any]:
    files = ("--output", str(directory / "figures.json"), "--plot", str(directory / "plot.png"))
    CliRunner().invoke(app, ["bench", "serving", "--url", url, *arguments, *files], catch_exceptions=False)
    found: dict[str, Any] = json.loads((directory / "figures.json").read_text())
    return found


def test_closed_and_open_loop_of_any_endpoint_are_measured_and_plotted(tmp_path: Path) -> None:
    requests: list[dict[str, Any]] = []
    with serving(scripted(requests)) as url:
        loads = ("--concurrency", "1,4", "--rate", "40", "--requests", "8", "--image", "32x32")
        found = bench(url, tmp_path, *loads, "--slo-ttft-ms", "1000", "--slo-itl-ms", "1000")
    assert [row["load"] for row in found["rows"]] == ["1 at once", "4 at once", "40 req/s"]
    one, four, _ = found["rows"]
    assert one["errors"] == 0 and one["good"] == 1 and one["prompt_tokens"] == 9
    assert one["ttft_p50_ms"] >= 1000 * WAIT_S and one["e2e_p50_ms"] >= 3000 * WAIT_S
    assert one["itl_p50_ms"] == pytest.approx(1000 * WAIT_S, rel=0.8)
    assert four["req_s"] > 1.5 * one["req_s"]
    assert len(requests) == 2 + 3 * 8
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_requests_carry_pictures_and_the_fields_of_a_benchmark(tmp_path: Path) -> None:
    requests: list[dict[str, Any]] = []
    with serving(scripted(requests)) as url:
        bench(url, tmp_path, "--workload", "new", "--concurrency", "2", "--requests", "3", "--image", "32x32")
    parts = [request["messages"][0]["content"] for request in requests]
    urls = {part[0]["image_url"]["url"] for part in parts}
    assert len(urls) == len(requests) and all(url.startswith("data:image/jpeg;base64,") for url in urls)
    assert all(request["ignore_eos"] and request["max_tokens"] == 64 for request in requests)


def test_refusals_are_errors_and_never_good(tmp_path: Path) -> None:
    with serving(scripted([], fail_every=3)) as url:
        found = bench(
            url, tmp_path, "--workload", "text", "--concurrency", "1", "--requests", "6", "--slo-itl-ms", "1000"
        )
    row = found["rows"][0]
    assert (row["errors"], row["good"]) == (2, pytest.approx(4 / 6))
    assert row["error_messages"] == ['429 {"error":{"message":"too much"}}']


def test_probes_run_alone_and_beside_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.bench.serving.IDLE_PROBE_S", 0.3)
    requests: list[dict[str, Any]] = []
    with serving(scripted(requests)) as url:
        arguments = ("--concurrency", "1", "--requests", "3", "--probe-rate", "20", "--image", "32x32")
        found = bench(url, tmp_path, *arguments)
    alone, beside = found["rows"]
    assert alone["load"] == "no load" and alone["requests"] == 0
    assert alone["probe_p50_ms"] and beside["probe_p50_ms"]
    assert sum(request["max_tokens"] == 1 for request in requests) >= 6


def test_fovea_itself_is_measured_with_its_hits(url: str, tmp_path: Path) -> None:
    arguments = ("--concurrency", "1", "--requests", "8", "--image", "84x56", "--output-tokens", "4")
    row = bench(url, tmp_path, *arguments)["rows"][0]
    assert row["errors"] == 0 and row["hits"] == pytest.approx(7 / 8)


def test_service_that_refuses_everything_is_one_line(tmp_path: Path) -> None:
    with serving(scripted([], fail_every=1)) as url, pytest.raises(ClientError, match="first request failed: 429"):
        bench(url, tmp_path, "--workload", "text")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--workload", "odd"], "--workload is one of"), (["--rate", "fast"], "--rate"), (["--image", "1"], "--image")],
)
def test_wrong_option_is_one_line_that_names_it(arguments: list[str], complaint: str) -> None:
    error = CliRunner().invoke(app, ["bench", "serving", *arguments]).exception
    assert error is not None and complaint in str(error)


def test_repeated_asks_each_picture_equally_often(random: np.random.Generator) -> None:
    pictures = [sample.images[0] for sample in repeated(random, 16, SHAPE)]
    assert sorted(pictures.count(picture) for picture in set(pictures)) == [4, 4, 4, 4]
    assert len({sample.images for sample in new(random, 16, SHAPE)}) == 16


def test_production_has_the_published_quantiles(random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []
    monkeypatch.setattr("deploy.bench.workloads.picture", lambda random, width, height: sides.append(width) or b"")
    samples = production(random, 4000, SHAPE)
    counts = np.array([len(sample.images) for sample in samples])
    assert np.quantile(counts, [0.5, 0.9, 0.95, 0.99]).tolist() == [1, 3, 4, 9]
    tokens = np.array(sides) ** 2 / 784
    assert np.quantile(tokens, [0.25, 0.5, 0.75, 0.9]) == pytest.approx([234, 540, 1196, 1224], rel=0.08)
    words = [len(sample.text.split()) for sample in samples]
    assert np.quantile(words, [0.5, 0.75, 0.95]) == pytest.approx([106, 1032, 2346], rel=0.12)
    outputs = [sample.max_tokens for sample in samples]
    assert np.quantile(outputs, [0.5, 0.75, 0.9]) == pytest.approx([100, 185, 264], rel=0.08)


@pytest.mark.parametrize("cv", [1.0, 2.2])
def test_arrivals_have_the_rate_and_the_burstiness(random: np.random.Generator, cv: float) -> None:
    gaps = np.diff(arrival_times(random, 20_000, rate=8.0, cv=cv))
    assert 1 / gaps.mean() == pytest.approx(8, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


def test_goodput_needs_both_limits() -> None:
    slo = Slo(ttft_s=1.0, itl_s=0.1)
    timings = [
        Timing(ttft_s=0.5, e2e_s=1.0, output_tokens=11),
        Timing(ttft_s=1.5, e2e_s=2.0, output_tokens=11),
        Timing(ttft_s=0.5, e2e_s=2.5, output_tokens=11),
        Timing(ttft_s=0.5, e2e_s=0.5, output_tokens=1),
    ]
    row = summary("x", timings, [], seconds=2.0, slo=slo)
    assert (row["good"], row["good_req_s"], row["req_s"]) == (0.5, 1.0, 2.0)


def test_v1_may_be_left_out_of_the_url() -> None:
    assert {base_url(url) for url in ("http://x", "http://x/", "http://x/v1", "http://x/v1/")} == {"http://x/v1/"}
