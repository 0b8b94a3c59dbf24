"""`fovea bench tiers`: what the local tier's policy saves beside LRU, and what a hit costs beside preprocessing."""

import asyncio
import io
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from common.cache import Entry, LocalTier, TieredCache
from common.config import MIB, ImageLimits
from common.embedding import VisionEmbedding, pack
from common.geometry import PatchGeometry
from common.identity import EmbeddingNamespace
from common.media import MediaItem, MediaParams, image_header
from deploy.bench import report
from encoder_service.preprocess import ImagePreprocessor
from llm_service.features import FeatureSource, ImageRequest, embedding_key

# Qwen2-VL-2B's
_GEOMETRY = PatchGeometry(patch_size=14, merge_size=2, hidden_size=1536, min_pixels=3136, max_pixels=12845056)
_PARAMS = MediaParams(min_pixels=_GEOMETRY.min_pixels, max_pixels=_GEOMETRY.max_pixels)
_LIMITS = ImageLimits()


@dataclass(frozen=True, slots=True)
class TraceImage:
    num_bytes: int
    encode_ms: float


class Tier(Protocol):
    def get(self, key: str) -> Entry | None: ...

    def put(self, key: str, entry: Entry) -> None: ...


class LruTier:
    """The least recently used leaves: what LocalTier is measured against."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def get(self, key: str) -> Entry | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: str, entry: Entry) -> None:
        self._entries[key] = entry
        self._num_bytes += len(entry.data)
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= len(self._entries.popitem(last=False)[1].data)


class _NoBytes(bytes):
    """Has a length and no content, so that a trace of gigabytes is replayed in little memory."""

    _num_bytes: int

    def __new__(cls, num_bytes: int) -> "_NoBytes":
        self = super().__new__(cls)
        self._num_bytes = num_bytes
        return self

    def __len__(self) -> int:
        return self._num_bytes


def trace(num_images: int = 4000, num_lookups: int = 60_000, seed: int = 0) -> tuple[list[str], dict[str, TraceImage]]:
    """Two thirds of the look-ups are Zipf's (exponent 0.8) and drift over the images; one third is of images never seen
    again, as when a folder is warmed.

    Pictures of 0.2 to 12 million pixels, one in four sent with `detail: low`. Encoding is taken to cost 20 ms for a
    million pixels of the source (decoding and resizing, measured here) and 0.05 ms a token.
    """
    rng = np.random.default_rng(seed)
    num_scanned = num_lookups // 3
    source_pixels = np.exp(rng.uniform(np.log(2e5), np.log(1.2e7), num_images + num_scanned))
    budget = np.where(rng.random(len(source_pixels)) < 0.25, 2.5e5, 2e6)
    tokens = np.maximum(4, np.minimum(source_pixels, budget) / 28**2).astype(int)
    milliseconds = source_pixels / 1e6 * 20 + tokens * 0.05
    images = {
        str(index): TraceImage(int(count) * _GEOMETRY.hidden_size * 2, float(cost))
        for index, (count, cost) in enumerate(zip(tokens, milliseconds, strict=True))
    }
    weights = 1 / np.arange(1, num_images + 1) ** 0.8
    ranks = rng.choice(num_images, num_lookups - num_scanned, p=weights / weights.sum())
    drift = np.arange(len(ranks)) * num_images // (4 * len(ranks))
    popular = [str(index) for index in (ranks + drift) % num_images]
    scanned = [str(num_images + index) for index in range(num_scanned)]
    keys: list[str] = []
    for index, once in enumerate(scanned):
        keys += [*popular[2 * index : 2 * index + 2], once]
    return keys, images


def replay(tier: Tier, keys: list[str], images: dict[str, TraceImage]) -> dict[str, float]:
    """The shares of look-ups that hit and of encoding time that they saved."""
    hits = saved_ms = all_ms = 0.0
    nothing = torch.empty(0, 1)
    for key in keys:
        image = images[key]
        all_ms += image.encode_ms
        if tier.get(key) is not None:
            hits += 1
            saved_ms += image.encode_ms
            continue
        embedding = VisionEmbedding({"features": nothing}, (1, 2, 2), encode_ms=image.encode_ms)
        tier.put(key, Entry(_NoBytes(image.num_bytes), embedding))
    return {"hit_ratio": hits / len(keys), "encoding_saved": saved_ms / all_ms}


def compare_policies() -> list[dict[str, Any]]:
    keys, images = trace()
    all_bytes = sum(images[key].num_bytes for key in set(keys))
    rows = []
    for percent in (1, 2, 5, 10, 20):
        max_bytes = all_bytes * percent // 100
        lru, weighed = (replay(tier, keys, images) for tier in (LruTier(max_bytes), LocalTier(max_bytes)))
        rows.append(
            {
                "memory": f"{max_bytes // MIB} MiB ({percent} %)",
                "LRU hits": lru["hit_ratio"],
                "hits": weighed["hit_ratio"],
                "LRU saves": lru["encoding_saved"],
                "saves": weighed["encoding_saved"],
            }
        )
    return rows


class _NoEncoder:
    """A hit asks nobody."""

    async def describe(self, image: str | None = None) -> EmbeddingNamespace:
        texts = dict.fromkeys(EmbeddingNamespace.__dataclass_fields__, "x")
        return EmbeddingNamespace(**{**texts, "dtype": "bfloat16", "wire_version": 1})  # type: ignore[arg-type]

    async def encode(self, item: MediaItem) -> bytes:
        raise AssertionError("a hit was encoded")

    async def audit(self, item: MediaItem, namespace: str, digest: str) -> bool | None:
        raise AssertionError("a hit was audited")


async def compare_hit_with_preprocessing(repeats: int = 15) -> dict[str, Any]:
    """From the bytes of a 2560 x 1440 JPEG to its features on a local hit, and its preprocessing alone, in turns."""
    data = _photo(1440, 2560)
    cache = TieredCache(LocalTier(64 * MIB), None)
    encoder = _NoEncoder()
    source = FeatureSource(encoder, cache, _GEOMETRY)
    preprocess = ImagePreprocessor(_GEOMETRY, {}, _LIMITS)
    request = _request(data)
    spec = _GEOMETRY.embedding_spec(request.grid_thw, torch.bfloat16)
    features = {name: torch.zeros(shape, dtype=spec.dtype) for name, shape in spec.shapes.items()}
    key = embedding_key(await encoder.describe(), request.item)
    cache.put(key, pack(VisionEmbedding(features, request.grid_thw), key=key))

    hit_s, preprocess_s = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        [found] = await source.get_many([_request(data)])
        hit_s.append(time.perf_counter() - started)
        assert found.source == "local"
        preprocess_s.append(_seconds(lambda: preprocess(data, _PARAMS)))
    hit, miss = (report.milliseconds(seconds) for seconds in (hit_s, preprocess_s))
    return {
        "JPEG": f"2560 x 1440, {len(data) // 1024} KiB",
        "tokens": spec.num_tokens,
        "hit ms": hit["median_ms"],
        "preprocessing ms": miss["median_ms"],
        "ratio": miss["median_ms"] / hit["median_ms"],
    }


def run(output: Path) -> None:
    """Prints both tables and writes them to `output`."""
    policies = compare_policies()
    report.show("A replayed trace: shares of look-ups that hit, and of encoding time that is saved", policies)
    hit = asyncio.run(compare_hit_with_preprocessing())
    report.show("A hit decodes no pixel: bytes to features, and preprocessing alone (medians)", [hit])
    report.write(output, {"circumstances": report.circumstances(), "policies": policies, "hit": hit})


def _request(data: bytes) -> ImageRequest:
    header = image_header(data, _LIMITS)
    grid = _PARAMS.grid(_GEOMETRY, header.height, header.width)
    return ImageRequest(MediaItem.of(data, _PARAMS), grid, "bench")


def _photo(height: int, width: int) -> bytes:
    """Smooth areas with some noise: about as many bytes as a photograph of the size."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (18, 32, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 6, (height, width, 1))
    pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
