"""The shared tier in Redis: short time limits, a circuit breaker, reads that pay, writes in the background.

An error of any kind reads as absence and is counted; nothing is raised to callers.
"""

import asyncio
import logging
import math
import random
import re
import ssl
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.connection import SSLConnection, parse_url
from redis.retry import Retry

from common import metrics
from common.cache import EmbeddingCache, LocalTier, TieredCache
from common.config import CacheConfig
from common.embedding import CHECKSUM, keyed_seal
from common.errors import UnavailableError
from common.read_policy import ReadPolicy
from common.redis_connection import Argument, RedisConnection, RedisEndpoint, RedisReplyError, Reply

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NUM_READERS = 4
_PROBE_INTERVAL_S = 1.0
_MAX_NAME_BYTES = 1024
_DISCARD_AGAIN_S = 2.0
_KEY = re.compile(r"[0-9a-f]{64}:[0-9a-f]{64}(-[0-9a-f]{64})?:.+")  # two digests of two frames
_TLS_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
_OPTIONS = {"host", "port", "path", "username", "password", "db"}


class CircuitBreaker:
    """Opens after `max_failures` in a row; from then on lets one call in `cooldown_s` through, until one succeeds."""

    def __init__(
        self, *, max_failures: int = 5, cooldown_s: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_failures = max_failures
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._num_failures = 0
        self._next_probe = 0.0

    @property
    def is_open(self) -> bool:
        return self._num_failures >= self._max_failures

    def admit(self) -> bool:
        """Whether a call may be made now. While open, a call that is admitted is the probe."""
        if not self.is_open:
            return True
        if self._clock() < self._next_probe:
            return False
        self._next_probe = self._clock() + self._cooldown_s
        return True

    def record_success(self) -> None:
        self._num_failures = 0

    def record_failure(self) -> None:
        self._num_failures += 1
        self._next_probe = self._clock() + self._cooldown_s


class _Servers(Protocol):
    """Where keys are. Its methods may block, and raise what sockets and redis-py raise."""

    def locate(self, name: bytes) -> RedisEndpoint: ...

    def endpoints(self) -> list[RedisEndpoint]: ...

    def forget(self) -> None:
        """What is known may be out of date."""


class _OneServer:
    def __init__(self, endpoint: RedisEndpoint) -> None:
        self._endpoint = endpoint

    def locate(self, name: bytes) -> RedisEndpoint:
        return self._endpoint

    def endpoints(self) -> list[RedisEndpoint]:
        return [self._endpoint]

    def forget(self) -> None:
        pass


class _Cluster:
    """The nodes of a Redis Cluster, by redis-py's map of the slots. Thread-safe."""

    def __init__(self, seed: RedisEndpoint, config: CacheConfig, tls: dict[str, Any]) -> None:
        self._seed = seed
        self._options: dict[str, Any] = {
            "host": seed.host,
            "port": seed.port,
            "username": seed.username,
            "password": seed.password,
            "socket_connect_timeout": config.connect_timeout_s,
            "socket_timeout": config.timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "driver_info": None,  # a user who may not send CLIENT will do
            **({"ssl": True, **tls} if seed.tls is not None else {}),
        }
        self._lock = threading.Lock()
        self._map: RedisCluster | None = None

    def locate(self, name: bytes) -> RedisEndpoint:
        node = self._slots().get_node_from_key(name)  # type: ignore[no-untyped-call]  # of redis-py
        if node is None:
            raise ConnectionError("no node of the cluster has the slot of this key")
        return self._endpoint(node)

    def endpoints(self) -> list[RedisEndpoint]:
        nodes = self._slots().get_primaries()  # type: ignore[no-untyped-call]  # of redis-py
        return [self._endpoint(node) for node in nodes]

    def forget(self) -> None:
        with self._lock:
            stale, self._map = self._map, None
        if stale is not None:
            stale.close()

    def _slots(self) -> RedisCluster:
        with self._lock:
            if self._map is None:
                self._map = RedisCluster(**self._options)
            return self._map

    def _endpoint(self, node: Any) -> RedisEndpoint:
        return replace(self._seed, host=node.host, port=node.port)


class _Answer(NamedTuple):
    """`reply` is None if there was none, and for a SET NX of a name that is taken."""

    reply: Reply
    seconds: float


_FAILED = _Answer(None, 0.0)


class _Write(NamedTuple):
    """`data` None: the entry is to be removed, which is tried until it has expired anyway."""

    key: str
    data: bytes | None
    deadline: float


class _Lane:
    """Threads for one purpose, and the connections they block on."""

    def __init__(self, config: CacheConfig, servers: _Servers, num_threads: int) -> None:
        self._config = config
        self._servers = servers
        self._idle: defaultdict[RedisEndpoint, list[RedisConnection]] = defaultdict(list)
        self._lock = threading.Lock()
        self._is_closed = False
        self.threads = ThreadPoolExecutor(num_threads, thread_name_prefix="redis")

    def call(self, at: bytes | RedisEndpoint, *command: Argument, limit_s: float, max_bytes: int = 0) -> _Answer:
        """Blocks. `at` is a server or a key on it."""
        try:
            connection = self._take(self._servers.locate(at) if isinstance(at, bytes) else at)
        except Exception:
            self._servers.forget()
            raise
        started = time.monotonic()
        try:
            reply = connection.call(*command, limit_s=limit_s, max_bytes=max_bytes)
        except RedisReplyError as exc:
            self._give_back(connection)
            if str(exc).startswith(("MOVED", "ASK", "CLUSTERDOWN")):
                self._servers.forget()
            raise
        except BaseException:
            connection.close()
            raise
        self._give_back(connection)
        return _Answer(reply, time.monotonic() - started)

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._is_closed = True
            idle = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
        for connection in idle:
            connection.close()

    def _take(self, endpoint: RedisEndpoint) -> RedisConnection:
        with self._lock:
            idle = self._idle[endpoint]
            while idle:
                connection = idle.pop()
                if not connection.is_stale():
                    return connection
                connection.close()
        return RedisConnection(
            endpoint, connect_timeout_s=self._config.connect_timeout_s, silence_s=self._config.timeout_s
        )

    def _give_back(self, connection: RedisConnection) -> None:
        with self._lock:
            if not self._is_closed:
                self._idle[connection.endpoint].append(connection)
                return
        connection.close()


class RedisTier:
    """A RemoteTier on a Redis server or cluster. Belongs to one event loop, which never waits for a socket.

    `url` is redis://, rediss:// or unix://, or redis+cluster:// or rediss+cluster:// with any node of a cluster.
    Raises ValueError for another one.
    """

    def __init__(self, config: CacheConfig, url: str) -> None:
        self._config = config
        self._address = _address(url)
        self._servers = _servers(config, url)
        self._readers = _Lane(config, self._servers, _NUM_READERS)
        self._writer = _Lane(config, self._servers, 1)
        self._free_readers = asyncio.Semaphore(_NUM_READERS)
        self._breaker = CircuitBreaker()
        self._policy = ReadPolicy()
        self._num_failures = 0
        self._probing: asyncio.Task[bytes | None] | None = None
        self._next_probe = 0.0
        self._unwritten: deque[_Write] = deque()
        self._num_unwritten_bytes = 0
        self._writing: asyncio.Task[None] | None = None
        self._is_closed = False

    async def get(self, key: str, max_bytes: int) -> bytes | None:
        if self._breaker.is_open or not self._policy.pays(max_bytes):
            metrics.redis_skipped_reads.inc(tags={"reason": "breaker" if self._breaker.is_open else "slow"})
            self._probe(key, max_bytes)
            return None
        num_failures = self._num_failures
        async with self._free_readers:
            if self._num_failures != num_failures:
                return None  # those who were first have waited for nothing
            return await self._read(key, max_bytes)

    def put(self, key: str, data: bytes) -> None:
        if self._num_unwritten_bytes + len(data) > self._config.write_queue_bytes:
            metrics.redis_dropped_writes.inc()
            return
        self._num_unwritten_bytes += len(data)
        self._write_later(_Write(key, data, 0.0))

    def discard(self, key: str) -> None:
        self._write_later(_Write(key, None, time.monotonic() + self._config.ttl_s))

    def record_encode(self, num_bytes: int, seconds: float) -> None:
        """What it took to make an entry. A read that is expected to take longer is not made."""
        self._policy.record_encode(num_bytes, seconds)

    async def lease(self, key: str, holder: str, seconds: float, max_bytes: int) -> bool:
        if self._breaker.is_open or not self._policy.pays(max_bytes):
            return True  # the entry would not be read, so nobody waits for it
        name = _name(f"lease:{key}")
        only_once = (b"NX", b"PX", b"%d" % round(seconds * 1000))
        answer = await self._call("lease", self._readers, name, b"SET", name, holder.encode(), *only_once)
        if answer is _FAILED or answer.reply is not None:
            return True
        range_ = (b"0", b"%d" % (_MAX_NAME_BYTES - 1))
        held = await self._call("lease", self._readers, name, b"GETRANGE", name, *range_, max_bytes=_MAX_NAME_BYTES)
        return held.reply in (holder.encode(), b"", None)

    async def pin(self, key: str) -> bool:
        name = _name(key)
        # PERSIST says 0 of a missing entry and of one that is pinned already, so it is sent to what is there.
        there = await self._call("pin", self._readers, name, b"GETRANGE", name, b"0", b"0", max_bytes=1)
        return bool(there.reply) and (await self._call("pin", self._readers, name, b"PERSIST", name)).reply is not None

    async def keys(self) -> list[str]:
        """Of the embeddings, those that wait to be written too, and not of what else may be on the server.

        Raises UnavailableError if not all can be read.
        """
        endpoints = await self._run("scan", self._readers, self._servers.endpoints, self._limit_s(0))
        if endpoints is None:
            raise self._unavailable()
        found = {key for endpoint in endpoints async for key in self._scan(endpoint)}
        return sorted(found.union(write.key for write in self._unwritten if write.data is not None))

    async def ping(self) -> bool:
        """Whether the server answers now. A question for the breaker too: while it is open the answer is no."""
        return (await self._call("ping", self._readers, _name(""), b"PING")).reply == b"PONG"

    def stats(self) -> dict[str, str | int]:
        """For `/health`."""
        return {
            "address": self._address,
            "breaker": "open" if self._breaker.is_open else "closed",
            "unwritten_bytes": self._num_unwritten_bytes,
        }

    async def aclose(self) -> None:
        """Gives the queued writes the time they may take, then drops what is left."""
        self._is_closed = True
        if self._probing is not None:
            self._probing.cancel()
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=self._limit_s(self._num_unwritten_bytes))
            self._writing.cancel()
            metrics.redis_dropped_writes.inc(len(self._unwritten))
        self._readers.close()
        self._writer.close()
        self._servers.forget()

    def _probe(self, key: str, max_bytes: int) -> None:
        """Now and then makes a read that was skipped all the same, for nobody, so that a recovery is noticed."""
        now = time.monotonic()
        if now >= self._next_probe and (self._probing is None or self._probing.done()):
            self._next_probe = now + _PROBE_INTERVAL_S
            self._probing = asyncio.create_task(self._read(key, max_bytes))

    async def _read(self, key: str, max_bytes: int) -> bytes | None:
        name = _name(key)
        started = time.monotonic()
        # GETRANGE, so that a value of any size costs the server no more than the one that is expected.
        range_ = (b"0", b"%d" % (max_bytes - 1))
        reply, seconds = await self._call("get", self._readers, name, b"GETRANGE", name, *range_, max_bytes=max_bytes)
        if reply is None:
            waited_s = time.monotonic() - started
            if waited_s >= self._config.timeout_s:
                self._policy.record_timeout(max_bytes, waited_s)
            return None
        if not isinstance(reply, bytes) or not reply:
            self._policy.record_miss(seconds)
            return None
        self._policy.record_hit(len(reply), seconds)
        return reply

    async def _scan(self, endpoint: RedisEndpoint) -> AsyncIterator[str]:
        cursor: Reply = b"0"
        while isinstance(cursor, bytes):
            command = (b"SCAN", cursor, b"MATCH", _name("*"), b"COUNT", b"1000")
            match (await self._call("scan", self._readers, endpoint, *command, max_bytes=_MAX_NAME_BYTES)).reply:
                case [cursor, list(names)]:
                    for name in names:
                        if isinstance(name, bytes) and _KEY.fullmatch(key := _key(name)):
                            yield key
                case _:
                    raise self._unavailable()
            if cursor == b"0":
                return

    def _unavailable(self) -> UnavailableError:
        return UnavailableError(
            f"Redis at {self._address} does not say what it holds (cache.redis_url)", code="cache_unavailable"
        )

    def _write_later(self, write: _Write) -> None:
        self._unwritten.append(write)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all())

    async def _write_all(self) -> None:
        while self._unwritten:
            write = self._unwritten[0]
            if not await self._write(write):
                self._give_up(write)
            self._unwritten.popleft()
            self._num_unwritten_bytes -= len(write.data or b"")

    async def _write(self, write: _Write) -> bool:
        name, data = _name(write.key), write.data
        if data is None:
            return (await self._call("unlink", self._writer, name, b"UNLINK", name)).reply is not None
        # Entries of one burst do not expire in one moment.
        ttl_ms = round(self._config.ttl_s * 1000 * random.uniform(0.9, 1.1))
        only_new = (b"SET", name, data, b"NX", b"PX", b"%d" % ttl_ms)
        answer = await self._call("set", self._writer, name, *only_new)
        if answer is not _FAILED and answer.reply is None:
            # It is there, though nobody could read it. If it is pinned, it stays so.
            answer = await self._call("set", self._writer, name, b"SET", name, data, b"XX", b"KEEPTTL")
        return answer.reply == b"OK"

    def _give_up(self, write: _Write) -> None:
        """But what was to be removed must not be there for good because the server did not answer in that moment."""
        if write.data is None and time.monotonic() < write.deadline and not self._is_closed:
            asyncio.get_running_loop().call_later(_DISCARD_AGAIN_S, self._write_later, write)
        else:
            metrics.redis_dropped_writes.inc()

    async def _call(
        self, operation: str, lane: _Lane, at: bytes | RedisEndpoint, *command: Argument, max_bytes: int = 0
    ) -> _Answer:
        limit_s = self._limit_s(max_bytes + sum(map(len, command)))
        call = partial(lane.call, at, *command, limit_s=limit_s, max_bytes=max_bytes)
        return await self._run(operation, lane, call, limit_s) or _FAILED

    async def _run(self, operation: str, lane: _Lane, call: Callable[[], T], limit_s: float) -> T | None:
        """Makes a blocking call on a thread. None if it failed, took too long, or was not admitted."""
        if not self._breaker.admit():
            return None
        try:
            answer = asyncio.get_running_loop().run_in_executor(lane.threads, call)
            result = await _within(limit_s, answer)
        except RedisReplyError as exc:
            metrics.redis_errors.inc(tags={"operation": operation})
            logger.debug("Redis at %s refuses %s: %s", self._address, operation, exc)
            self._record_answer()
            return None
        except Exception as exc:  # whatever goes wrong, it is a miss
            self._record_failure(operation, exc)
            return None
        self._record_answer()
        return result

    def _limit_s(self, num_bytes: int) -> float:
        """Of a whole call that moves so many bytes."""
        return max(self._config.timeout_s, self._config.connect_timeout_s + num_bytes / self._config.min_bytes_per_s)

    def _record_answer(self) -> None:
        if self._breaker.is_open:
            logger.info("Redis at %s answers again", self._address)
        self._breaker.record_success()

    def _record_failure(self, operation: str, exc: Exception) -> None:
        metrics.redis_errors.inc(tags={"operation": operation})
        self._num_failures += 1
        was_open = self._breaker.is_open
        self._breaker.record_failure()
        if self._breaker.is_open and not was_open:
            logger.warning("Redis at %s is left alone, but for a probe now and then: %r", self._address, exc)


def open_cache(config: CacheConfig, *, pinned: bool = False) -> EmbeddingCache:
    """The cache of one replica; without a URL it is this process's own. `pinned`: see LocalTier."""
    remote = RedisTier(config, config.redis_url) if config.redis_url is not None else None
    seal = keyed_seal(config.secret.get_secret_value()) if config.secret is not None else CHECKSUM
    # The second store knows the copies of an image for a time, which their embeddings must not outlive anywhere.
    local = LocalTier(config.local_bytes, ttl_s=config.ttl_s if config.pixel_alias else math.inf, pinned=pinned)
    return TieredCache(local, remote, seal)


async def _within(limit_s: float, answer: asyncio.Future[T]) -> T:
    """Unlike asyncio.timeout(), takes an answer that arrived in time while the event loop was busy."""
    try:
        await asyncio.wait([answer], timeout=limit_s)
        if not answer.done():
            raise TimeoutError(f"no answer within {limit_s:.3f} s")
        return answer.result()
    finally:
        answer.cancel()


def _name(key: str) -> bytes:
    return f"fovea:{key}".encode()


def _key(name: bytes) -> str:
    return name.decode(errors="replace").removeprefix("fovea:")


def _servers(config: CacheConfig, url: str) -> _Servers:
    is_cluster = "+cluster://" in url
    options = parse_url(url.replace("+cluster://", "://", 1))  # type: ignore[no-untyped-call]  # of redis-py
    is_tls = options.pop("connection_class", None) is SSLConnection
    unknown = options.keys() - _OPTIONS - (_TLS_OPTIONS if is_tls else set())
    if unknown or (is_cluster and not options.keys().isdisjoint({"db", "path"})):
        raise ValueError(f"{_address(url)}: not understood here: {sorted(unknown) or 'db or path of a cluster'}")
    tls = {name: options.pop(name) for name in _TLS_OPTIONS & options.keys()}
    endpoint = RedisEndpoint(**options, tls=_tls_context(**tls) if is_tls else None)
    return _Cluster(endpoint, config, tls) if is_cluster else _OneServer(endpoint)


def _tls_context(
    ssl_ca_certs: str | None = None,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
    ssl_cert_reqs: str = "required",
    ssl_check_hostname: bool = True,
) -> ssl.SSLContext:
    """The certificate is checked unless `ssl_cert_reqs=none` says in so many words that it is not."""
    context = ssl.create_default_context(cafile=ssl_ca_certs)
    if ssl_cert_reqs not in ("required", "none"):
        raise ValueError(f"ssl_cert_reqs is required or none, not {ssl_cert_reqs!r}")
    if ssl_certfile is not None:
        context.load_cert_chain(ssl_certfile, ssl_keyfile)
    context.check_hostname = ssl_check_hostname and ssl_cert_reqs == "required"
    context.verify_mode = ssl.CERT_REQUIRED if ssl_cert_reqs == "required" else ssl.CERT_NONE
    return context


def _address(url: str) -> str:
    """The URL without the user, the password and the query, which may hold them too."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
