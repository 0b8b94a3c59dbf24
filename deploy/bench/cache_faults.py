"""`fovea bench cache --faults`: what requests for images pay while Redis is in trouble, beside requests without it."""

import asyncio
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from transformers import Qwen2VLConfig

from common.cache import EmbeddingCache
from common.checkpoint import checkpoint_directory, load_config, load_geometry
from common.config import CacheConfig, ModelConfig
from common.geometry import ImageGeometry
from common.media import MediaItem, MediaParams
from common.redis_store import open_cache
from deploy.bench import report
from deploy.bench.faults import FAULTS, healthy
from deploy.shapes.scenes import render, sample_scene
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.features import FeatureSource, ImageRequest

_NUM_FIRST = 40  # requests for the cache to find out what it has before it
_MAX_FIRST_MS = 150


@dataclass(frozen=True, slots=True)
class Way:
    """From the bytes of an image to its features: both services in one process, without Ray and the decoder."""

    features: FeatureSource
    caches: Sequence[EmbeddingCache]

    async def seconds(self, image: ImageRequest) -> float:
        started = time.perf_counter()
        await self.features.get_many([image])
        return time.perf_counter() - started

    async def aclose(self) -> None:
        for cache in self.caches:
            await cache.aclose()


def run(*, num_requests: int, output: Path) -> None:
    rows = []
    with tempfile.TemporaryDirectory(prefix="fovea-bench-") as directory:
        model = untrained_model(Path(directory) / "model")
        for name, fault in {"healthy": healthy, **FAULTS}.items():
            with fault(Path(directory) / "redis") as url:
                rows.append({"redis": name, **asyncio.run(measure(model, url, num_requests))})
    report.show(f"{num_requests} requests for new images, with and without Redis in turns (ms)", rows)
    report.write(output, {"circumstances": report.circumstances(requests=str(num_requests)), "faults": rows})


def untrained_model(directory: Path) -> ModelConfig:
    """A small vision half with random weights: what it says does not matter here, only that it takes its time."""
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 256, "num_heads": 2}
    text = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    Qwen2VLConfig(vision_config=vision, text_config=text).save_pretrained(directory)
    return ModelConfig(path=str(directory), load_format="dummy")


async def measure(model: ModelConfig, url: str, num_requests: int) -> dict[str, Any]:
    """`first` is the most that one of the first requests took longer than its twin without a cache, in ms."""
    geometry = geometry_of(model)
    with_cache, without = way(model, geometry, url), way(model, geometry, None)
    images = new_images(geometry)
    for _ in range(5):
        await without.seconds(next(images))
    first = [await in_turns(with_cache, without, next(images), turn) for turn in range(_NUM_FIRST)]
    later = [await in_turns(with_cache, without, next(images), turn) for turn in range(num_requests)]
    await with_cache.aclose()
    await without.aclose()
    cached, plain = zip(*later, strict=True)
    worst_first = max(taken - twin for taken, twin in first) * 1000
    figures: dict[str, Any] = {"first": worst_first}
    is_within = worst_first <= _MAX_FIRST_MS
    for percent in (50, 99):
        taken, twin = (report.percentile(seconds, percent) * 1000 for seconds in (cached, plain))
        limit = twin * 1.10 + 5
        figures |= {f"p{percent}": taken, f"p{percent} without": twin, f"p{percent} limit": limit}
        is_within &= taken <= limit
    return {**figures, "within": "yes" if is_within else "no"}


async def in_turns(one: Way, other: Way, image: ImageRequest, turn: int) -> tuple[float, float]:
    """The seconds of both ways for one image; who is first changes."""
    if turn % 2:
        return await one.seconds(image), await other.seconds(image)
    seconds = await other.seconds(image)
    return await one.seconds(image), seconds


def way(model: ModelConfig, geometry: ImageGeometry, url: str | None) -> Way:
    config = CacheConfig(redis_url=url, local_bytes=0)
    encoder_cache, llm_cache = open_cache(config), open_cache(config)
    encoder = EncoderServer(model, EncoderConfig(), encoder_cache)
    return Way(FeatureSource(encoder, llm_cache, geometry), [encoder_cache, llm_cache])


def geometry_of(model: ModelConfig) -> ImageGeometry:
    directory = checkpoint_directory(model)
    return load_geometry(directory, load_config(directory))


def new_images(geometry: ImageGeometry, seed: int = 0) -> Iterator[ImageRequest]:
    """Pictures of one size that nobody has seen."""
    rng = Random(seed)
    params = MediaParams(min_pixels=geometry.min_pixels, max_pixels=geometry.max_pixels)
    width, height = 280, 280
    grid = params.grid(geometry, height, width)
    while True:
        buffer = io.BytesIO()
        render(sample_scene(rng, width, height)).save(buffer, "PNG")
        yield ImageRequest(MediaItem.of(buffer.getvalue(), params), grid, "image")
