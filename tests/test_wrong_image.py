"""Wrong-image answers that other systems gave, one named test each; here a key is all of the bytes and nothing else."""

import io
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

from common.config import ModelConfig
from common.embedding import VisionEmbedding
from common.families import VisionItem, mrope_positions
from common.identity import mm_hash
from common.media import MediaItem, MediaParams
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.api.app import create_app
from llm_service.engine.kv_cache import block_hash
from llm_service.engine.request import MultiModalFeature, PlaceholderRange, Request, SamplingParams
from tests.conftest import picture, write_tiny_checkpoint
from tests.services import URL, Services, body, image_part


@pytest.fixture
async def services(tiny_checkpoint: Path) -> AsyncIterator[Services]:
    found = Services(tiny_checkpoint)
    yield found
    found.llm.engine.shutdown()


async def features_of(services: Services, *images: bytes) -> list[torch.Tensor]:
    prepared = await services.prepare("What?", list(images))
    return [feature.embedding.features for feature in prepared.request.mm_features]


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape != second.shape or not torch.equal(first, second)


@pytest.mark.parametrize("size", [(30, 100), (30, 150)])
async def test_pictures_with_the_same_pixel_bytes_and_other_sizes_are_two(
    services: Services, size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, 3 * size[0] * size[1], np.uint8)
    wide, tall = (png(Image.fromarray(pixels.reshape(*shape, 3))) for shape in (size, size[::-1]))
    assert differ(*await features_of(services, wide, tall))


async def test_palette_pictures_with_the_same_indexes_and_other_colours_are_two(services: Services) -> None:
    first = Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 4).convert("P")
    second = first.copy()
    first.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    second.putpalette([0, 0, 255, 255, 0, 0, 0, 255, 0, 9, 9, 9])
    assert first.tobytes() == second.tobytes()
    assert differ(*await features_of(services, png(first), png(second)))


async def test_palette_pictures_with_another_transparent_colour_are_two(services: Services) -> None:
    image = Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 4).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    assert differ(*await features_of(services, png(image, transparency=0), png(image, transparency=1)))


async def test_pictures_with_the_same_first_64_kib_are_two(services: Services) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    other = noise.copy()
    other[-40:] = 255 - other[-40:]
    buffers = []
    for pixels in (noise, other):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "BMP")  # rows go bottom up, so flip: the difference comes last
        header, rows = buffer.getvalue()[:54], buffer.getvalue()[54:]
        buffers.append(header + b"".join(rows[start : start + 900] for start in range(len(rows) - 900, -1, -900)))
    assert buffers[0][: 64 * 1024] == buffers[1][: 64 * 1024]
    assert differ(*await features_of(services, *buffers))


def test_a_million_random_pairs_do_not_collide() -> None:
    rng = random.Random(0)
    hashes = {mm_hash(rng.randbytes(16)) for _ in range(1_000_000)}
    assert len(hashes) == 1_000_000  # 16 bits would give 65,536


def test_hashes_are_the_same_in_processes_with_other_hash_seeds() -> None:
    program = (
        "from common.identity import mm_hash, framed_digest;"
        "print(framed_digest(*(mm_hash(str(i).encode()) for i in range(10000))))"
    )
    root = Path(__file__).parent.parent
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "31337")
    }
    assert len(outputs) == 1


async def test_embedding_with_another_number_of_rows_is_never_injected(services: Services) -> None:
    image = picture(112, 112, 1)
    prepared = await services.prepare("What?", [image])
    key, embedding = prepared.request.mm_features[0].key, prepared.request.mm_features[0].embedding
    short = VisionEmbedding({"features": embedding.features[:-1]}, embedding.grid_thw)
    services.cache.put_local(key, b"", short)
    again = await services.prepare("What?", [image])
    assert again.receipts[0].source == "encoder"
    assert again.request.mm_features[0].embedding.num_tokens == embedding.num_tokens


async def test_hash_or_grid_of_a_caller_is_never_believed(services: Services) -> None:
    transport = httpx2.ASGITransport(create_app(services.llm))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        first, second = picture(84, 84, 2), picture(84, 84, 3)
        honest = (await http.post(URL, json=body(image_part(second), "What?"))).json()
        lying_part = image_part(second) | {"mm_hash": mm_hash(first), "image_grid_thw": [1, 2, 2], "hash": "0"}
        lying = (await http.post(URL, json=body(lying_part, "What?", mm_hashes=[mm_hash(first)]))).json()
    assert lying["usage"]["images"][0]["id"] == mm_hash(second) == honest["usage"]["images"][0]["id"]
    assert lying["choices"] == honest["choices"]


async def test_request_id_is_no_part_of_a_key(services: Services) -> None:
    transport = httpx2.ASGITransport(create_app(services.llm))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        answers = [
            (await http.post(URL, json=body(image_part(image), "What?"), headers={"x-request-id": "same"})).json()
            for image in (picture(84, 84, 4), picture(84, 84, 5))
        ]
    assert answers[0]["usage"]["images"][0]["id"] != answers[1]["usage"]["images"][0]["id"]
    assert answers[0]["choices"][0]["message"] != answers[1]["choices"][0]["message"]


async def test_model_with_the_same_name_and_other_weights_shares_nothing(services: Services, tmp_path: Path) -> None:
    swapped = EncoderServer(
        ModelConfig(path=str(write_tiny_checkpoint(tmp_path, seed=1)), served_name="tiny"),
        EncoderConfig(),
        services.encoder._cache,
    )
    item = MediaItem.of(picture(84, 84, 6), MediaParams(min_pixels=3136, max_pixels=50176))
    assert await services.encoder.encode(item) != await swapped.encode(item)
    assert (services.encoder.num_encoded, swapped.num_encoded) == (1, 1)


async def test_one_picture_at_two_details_shares_neither_entry_nor_kv_block(services: Services) -> None:
    transport = httpx2.ASGITransport(create_app(services.llm))
    text = "Describe the picture from left to right. " * 8
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        usages = [
            (await http.post(URL, json=body(image_part(picture(56, 56), detail=detail), text))).json()["usage"]
            for detail in ("high", "low", "high")
        ]
    # The picture is small: both budgets give the same grid, and still they are two.
    assert usages[0]["images"][0]["tokens"] == usages[1]["images"][0]["tokens"]
    assert [usage["images"][0]["source"] for usage in usages] == ["encoder", "encoder", "local"]
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] < 16  # what stands before the picture
    assert usages[2]["prompt_tokens_details"]["cached_tokens"] >= 64


def test_one_clip_at_two_frame_rates_shares_no_kv_block() -> None:
    def hashes(interval: float, key: str = "k") -> list[str]:
        grid = (3, 4, 4)
        ids = [1, *[300] * 12, 2, 3]
        positions, end = mrope_positions(ids, [VisionItem(1, grid, interval)], merge_size=2)
        embedding = VisionEmbedding({"features": torch.zeros(12, 8)}, grid)
        feature = MultiModalFeature(key, PlaceholderRange(1, 12), embedding, interval)
        request = Request("r", ids, positions, end, SamplingParams(), [feature])
        return [block_hash("", request, start, 4) for start in (0, 4, 8)]

    assert not set(hashes(1.0)) & set(hashes(2.0))
    assert not set(hashes(1.0)) & set(hashes(1.0, "other"))
    assert hashes(1.0) == hashes(1.0)
