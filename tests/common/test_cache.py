import asyncio
from collections.abc import Callable

import pytest
import torch

from common.cache import Entry, LocalTier, SingleFlight, TieredCache
from common.embedding import EmbeddingSpec, VisionEmbedding, pack, unpack

MISSES = "fovea_embedding_cache_misses_total"
LOCAL_HITS = 'fovea_embedding_cache_hits_total{tier="local"}'
REDIS_HITS = 'fovea_embedding_cache_hits_total{tier="redis"}'

Counted = Callable[[str], float]


class DictTier:
    """A remote tier that keeps everything."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.num_gets = 0
        self.closed = False

    async def get(self, key: str, max_bytes: int) -> bytes | None:
        self.num_gets += 1
        value = self.values.get(key)
        return value if value is None else value[:max_bytes]

    def put(self, key: str, data: bytes) -> None:
        self.values[key] = data

    def discard(self, key: str) -> None:
        self.values.pop(key, None)

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture
def remote() -> DictTier:
    return DictTier()


@pytest.fixture
def cache(remote: DictTier) -> TieredCache:
    return TieredCache(LocalTier(1024**2), remote)


async def test_what_was_put_is_a_local_hit(
    cache: TieredCache, remote: DictTier, embedding: VisionEmbedding, spec: EmbeddingSpec, counted: Counted
) -> None:
    data = pack(embedding, key="k")
    cache.put("k", data)

    hits = await cache.get_many({"k": spec, "absent": spec})

    assert hits.keys() == {"k"}
    assert (hits["k"].tier, hits["k"].data) == ("local", data)
    assert torch.equal(hits["k"].embedding.features, embedding.features)
    assert (counted(LOCAL_HITS), counted(MISSES)) == (1, 1)
    assert remote.num_gets == 1


async def test_a_redis_hit_is_local_the_next_time(
    cache: TieredCache, remote: DictTier, embedding: VisionEmbedding, spec: EmbeddingSpec, counted: Counted
) -> None:
    remote.put("k", pack(embedding, key="k"))

    tiers = [(await cache.get_many({"k": spec}))["k"].tier for _ in range(2)]

    assert tiers == ["redis", "local"]
    assert (counted(REDIS_HITS), counted(LOCAL_HITS), counted(MISSES)) == (1, 1, 0)


async def test_an_entry_is_unpacked_once(cache: TieredCache, embedding: VisionEmbedding, spec: EmbeddingSpec) -> None:
    cache.put("k", pack(embedding, key="k"))
    first, second = [(await cache.get_many({"k": spec}))["k"].embedding for _ in range(2)]
    assert first is second


async def test_an_embedding_that_came_with_the_data_is_the_hit(
    cache: TieredCache, embedding: VisionEmbedding, spec: EmbeddingSpec
) -> None:
    data = pack(embedding, key="k")
    unpacked = unpack(data, key="k")
    cache.put("k", data, unpacked)
    assert (await cache.get_many({"k": spec}))["k"].embedding is unpacked


async def test_values_of_one_call_are_read_from_redis_together(spec: EmbeddingSpec) -> None:
    class WaitsForAll(DictTier):
        everyone = asyncio.Barrier(3)

        async def get(self, key: str, max_bytes: int) -> bytes | None:
            await self.everyone.wait()
            return None

    cache = TieredCache(LocalTier(0), WaitsForAll())
    async with asyncio.timeout(5):
        assert await cache.get_many(dict.fromkeys("abc", spec)) == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        lambda data: data + bytes(1024**2),
        lambda data: b"\x80\x04N.",
    ],
    ids=["truncated", "flipped bit", "far too long", "a pickle"],
)
async def test_a_damaged_value_is_a_miss_until_it_is_overwritten(
    cache: TieredCache,
    remote: DictTier,
    embedding: VisionEmbedding,
    spec: EmbeddingSpec,
    counted: Counted,
    damage: Callable[[bytes], bytes],
) -> None:
    data = pack(embedding, key="k")
    remote.put("k", damage(data))

    assert await cache.get_many({"k": spec}) == {}
    assert counted('fovea_embedding_cache_rejected_total{reason="format"}') == 1
    assert counted(MISSES) == 1

    cache.put("k", data)
    assert remote.values["k"] == data
    assert "k" in await cache.get_many({"k": spec})


async def test_a_value_under_another_key_is_a_miss(
    cache: TieredCache, remote: DictTier, embedding: VisionEmbedding, spec: EmbeddingSpec
) -> None:
    remote.put("k", pack(embedding, key="other"))
    assert await cache.get_many({"k": spec}) == {}


@pytest.mark.parametrize(
    "other",
    [
        EmbeddingSpec(grid_thw=(1, 6, 4), shapes={"features": (6, 8)}, dtype=torch.float32),
        EmbeddingSpec(grid_thw=(1, 4, 6), shapes={"features": (8, 6)}, dtype=torch.float32),
        EmbeddingSpec(grid_thw=(1, 4, 6), shapes={"features": (6, 8)}, dtype=torch.bfloat16),
        EmbeddingSpec(grid_thw=(1, 4, 6), shapes={"features": (6, 8), "deepstack_0": (6, 8)}, dtype=torch.float32),
    ],
    ids=["grid", "shape", "dtype", "tensors"],
)
async def test_an_embedding_that_the_image_does_not_imply_is_a_miss_in_every_tier(
    cache: TieredCache, embedding: VisionEmbedding, spec: EmbeddingSpec, counted: Counted, other: EmbeddingSpec
) -> None:
    data = pack(embedding, key="k")
    cache.put("k", data, unpack(data, key="k"))

    assert await cache.get_many({"k": other}) == {}

    assert counted('fovea_embedding_cache_rejected_total{reason="spec"}') == 2  # local, then redis
    assert (await cache.get_many({"k": spec}))["k"].tier == "redis"


async def test_what_is_put_locally_is_not_published(
    cache: TieredCache, remote: DictTier, embedding: VisionEmbedding, spec: EmbeddingSpec
) -> None:
    cache.put_local("k", pack(embedding, key="k"))
    assert "k" in await cache.get_many({"k": spec})
    assert remote.values == {}


async def test_what_is_discarded_is_in_no_tier(
    cache: TieredCache, embedding: VisionEmbedding, spec: EmbeddingSpec
) -> None:
    cache.put("k", pack(embedding, key="k"))
    cache.discard("k")
    assert await cache.get_many({"k": spec}) == {}


async def test_without_redis_the_local_tier_is_the_cache(embedding: VisionEmbedding, spec: EmbeddingSpec) -> None:
    cache = TieredCache(LocalTier(1024**2), None)
    cache.put("k", pack(embedding, key="k"))
    assert (await cache.get_many({"k": spec, "absent": spec})).keys() == {"k"}
    cache.discard("k")
    await cache.aclose()


async def test_closing_the_cache_closes_redis(cache: TieredCache, remote: DictTier) -> None:
    await cache.aclose()
    assert remote.closed


def test_the_local_tier_forgets_the_least_recently_used() -> None:
    tier = LocalTier(30)
    for key in "abc":
        tier.put(key, Entry(bytes(10), None))
    tier.get("a")
    tier.put("d", Entry(bytes(15), None))
    assert [key for key in "abcd" if tier.get(key)] == ["a", "d"]
    assert tier.num_bytes == 25


def test_the_local_tier_counts_a_replaced_entry_once() -> None:
    tier = LocalTier(30)
    for size in (10, 20, 5):
        tier.put("a", Entry(bytes(size), None))
    assert tier.num_bytes == 5


def test_an_entry_larger_than_the_local_tier_is_not_kept() -> None:
    tier = LocalTier(30)
    tier.put("a", Entry(bytes(10), None))
    tier.put("a", Entry(bytes(31), None))
    assert tier.get("a") is None
    assert tier.num_bytes == 0


class Work:
    """An awaitable job that ends when it is told to."""

    def __init__(self, result: str | Exception = "done") -> None:
        self.result = result
        self.release = asyncio.Event()
        self.num_started = 0
        self.was_cancelled = False

    async def __call__(self) -> str:
        self.num_started += 1
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def start(flights: SingleFlight[str], key: str, work: Work) -> asyncio.Task[str]:
    return asyncio.create_task(flights.run(key, work))


async def let_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_identical_work_runs_once() -> None:
    flights: SingleFlight[str] = SingleFlight()
    work = Work()
    waiters = [start(flights, "k", work) for _ in range(10)]
    await let_run()
    work.release.set()
    assert await asyncio.gather(*waiters) == ["done"] * 10
    assert work.num_started == 1
    assert len(flights) == 0


async def test_different_work_is_not_joined() -> None:
    flights: SingleFlight[str] = SingleFlight()
    works = [Work("a"), Work("b")]
    for work in works:
        work.release.set()
    assert await asyncio.gather(*(flights.run(work.result, work) for work in works)) == ["a", "b"]


async def test_finished_work_is_not_remembered() -> None:
    flights: SingleFlight[str] = SingleFlight()
    work = Work()
    work.release.set()
    for _ in range(3):
        await flights.run("k", work)
    assert work.num_started == 3


async def test_an_error_reaches_every_waiter_and_nobody_later() -> None:
    flights: SingleFlight[str] = SingleFlight()
    failing, working = Work(ValueError("no")), Work()
    waiters = [start(flights, "k", failing) for _ in range(3)]
    await let_run()
    failing.release.set()
    working.release.set()
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(result) for result in results] == [ValueError] * 3
    assert await flights.run("k", working) == "done"


async def test_a_waiter_that_leaves_does_not_disturb_the_others() -> None:
    flights: SingleFlight[str] = SingleFlight()
    work = Work()
    first, second = start(flights, "k", work), start(flights, "k", work)
    await let_run()
    first.cancel()
    await let_run()
    assert first.cancelled()
    work.release.set()
    assert await second == "done"
    assert not work.was_cancelled


async def test_the_last_waiter_to_leave_cancels_the_work() -> None:
    flights: SingleFlight[str] = SingleFlight()
    work = Work()
    waiters = [start(flights, "k", work) for _ in range(3)]
    await let_run()
    for waiter in waiters:
        waiter.cancel()
    await let_run()
    assert work.was_cancelled
    assert len(flights) == 0


async def test_a_newcomer_does_not_join_work_that_is_being_cancelled() -> None:
    flights: SingleFlight[str] = SingleFlight()
    abandoned, work = Work(), Work()
    waiter = start(flights, "k", abandoned)
    await let_run()
    waiter.cancel()
    work.release.set()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert await flights.run("k", work) == "done"
    assert len(flights) == 0
