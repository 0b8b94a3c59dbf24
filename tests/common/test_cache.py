import asyncio
import random
from collections.abc import Callable

import pytest
import torch

from common.cache import Entry, LocalTier, SingleFlight, TieredCache
from common.embedding import EmbeddingSpec, VisionEmbedding, pack, unpack
from common.errors import UnavailableError

MISSES = "fovea_embedding_cache_misses_total"
LOCAL_HITS = 'fovea_embedding_cache_hits_total{tier="local"}'
REDIS_HITS = 'fovea_embedding_cache_hits_total{tier="redis"}'

Counted = Callable[[str], float]


class DictTier:
    """A remote tier that keeps everything."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.num_gets = 0
        self.holders: dict[str, str] = {}
        self.closed = False

    async def get(self, key: str, max_bytes: int) -> bytes | None:
        self.num_gets += 1
        value = self.values.get(key)
        return value if value is None else value[:max_bytes]

    def put(self, key: str, data: bytes) -> None:
        self.values[key] = data

    def discard(self, key: str) -> None:
        self.values.pop(key, None)

    def record_encode(self, num_bytes: int, seconds: float) -> None: ...

    async def lease(self, key: str, holder: str, seconds: float, max_bytes: int) -> bool:
        return self.holders.setdefault(key, holder) == holder

    async def keys(self) -> list[str]:
        return list(self.values)

    def stats(self) -> dict[str, int]:
        return {"num_gets": self.num_gets}

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


def key_of(image: str, params: str = "p") -> str:
    return f"namespace:{image}:{params}"


async def test_what_was_begun_before_its_image_was_discarded_is_not_kept(
    cache: TieredCache, remote: DictTier, embedding: VisionEmbedding, spec: EmbeddingSpec
) -> None:
    before = cache.moment
    cache.discard_image("a")
    for image in "ab":
        cache.put(key_of(image), pack(embedding, key=key_of(image)), since=before)
    assert remote.values.keys() == {key_of("b")} == set(await cache.get_many({key_of(i): spec for i in "ab"}))
    cache.put(key_of("a"), pack(embedding, key=key_of("a")), since=cache.moment)
    assert key_of("a") in remote.values


async def test_what_was_begun_before_everything_was_discarded_is_not_kept(
    cache: TieredCache, remote: DictTier, embedding: VisionEmbedding
) -> None:
    before = cache.moment
    cache.clear_local()
    cache.put(key_of("a"), pack(embedding, key=key_of("a")), since=before)
    assert remote.values == {}


async def test_of_many_discarded_images_none_comes_back(
    cache: TieredCache, remote: DictTier, embedding: VisionEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.cache._MAX_DISCARDED", 10)
    before = cache.moment
    for index in range(50):
        cache.discard_image(str(index))
    for index in range(50):
        cache.put(key_of(str(index)), pack(embedding, key=key_of(str(index))), since=before)
    assert remote.values == {}


async def test_read_of_redis_during_which_its_image_was_discarded_is_not_kept(
    remote: DictTier, embedding: VisionEmbedding, spec: EmbeddingSpec
) -> None:
    class DiscardsMeanwhile(DictTier):
        async def get(self, key: str, max_bytes: int) -> bytes | None:
            cache.discard_image("a")
            return await super().get(key, max_bytes)

    cache = TieredCache(LocalTier(1024**2), slow := DiscardsMeanwhile())
    slow.values[key_of("a")] = pack(embedding, key=key_of("a"))
    assert (await cache.get_many({key_of("a"): spec})).keys() == {key_of("a")}
    assert await cache.tiers(key_of("a")) == ["redis"]


async def test_sweep_finds_an_image_under_every_namespace_and_params(cache: TieredCache, remote: DictTier) -> None:
    images = ("a", "b", "c", "a-c", "c-b", "c-c")  # two are frames of a clip
    names = [f"{namespace}:{image}:{params}" for namespace in "xy" for image in images for params in "pq"]
    remote.values = dict.fromkeys(names, b"")
    await asyncio.gather(*(cache.sweep(image) for image in "ab"))
    assert set(remote.values) == {name for name in names if ":c:" in name or ":c-c:" in name}


class SilentTier(DictTier):
    """Cannot say at first what it holds, and is slow about it."""

    num_failures = 2

    async def keys(self) -> list[str]:
        await asyncio.sleep(0.01)
        self.num_failures -= 1
        if self.num_failures >= 0:
            raise UnavailableError("no answer")
        return await super().keys()


@pytest.mark.parametrize("leaves", [False, True])
async def test_sweep_without_an_answer_or_anybody_waiting_is_made_later(
    monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    monkeypatch.setattr("common.cache._SWEEP_AGAIN_S", 0.01)
    remote = SilentTier()
    remote.values = dict.fromkeys(map(key_of, ("a", "a-c", "c")), b"")
    cache = TieredCache(LocalTier(1024**2), remote)
    sweep = asyncio.create_task(cache.sweep("a"))
    if leaves:
        await asyncio.sleep(0)
        sweep.cancel()
    await asyncio.wait([sweep])
    for _ in range(500):
        if len(remote.values) > 1:
            await asyncio.sleep(0.01)
    assert remote.values.keys() == {key_of("c")}
    await cache.aclose()


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


def entry(num_bytes: int, encode_ms: float = 0.0) -> Entry:
    features = torch.empty(0, 8)
    return Entry(bytes(num_bytes), VisionEmbedding({"features": features}, (1, 2, 2), encode_ms=encode_ms))


def kept(tier: LocalTier) -> set[str]:
    return set(tier)


def test_the_local_tier_keeps_what_was_dear_to_encode() -> None:
    tier = LocalTier(20)
    tier.put("dear", entry(10, encode_ms=500))
    for index in range(3):
        tier.put(f"cheap {index}", entry(10, encode_ms=5))
    assert kept(tier) == {"dear", "cheap 2"}


def test_the_local_tier_keeps_the_small_before_the_large_of_equal_cost() -> None:
    tier = LocalTier(20)
    tier.put("small", entry(5, encode_ms=100))
    tier.put("large", entry(15, encode_ms=100))
    tier.put("new", entry(10, encode_ms=100))
    assert kept(tier) == {"small", "new"}


def test_the_local_tier_keeps_what_is_used_often() -> None:
    tier = LocalTier(20)
    tier.put("often", entry(10, encode_ms=10))
    for _ in range(3):
        tier.get("often")
    for index in range(3):
        tier.put(f"once {index}", entry(10, encode_ms=25))
    assert kept(tier) == {"often", "once 2"}


def test_a_newcomer_worth_less_than_what_would_leave_for_it_is_not_admitted() -> None:
    tier = LocalTier(20)
    for key in "ab":
        tier.put(key, entry(10, encode_ms=100))
    tier.put("cheap and large", entry(20, encode_ms=1))
    assert kept(tier) == {"a", "b"}


def test_what_comes_back_weighs_more_than_what_comes_once() -> None:
    tier = LocalTier(10)
    for index in range(3):
        tier.put("again", entry(10, encode_ms=10))
        tier.put(f"once {index}", entry(10, encode_ms=10))
    assert kept(tier) == {"again"}


def test_what_was_dear_long_ago_leaves_in_the_end() -> None:
    tier = LocalTier(20)
    tier.put("dear", entry(10, encode_ms=500))
    for index in range(200):
        tier.put(str(index), entry(10, encode_ms=10))
    assert "dear" not in kept(tier)


def test_an_entry_of_unknown_cost_counts_as_the_others_do() -> None:
    tier = LocalTier(30)
    tier.put("dear", entry(10, encode_ms=90))
    tier.put("cheap", entry(10, encode_ms=10))
    tier.put("unknown", entry(10))
    tier.put("new", entry(10, encode_ms=50))
    assert kept(tier) == {"dear", "unknown", "new"}


def test_the_local_tier_evicts_as_a_search_for_the_lowest_priority_would() -> None:
    rng = random.Random(0)
    tier, age = LocalTier(400), 0.0
    model: dict[str, list[float]] = {}  # size, cost, uses, priority, order
    past_uses: dict[str, float] = {}
    for step in range(5000):
        key = str(rng.randint(0, 60))
        if rng.random() < 0.05:
            tier.discard(key)
            model.pop(key, None)
        elif tier.get(key) is not None:
            size, cost, uses, _, order = model[key]
            model[key] = [size, cost, uses + 1, age + (uses + 1) * cost / size, order]
        else:
            size, cost = rng.randint(5, 100), rng.uniform(1, 100)
            tier.put(key, entry(size, encode_ms=cost))
            uses = past_uses.pop(key, 0) + 1
            model[key] = [size, cost, uses, age + uses * cost / size, step]
            while sum(found[0] for found in model.values()) > 400:
                lowest = min(model, key=lambda name: (model[name][3], model[name][4]))
                _, _, past_uses[lowest], age, _ = model.pop(lowest)
        assert kept(tier) == model.keys()
        assert tier.num_bytes == sum(found[0] for found in model.values())


def test_entries_that_come_and_go_leave_nothing_behind() -> None:
    tier = LocalTier(100)
    for index in range(10_000):
        tier.put(str(index % 3), entry(10, encode_ms=1))
        tier.discard(str(index % 2))
    assert len(tier._heap) < 200


async def test_a_quarantined_namespace_is_a_miss_in_every_tier_and_is_not_written(
    cache: TieredCache, remote: DictTier, embedding: VisionEmbedding, spec: EmbeddingSpec, counted: Counted
) -> None:
    for key in ("bad:1:p", "good:1:p"):
        cache.put(key, pack(embedding, key=key))

    cache.quarantine("bad")

    wanted = dict.fromkeys(("bad:1:p", "good:1:p"), spec)
    assert (await cache.get_many(wanted)).keys() == {"good:1:p"}
    cache.put("bad:2:p", pack(embedding, key="bad:2:p"))
    assert await cache.get_many({"bad:2:p": spec}) == {}
    assert "bad:2:p" not in remote.values
    assert cache.report()["quarantined"] == ["bad"]
    assert counted("fovea_embedding_namespaces_quarantined_total") == 1


async def test_the_report_says_what_more_memory_would_bring(embedding: VisionEmbedding, spec: EmbeddingSpec) -> None:
    cache = TieredCache(LocalTier(1024), None)  # five frames of 192 bytes and their headers fill it three times over
    for index in range(1000):
        key = str(index % 15)
        if not await cache.get_many({key: spec}):
            cache.put(key, pack(embedding, key=key))
    ratios = [point["miss_ratio"] for point in cache.report()["miss_ratio_curve"]]
    assert ratios[0] == 1.0
    assert ratios[-1] == pytest.approx(0.015, abs=0.001)


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


async def test_local_tier_with_a_time_limit_keeps_nothing_longer() -> None:
    tier = LocalTier(30, ttl_s=0.05)
    tier.put("a", entry(10))
    assert tier.get("a")
    await asyncio.sleep(0.06)
    assert tier.get("a") is None and tier.num_bytes == 0


@pytest.fixture(params=["cuda", "stand-in"])
def page_locking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often unused blocks were given back. The stand-in does all but lock the pages."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch has no allocator of page-locked memory")
    if request.param == "stand-in":
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options))
    emptied: list[bool] = []
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: emptied.append(True))
    return lambda: len(emptied)


def framed(key: str, embedding: VisionEmbedding) -> Entry:
    data = pack(embedding, key=key)
    return Entry(data, unpack(data, key=key))


def test_pinned_tier_keeps_frame_and_tensors_in_one_block(
    embedding: VisionEmbedding, page_locking: Callable[[], int]
) -> None:
    original = framed(
        "k", VisionEmbedding({"features": embedding.features, "deepstack_0": embedding.features}, (1, 4, 6))
    )
    tier = LocalTier(1024**2, pinned=True)
    tier.put("k", original)
    kept = tier.get("k")
    assert kept is not None and kept.embedding is not None and original.embedding is not None
    assert bytes(kept.data) == original.data and kept.data is not original.data
    tensors = kept.embedding.tensors
    for name, tensor in original.embedding.tensors.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].data_ptr() != tensor.data_ptr()
        assert not torch.cuda.is_available() or tensors[name].is_pinned()
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1
    assert torch.equal(unpack(kept.data, key="k").features, embedding.features)


def test_pinned_tier_counts_what_the_allocator_takes_and_gives_unused_blocks_back(
    embedding: VisionEmbedding, page_locking: Callable[[], int]
) -> None:
    size = len(framed("0", embedding).data)
    assert 256 < size < 512
    tier = LocalTier(2048, pinned=True)
    for index in range(4):
        tier.put(str(index), framed(str(index), embedding))
    assert (len(tier), tier.num_bytes, page_locking()) == (4, 2048, 0)
    for index in range(4, 12):
        tier.put(str(index), framed(str(index), embedding))
    assert (len(tier), tier.num_bytes, page_locking()) == (4, 2048, 4)


async def test_claim_of_another_process_is_waited_for_until_its_entry_is_there(
    cache: TieredCache, remote: DictTier, embedding: VisionEmbedding, spec: EmbeddingSpec
) -> None:
    other = TieredCache(LocalTier(1024**2), remote)
    assert await cache.claim("k", spec, "a")
    assert await cache.claim("k", spec, "a")
    assert not await other.claim("k", spec, "b")
    waiting = asyncio.create_task(other.wait_for("k", spec, "b"))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    cache.put("k", pack(embedding, key="k"))
    hit = await waiting
    assert hit is not None and hit.tier == "redis"


async def test_claim_of_a_dead_process_ends_by_itself(
    cache: TieredCache, remote: DictTier, spec: EmbeddingSpec
) -> None:
    remote.holders["k"] = "dead"
    waiting = asyncio.create_task(cache.wait_for("k", spec, "b"))
    await asyncio.sleep(0.1)
    del remote.holders["k"]
    assert await waiting is None


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
