import asyncio
import logging
import os
import signal
import socket
import socketserver
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import redis
from pydantic import SecretStr

from common.cache import LocalTier, TieredCache
from common.config import MIB, CacheConfig
from common.embedding import EmbeddingSpec, VisionEmbedding, pack
from common.errors import UnavailableError
from common.local_redis import LocalRedis
from common.redis_store import CircuitBreaker, RedisTier, open_cache
from deploy.bench.faults import FaultProxy

GET_ERRORS = 'fovea_redis_errors_total{operation="get"}'
DROPPED = "fovea_redis_dropped_writes_total"
SLOW = 'fovea_redis_skipped_reads_total{reason="slow"}'

Counted = Callable[[str], float]


@pytest.fixture
async def tier(local_redis: LocalRedis) -> AsyncIterator[RedisTier]:
    local_redis.start()  # unless it runs
    tier = RedisTier(CacheConfig(), local_redis.url)
    yield tier
    await tier.aclose()


@pytest.fixture
def client(local_redis: LocalRedis) -> Iterator[redis.Redis]:
    """Someone else on the same server."""
    local_redis.start()
    with redis.Redis.from_url(local_redis.url, protocol=2) as client:
        yield client


async def eventually(condition: Callable[[], Awaitable[object]]) -> None:
    for _ in range(500):
        if await condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("waited 5 s in vain")


async def seconds(action: Awaitable[object]) -> float:
    started = time.perf_counter()
    await action
    return time.perf_counter() - started


def socket_of(server: LocalRedis) -> Path:
    return Path(unquote(urlsplit(server.url).path))


def at_port(server: LocalRedis, port: int) -> str:
    """The URL of `server` by way of a proxy."""
    parts = urlsplit(server.url)
    return f"redis://{parts.username}:{parts.password}@127.0.0.1:{port}"


def stored(client: redis.Redis, key: str) -> object:
    return client.getrange(f"fovea:{key}", 0, -1)


@pytest.mark.redis
class TestWithAServer:
    async def test_what_one_tier_writes_another_reads(self, tier: RedisTier, local_redis: LocalRedis) -> None:
        values = {f"written-{n}": os.urandom(MIB + n) for n in range(12)}
        for key, value in values.items():
            tier.put(key, value)
        reader = RedisTier(CacheConfig(), local_redis.url)
        await eventually(lambda: reader.get("written-11", 2 * MIB))

        read = await asyncio.gather(*(reader.get(key, 2 * MIB) for key in values))

        assert read == list(values.values())
        assert tier.stats()["unwritten_bytes"] == 0
        await reader.aclose()

    async def test_an_absent_key_is_none_and_no_error(self, tier: RedisTier, counted: Counted) -> None:
        assert await tier.get("absent", 100) is None
        assert counted(GET_ERRORS) == 0

    async def test_no_more_of_a_value_is_read_than_was_asked_for(self, tier: RedisTier, client: redis.Redis) -> None:
        client.set("fovea:long", bytes(4 * MIB))
        value = await tier.get("long", 1000)
        assert value == bytes(1000)

    async def test_an_entry_expires_around_its_time(self, local_redis: LocalRedis, client: redis.Redis) -> None:
        tier = RedisTier(CacheConfig(ttl_s=1), local_redis.url)
        tier.put("brief", b"value")
        await eventually(lambda: tier.get("brief", 100))
        written = time.monotonic()

        async def is_gone() -> bool:
            return not stored(client, "brief")

        await eventually(is_gone)
        assert 0.5 < time.monotonic() - written < 2.0
        await tier.aclose()

    async def test_a_discarded_key_is_gone_after_a_write_that_still_waited(self, tier: RedisTier) -> None:
        tier.put("discarded", b"value")
        tier.discard("discarded")
        tier.put("marker", b"value")
        await eventually(lambda: tier.get("marker", 100))
        assert await tier.get("discarded", 100) is None

    async def test_closing_finishes_the_queued_writes(self, local_redis: LocalRedis, client: redis.Redis) -> None:
        tier = RedisTier(CacheConfig(), local_redis.url)
        for n in range(10):
            tier.put(f"closing-{n}", bytes([n]) * 100)
        await tier.aclose()
        assert all(stored(client, f"closing-{n}") for n in range(10))

    async def test_a_closed_tier_has_nothing_and_raises_nothing(self, local_redis: LocalRedis) -> None:
        tier = RedisTier(CacheConfig(), local_redis.url)
        await tier.aclose()
        tier.put("k", b"value")
        assert await tier.get("k", 100) is None
        assert not await tier.ping()

    async def test_more_than_the_queue_holds_is_dropped_and_counted(
        self, local_redis: LocalRedis, counted: Counted
    ) -> None:
        tier = RedisTier(CacheConfig(write_queue_bytes=3000), local_redis.url)
        for n in range(5):
            tier.put(f"dropped-{n}", bytes(1000))
        assert counted(DROPPED) == 2
        await eventually(lambda: tier.get("dropped-2", 2000))
        assert await tier.get("dropped-3", 2000) is None
        await tier.aclose()

    async def test_a_wrong_password_is_a_miss(self, local_redis: LocalRedis, counted: Counted) -> None:
        user, _, rest = local_redis.url.rpartition("@")
        tier = RedisTier(CacheConfig(), f"{user}x@{rest}")
        assert await tier.get("k", 100) is None
        assert counted(GET_ERRORS) == 1
        await tier.aclose()

    async def test_the_password_is_neither_shown_nor_logged(
        self, local_redis: LocalRedis, caplog: pytest.LogCaptureFixture
    ) -> None:
        password = local_redis.url.split(":")[2].split("@")[0]
        tier = RedisTier(CacheConfig(), local_redis.url.replace("redis.sock", "nothing.sock"))
        for _ in range(6):
            await tier.get("k", 100)
        assert "nothing.sock" in caplog.text
        assert password not in caplog.text + str(tier.stats())
        await tier.aclose()

    async def test_a_restarted_server_is_used_again(self, local_redis: LocalRedis, tier: RedisTier) -> None:
        tier.put("k", b"before")
        await eventually(lambda: tier.get("k", 100))
        pid = local_redis.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

        async def notices() -> bool:
            return not await tier.ping()

        await eventually(notices)
        assert await tier.get("k", 100) is None

        local_redis.start()
        tier.put("k", b"after")
        await eventually(lambda: tier.get("k", 100))
        assert await tier.get("k", 100) == b"after"

    async def test_the_breaker_closes_when_the_server_is_back(self, local_redis: LocalRedis, tier: RedisTier) -> None:
        local_redis.stop()
        for _ in range(5):
            assert await tier.get("k", 100) is None
        assert tier.stats()["breaker"] == "open"

        local_redis.start()
        await eventually(tier.ping)
        assert tier.stats()["breaker"] == "closed"

    async def test_a_stopped_process_costs_one_time_limit(self, local_redis: LocalRedis, tier: RedisTier) -> None:
        pid = local_redis.pid
        assert pid is not None and await tier.ping()
        os.kill(pid, signal.SIGSTOP)
        try:
            assert await seconds(tier.get("k", 1000)) < 1.0
        finally:
            os.kill(pid, signal.SIGCONT)

    async def test_the_cache_of_a_configured_url_is_shared(
        self, local_redis: LocalRedis, embedding: VisionEmbedding, spec: EmbeddingSpec
    ) -> None:
        config = CacheConfig(redis_url=local_redis.url)
        encoder, decoder = open_cache(config), open_cache(config)
        encoder.put("shared", pack(embedding, key="shared"))
        await encoder.aclose()
        assert (await decoder.get_many({"shared": spec}))["shared"].tier == "redis"
        await decoder.aclose()

    async def test_a_cache_with_another_secret_has_nothing(
        self, local_redis: LocalRedis, embedding: VisionEmbedding, spec: EmbeddingSpec
    ) -> None:
        secrets = [SecretStr("a secret of ours"), SecretStr("a secret of ours"), SecretStr("a secret of theirs"), None]
        caches = [open_cache(CacheConfig(redis_url=local_redis.url, secret=secret)) for secret in secrets]
        caches[0].put("sealed", pack(embedding, key="sealed", seal=caches[0].seal))
        await caches[0].aclose()
        assert [bool(await cache.get_many({"sealed": spec})) for cache in caches[1:]] == [True, False, False]
        for cache in caches[1:]:
            await cache.aclose()

    async def test_a_pinned_entry_does_not_expire(self, tier: RedisTier, client: redis.Redis) -> None:
        tier.put("pinned", b"value")
        await eventually(lambda: tier.get("pinned", 100))
        assert await tier.pin("pinned")
        assert await tier.pin("pinned")
        assert client.persist("fovea:pinned") == 0
        assert not await tier.pin("absent")

    async def test_a_pinned_entry_stays_pinned_when_it_is_written_again(
        self, tier: RedisTier, client: redis.Redis
    ) -> None:
        tier.put("kept", b"value")
        await eventually(lambda: tier.pin("kept"))
        tier.put("kept", b"other")

        async def is_written() -> bool:
            return stored(client, "kept") == b"other"

        await eventually(is_written)
        assert client.persist("fovea:kept") == 0

    async def test_a_discard_that_the_server_did_not_hear_is_made_later(
        self, local_redis: LocalRedis, tier: RedisTier, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("common.redis_store._DISCARD_AGAIN_S", 0.05)
        client.set("fovea:unheard", b"value")
        proxy = FaultProxy(socket_of(local_redis), latency_s=60.0, bytes_per_s=0)
        with proxy:
            slow = RedisTier(CacheConfig(), at_port(local_redis, proxy.port))
            slow.discard("unheard")
            await asyncio.sleep(0.3)
            assert stored(client, "unheard") == b"value"
            proxy.latency_s = 0.0

            async def is_gone() -> bool:
                return not stored(client, "unheard")

            await eventually(is_gone)
            await slow.aclose()

    async def test_keys_have_those_that_wait_to_be_written(self, tier: RedisTier) -> None:
        keys = [f"{n:064x}:{n:064x}-{n:064x}:max_pixels=1" for n in range(4)]
        for key in keys:
            tier.put(key, bytes(1024**2))
        assert await tier.keys() == keys

    async def test_keys_of_a_server_that_does_not_answer_are_not_none(self, local_redis: LocalRedis) -> None:
        local_redis.stop()
        gone = RedisTier(CacheConfig(), local_redis.url)
        with pytest.raises(UnavailableError, match=r"cache\.redis_url"):
            await gone.keys()
        await gone.aclose()

    async def test_keys_are_those_of_embeddings(self, tier: RedisTier, client: redis.Redis) -> None:
        keys = [f"{n:064x}:{n:064x}:max_pixels=1" for n in range(1500)]
        for key in keys:
            client.set(f"fovea:{key}", b"value", px=60_000)
        client.set("fovea:something-else", b"value", px=60_000)
        assert await tier.keys() == keys

    async def test_a_store_slower_than_encoding_is_skipped_until_it_is_fast_again(
        self, local_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch, counted: Counted
    ) -> None:
        monkeypatch.setattr("common.redis_store._PROBE_INTERVAL_S", 0.01)
        with FaultProxy(socket_of(local_redis), latency_s=0.05, bytes_per_s=0) as proxy:
            tier = RedisTier(CacheConfig(), at_port(local_redis, proxy.port))
            tier.put("k", bytes(1000))
            await eventually(lambda: tier.get("k", 1000))
            tier.record_encode(1000, 0.01)
            assert await tier.get("k", 1000) is None
            assert counted(SLOW) == 1

            proxy.latency_s = 0.0
            await eventually(lambda: tier.get("k", 1000))
            await tier.aclose()

    async def test_a_large_value_over_a_slow_line_costs_one_time_limit_and_then_nothing(
        self, local_redis: LocalRedis, client: redis.Redis
    ) -> None:
        client.set("fovea:large", bytes(4 * MIB), px=60_000)
        with FaultProxy(socket_of(local_redis), latency_s=0.0, bytes_per_s=1e6) as proxy:
            tier = RedisTier(CacheConfig(), at_port(local_redis, proxy.port))
            tier.record_encode(4 * MIB, 0.03)
            assert 0.1 < await seconds(tier.get("large", 4 * MIB)) < 0.4  # whole, it would take 4 s
            assert min([await seconds(tier.get("large", 4 * MIB)) for _ in range(3)]) < 0.01
            await tier.aclose()

    async def test_a_damaged_value_in_redis_is_a_miss_and_is_overwritten(
        self,
        tier: RedisTier,
        client: redis.Redis,
        embedding: VisionEmbedding,
        spec: EmbeddingSpec,
        counted: Counted,
    ) -> None:
        data = pack(embedding, key="damaged")
        client.set("fovea:damaged", data[:200] + b"?" + data[201:])
        cache = TieredCache(LocalTier(0), tier)
        assert await cache.get_many({"damaged": spec}) == {}
        assert counted('fovea_embedding_cache_rejected_total{reason="format"}') == 1

        cache.put("damaged", data)
        await eventually(lambda: cache.get_many({"damaged": spec}))
        assert stored(client, "damaged") == data


@contextmanager
def peer(*chunks: bytes, pause_s: float = 0.0) -> Iterator[str]:
    """The URL of a server that answers whatever arrives with `chunks`."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                while self.request.recv(65536):
                    for chunk in chunks:
                        self.request.sendall(chunk)
                        time.sleep(pause_s)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"redis://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"redis://127.0.0.1:{listener.getsockname()[1]}"


async def test_a_refused_port_costs_little_and_then_nothing(refused: str, counted: Counted) -> None:
    tier = RedisTier(CacheConfig(), refused)
    assert min([await seconds(tier.get("k", MIB)) for _ in range(5)]) < 0.05
    assert min([await seconds(tier.get("k", MIB)) for _ in range(5)]) < 0.005
    assert counted(GET_ERRORS) == 5
    await tier.aclose()


async def test_a_hung_server_costs_its_time_limit_and_then_nothing(silent: str, counted: Counted) -> None:
    tier = RedisTier(CacheConfig(), silent)
    assert 0.1 <= min([await seconds(tier.get("k", MIB)) for _ in range(5)]) < 0.2
    assert min([await seconds(tier.get("k", MIB)) for _ in range(5)]) < 0.005
    assert counted(GET_ERRORS) == 5
    await tier.aclose()


async def test_a_request_never_waits_for_the_probe_of_an_open_breaker(
    silent: str, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    monkeypatch.setattr("common.redis_store._PROBE_INTERVAL_S", 0.0)
    tier = RedisTier(CacheConfig(), silent)
    tier._breaker = CircuitBreaker(cooldown_s=0.01)
    for _ in range(5):
        await tier.get("k", MIB)
    waits = []
    for _ in range(20):
        waits.append(await seconds(tier.get("k", MIB)))
        await asyncio.sleep(0.02)
    assert sum(wait < 0.02 for wait in waits) >= 18
    assert counted(GET_ERRORS) > 5
    assert counted('fovea_redis_skipped_reads_total{reason="breaker"}') == 20
    await tier.aclose()


async def test_many_values_of_a_hung_server_cost_one_time_limit(silent: str) -> None:
    tier = RedisTier(CacheConfig(), silent)
    assert await seconds(asyncio.gather(*(tier.get(f"k{n}", MIB) for n in range(50)))) < 0.5
    await tier.aclose()


async def test_the_event_loop_runs_on_while_a_server_hangs(silent: str) -> None:
    tier = RedisTier(CacheConfig(timeout_s=0.5), silent)
    tier.put("k", bytes(MIB))
    reading = asyncio.create_task(tier.get("k", MIB))
    num_turns = 0
    while not reading.done():
        await asyncio.sleep(0.001)
        num_turns += 1
    assert num_turns > 20
    await tier.aclose()


async def test_a_server_that_drips_is_cut_off(counted: Counted) -> None:
    with peer(b"$1000\r\n", *[b"x"] * 1000, pause_s=0.02) as url:
        tier = RedisTier(CacheConfig(), url)
        assert await seconds(tier.get("k", 1000)) < 1.0  # whole, it would take 20 s
        assert counted(GET_ERRORS) == 1
        await tier.aclose()


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b":5\r\n", b"*2\r\n:1\r\n:2\r\n", b"+OK\r\n", b"-ERR no\r\n", b"\0" * 99],
)
async def test_a_server_that_is_not_redis_is_a_miss(answer: bytes, spec: EmbeddingSpec) -> None:
    with peer(answer) as url:
        cache = open_cache(CacheConfig(redis_url=url))
        assert await cache.get_many({"k": spec}) == {}
        await cache.aclose()


async def test_writes_to_a_hung_server_are_dropped_and_counted(silent: str, counted: Counted) -> None:
    tier = RedisTier(CacheConfig(write_queue_bytes=10_000), silent)
    for n in range(8):
        tier.put(f"k{n}", bytes(1000))
    await tier.aclose()
    assert counted(DROPPED) == 8


async def test_trouble_is_logged_once(refused: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tier = RedisTier(CacheConfig(), refused)
    for _ in range(20):
        await tier.get("k", 100)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    await tier.aclose()


@pytest.mark.parametrize("prefix", ["redis://", "redis://user:pass%40word@", "rediss://:password@"])
async def test_a_url_with_or_without_user_and_tls_is_understood(refused: str, prefix: str) -> None:
    tier = RedisTier(CacheConfig(), f"{refused.replace('redis://', prefix)}/1")
    assert not await tier.ping()
    assert str(tier.stats()["address"]).endswith(f"//{refused.removeprefix('redis://')}/1")
    await tier.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "localhost:6379",
        "redis://localhost?db=x",
        "redis://localhost?max_connections=5",
        "redis://localhost?ssl_ca_certs=ca.pem",
        "rediss://localhost?ssl_cert_reqs=optional",
        "redis+cluster://localhost/3",
        "unix+cluster:///redis.sock",
    ],
)
def test_a_url_that_is_not_of_redis_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        RedisTier(CacheConfig(), url)


class TestCircuitBreaker:
    @pytest.fixture
    def now(self) -> list[float]:
        return [100.0]

    @pytest.fixture
    def breaker(self, now: list[float]) -> CircuitBreaker:
        return CircuitBreaker(max_failures=5, cooldown_s=2.0, clock=lambda: now[0])

    @pytest.fixture
    def open_breaker(self, breaker: CircuitBreaker) -> CircuitBreaker:
        for _ in range(5):
            breaker.record_failure()
        return breaker

    def test_it_opens_after_five_failures_in_a_row(self, breaker: CircuitBreaker) -> None:
        for _ in range(4):
            breaker.record_failure()
        breaker.record_success()
        for _ in range(4):
            breaker.record_failure()
        assert breaker.admit()
        breaker.record_failure()
        assert not breaker.admit()

    def test_it_lets_one_probe_through_after_the_pause(self, open_breaker: CircuitBreaker, now: list[float]) -> None:
        now[0] += 2.0
        assert [open_breaker.admit() for _ in range(3)] == [True, False, False]

    def test_a_failed_probe_starts_another_pause(self, open_breaker: CircuitBreaker, now: list[float]) -> None:
        now[0] += 2.0
        assert open_breaker.admit()
        open_breaker.record_failure()
        now[0] += 1.9
        assert not open_breaker.admit()
        now[0] += 0.2
        assert open_breaker.admit()

    def test_a_probe_that_succeeds_closes_it(self, open_breaker: CircuitBreaker, now: list[float]) -> None:
        now[0] += 2.0
        assert open_breaker.admit()
        open_breaker.record_success()
        assert all(open_breaker.admit() for _ in range(5))

    def test_a_probe_that_never_reports_is_followed_by_another(
        self, open_breaker: CircuitBreaker, now: list[float]
    ) -> None:
        now[0] += 2.0
        assert open_breaker.admit()
        now[0] += 2.0
        assert open_breaker.admit()
