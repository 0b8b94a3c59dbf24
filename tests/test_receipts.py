"""What an answer says of its own cost, answers that were given before, and audits; in process, on a tiny model."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from common import metrics
from common.cache import LocalTier, TieredCache
from common.config import ModelConfig
from common.embedding import VisionEmbedding, pack
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.answer_cache import AnswerCache
from llm_service.config import EngineConfig
from llm_service.server import LLMServer, decoder_description
from tests.common.test_cache import DictTier
from tests.conftest import picture
from tests.services import URL, body, image_part


class Services:
    """Both services, answers kept, every hit audited."""

    def __init__(self, checkpoint: Path) -> None:
        model = ModelConfig(path=str(checkpoint), served_name="tiny")
        self.answers = DictTier()
        self.cache = TieredCache(LocalTier(2**26), None)
        self.encoder = EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(2**26), None))
        self.llm = LLMServer(
            model,
            EngineConfig(),
            self.cache,
            self.encoder,
            audit_fraction=1.0,
            answers=AnswerCache(self.answers, 2**20),
        )


@pytest.fixture
async def services(tiny_checkpoint: Path) -> AsyncIterator[Services]:
    found = Services(tiny_checkpoint)
    yield found
    found.llm.engine.shutdown()


async def ask(http: httpx2.AsyncClient, *content: Any, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = (await http.post(URL, json=body(*content, **fields))).raise_for_status().json()
    return answer


async def ask_streaming(http: httpx2.AsyncClient, *content: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
    """The joined text and the usage."""
    request = body(*content, stream=True, stream_options={"include_usage": True}, **fields)
    answer = (await http.post(URL, json=request)).raise_for_status()
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    return text, chunks[-1]["usage"]


def text_of(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def counted(name: str) -> float:
    return metrics.snapshot().get(name, 0.0)


async def until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not reached in time")


# Receipts


async def test_receipt_says_what_encoding_took_on_the_miss_and_on_every_hit(http: httpx2.AsyncClient) -> None:
    image = image_part(picture(56, 84))
    answers = [await ask(http, image, question) for question in ("What?", "Where?")]
    miss, hit = (answer["usage"]["images"][0] for answer in answers)
    assert miss.keys() == {"id", "tokens", "source", "bytes", "encode_ms", "wait_ms"}
    assert (miss["source"], hit["source"]) == ("encoder", "local")
    assert miss["bytes"] == hit["bytes"] == 6 * 64 * 4
    assert 0 < miss["encode_ms"] == hit["encode_ms"]
    assert miss["wait_ms"] > 0 and hit["wait_ms"] > 0


async def test_hits_are_counted_with_the_encoding_they_saved(http: httpx2.AsyncClient) -> None:
    name = 'fovea_encoder_seconds_saved_total{source="local",tenant=""}'
    before = counted(name)
    image = image_part(picture(60, 84))
    receipts = [(await ask(http, image, question))["usage"]["images"][0] for question in ("What?", "Where?", "How?")]
    assert counted(name) - before == pytest.approx(2 * receipts[0]["encode_ms"] / 1000, abs=1e-5)


async def test_server_timing_names_what_the_answer_waited_for(http: httpx2.AsyncClient) -> None:
    image = image_part(picture(70, 84))
    requests = [body(image, "What?"), body(image, "Where?"), body("Hello?"), body(image, "Why?", stream=True)]
    names = []
    for request in requests:
        header = (await http.post(URL, json=request)).headers["server-timing"]
        assert all(re.fullmatch(r"[a-z]+;dur=\d+\.\d", part) for part in header.split(", "))
        names.append([part.partition(";")[0] for part in header.split(", ")])
    assert names == [
        ["encode", "prefill", "total"],
        ["cache", "prefill", "total"],
        ["prefill", "total"],
        ["cache", "prefill", "total"],
    ]


# The answer cache


async def test_repeated_greedy_request_has_the_answer_of_the_first_and_says_so(
    services: Services, http: httpx2.AsyncClient
) -> None:
    image = image_part(picture(56, 84))
    first, again = [await ask(http, image, "What?", max_tokens=12) for _ in range(2)]
    assert "answer_source" not in first["usage"]
    assert again["usage"]["answer_source"] == "cache"
    assert text_of(again) == text_of(first)
    assert again["choices"][0]["finish_reason"] == first["choices"][0]["finish_reason"]
    for name in ("prompt_tokens", "completion_tokens"):
        assert again["usage"][name] == first["usage"][name]
    assert again["usage"]["prompt_tokens_details"]["image_tokens"] == 6
    assert [image["source"] for image in again["usage"]["images"]] == ["answer"]


async def test_stream_of_a_known_answer_is_the_stream_of_the_first(http: httpx2.AsyncClient) -> None:
    first, usage = await ask_streaming(http, "Tell me.", max_tokens=20)
    again, known_usage = await ask_streaming(http, "Tell me.", max_tokens=20)
    assert again == first
    assert known_usage["answer_source"] == "cache"
    assert known_usage["completion_tokens"] == usage["completion_tokens"]


async def test_answer_that_a_stop_string_ended_ends_there_again(http: httpx2.AsyncClient) -> None:
    whole = text_of(await ask(http, "Tell me.", max_tokens=30))
    stop = whole[len(whole) // 2 :][:2]
    first, again = [await ask(http, "Tell me.", max_tokens=30, stop=[stop]) for _ in range(2)]
    assert again["usage"]["answer_source"] == "cache"
    assert text_of(again) == text_of(first) == whole.partition(stop)[0]
    assert again["choices"][0]["finish_reason"] == "stop"


async def test_request_that_differs_in_anything_is_answered_anew(http: httpx2.AsyncClient) -> None:
    image = image_part(picture(56, 84, 1))
    await ask(http, image, "What?")
    others = [
        await ask(http, image_part(picture(56, 84, 2)), "What?"),
        await ask(http, image, "Where?"),
        await ask(http, image, image, "What?"),
        await ask(http, image, "What?", max_tokens=7),
        await ask(http, image, "What?", stop=["x"]),
        await ask(http, image, "What?", repetition_penalty=1.5),
        await ask(http, image_part(picture(200, 200, 1), detail="low"), "What?"),
    ]
    assert all("answer_source" not in other["usage"] for other in others)


async def test_sampled_answer_is_never_kept(services: Services, http: httpx2.AsyncClient) -> None:
    for _ in range(2):
        answer = await ask(http, "What?", temperature=1.0, seed=1)
        assert "answer_source" not in answer["usage"]
    assert services.answers.values == {}


def test_answer_cache_and_audit_need_exact_numerics(tiny_checkpoint: Path) -> None:
    model = ModelConfig(path=str(tiny_checkpoint), numerics="fast")
    with pytest.raises(ValueError, match="need `exact` numerics"):
        LLMServer(model, EngineConfig(), TieredCache(LocalTier(0), None), None, audit_fraction=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_fingerprint_names_the_grid_of_prefill_chunks_where_bits_depend_on_it(numerics: Any) -> None:
    model = ModelConfig(path="x", numerics=numerics)
    configs = [EngineConfig(prefill_chunk_size=size) for size in (64, 128)]
    names = {decoder_description(model, torch.device("cpu"), config) for config in configs}
    assert len(names) == (2 if numerics == "exact" else 1)


# The audit


async def test_audited_hit_that_is_right_changes_nothing(services: Services, http: httpx2.AsyncClient) -> None:
    name = 'fovea_audits_total{result="equal"}'
    before = counted(name)
    image = image_part(picture(56, 84, 3))
    await ask(http, image, "What?")
    await ask(http, image, "Where?")
    await until(lambda: counted(name) == before + 1)
    assert services.encoder.num_encoded == 2
    assert (await http.get("/health")).json()["quarantined"] == []


async def test_hit_with_one_wrong_bit_quarantines_its_namespace(services: Services, http: httpx2.AsyncClient) -> None:
    image = image_part(picture(56, 84, 4))
    await ask(http, image, "What?")
    namespace = str(await services.encoder.describe())
    [key] = list(services.cache._local)
    embedding = services.cache._local.get(key).embedding
    features = embedding.features.clone()
    features.view(-1)[7] += 1e-6
    services.cache.put(key, pack(VisionEmbedding({"features": features}, embedding.grid_thw), key=key))

    await ask(http, image, "Where?")

    await until(lambda: services.cache.report()["quarantined"])
    assert (await http.get("/health")).json()["quarantined"] == [namespace]
    sources = [(await ask(http, image, question))["usage"]["images"][0]["source"] for question in ("How?", "Who?")]
    assert sources == ["encoder", "encoder"]  # the encoder, too, trusts no entry of its own any more
    assert services.encoder.num_encoded == 1 + 1 + 2
