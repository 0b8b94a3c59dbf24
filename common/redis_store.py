"""The Redis client path for megabyte values: short time limits, a circuit breaker, writes in the background.

The only file that imports redis. An error of any kind reads as absence and is counted; nothing is raised to callers.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.retry import Retry

from common import metrics
from common.cache import EmbeddingCache, LocalTier, TieredCache
from common.config import CacheConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NUM_READERS = 4
_SOCKET_READ_BYTES = 256 * 1024  # GET of 16 MiB: 7 ms, with redis-py's 32 KiB 13 ms
_MAX_COPIED_BYTES = 6000  # redis-py's own: larger arguments are sent as they are, without a copy


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


class _Lane:
    """Connections for one purpose, and as many threads to block on them."""

    def __init__(self, config: CacheConfig, url: str, *, num_threads: int, socket_timeout_s: float) -> None:
        self.client = redis.Redis.from_url(
            url,
            socket_connect_timeout=config.connect_timeout_s,
            socket_timeout=socket_timeout_s,
            socket_read_size=_SOCKET_READ_BYTES,
            retry=Retry(NoBackoff(), 0),
            # Nothing but AUTH and SELECT is sent on connecting, so a user who may not send CLIENT will do.
            protocol=2,
            driver_info=None,
        )
        # hiredis parses faster, but with its packer a SET of 4 MiB takes 8 ms, with this one 2 ms.
        pool = self.client.connection_pool
        pool.connection_kwargs["command_packer"] = PythonRespSerializer(
            _MAX_COPIED_BYTES, self.client.get_encoder().encode
        )
        self.threads = ThreadPoolExecutor(num_threads, thread_name_prefix="redis")

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.client.close()


class RedisTier:
    """A RemoteTier on one Redis server. Belongs to one event loop, which never waits for a socket.

    Raises ValueError for a URL that is not redis://, rediss:// or unix://.
    """

    def __init__(self, config: CacheConfig, url: str) -> None:
        self._config = config
        self._address = _address(url)
        # redis-py limits a send as a whole, but a receive only while nothing arrives. So the writer's limit has to fit
        # the largest entry, and the limit of a whole call is kept in `_call`.
        self._readers = _Lane(config, url, num_threads=_NUM_READERS, socket_timeout_s=config.timeout_s)
        self._writer = _Lane(config, url, num_threads=1, socket_timeout_s=self._limit_s(config.write_queue_bytes))
        self._free_readers = asyncio.Semaphore(_NUM_READERS)
        self._breaker = CircuitBreaker()
        self._unwritten: deque[tuple[str, bytes | None]] = deque()
        self._num_unwritten_bytes = 0
        self._writing: asyncio.Task[None] | None = None

    async def get(self, key: str, max_bytes: int) -> bytes | None:
        # GETRANGE, so that a value of any size costs no more memory than the one that is expected.
        read = partial(self._readers.client.getrange, _name(key), 0, max_bytes - 1)
        async with self._free_readers:
            value = await self._call("get", self._readers, read, num_bytes=max_bytes)
        return value if isinstance(value, bytes) and value else None

    def put(self, key: str, data: bytes) -> None:
        if self._num_unwritten_bytes + len(data) > self._config.write_queue_bytes:
            metrics.redis_dropped_writes.inc()
            return
        self._num_unwritten_bytes += len(data)
        self._write_later(key, data)

    def discard(self, key: str) -> None:
        self._write_later(key, None)

    async def ping(self) -> bool:
        """Whether the server answers now. A question for the breaker too: while it is open the answer is no."""
        return await self._call("ping", self._readers, self._readers.client.ping) is True

    def stats(self) -> dict[str, str | int]:
        """For `/health`."""
        return {
            "address": self._address,
            "breaker": "open" if self._breaker.is_open else "closed",
            "unwritten_bytes": self._num_unwritten_bytes,
        }

    async def aclose(self) -> None:
        """Gives the queued writes the time they may take, then drops what is left."""
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=self._limit_s(self._num_unwritten_bytes))
            self._writing.cancel()
            metrics.redis_dropped_writes.inc(len(self._unwritten))
        self._readers.close()
        self._writer.close()

    def _write_later(self, key: str, data: bytes | None) -> None:
        self._unwritten.append((key, data))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all())

    async def _write_all(self) -> None:
        while self._unwritten:
            key, data = self._unwritten[0]
            if not await self._write(key, data):
                metrics.redis_dropped_writes.inc()
            self._unwritten.popleft()
            self._num_unwritten_bytes -= len(data or b"")

    async def _write(self, key: str, data: bytes | None) -> bool:
        client = self._writer.client
        if data is None:
            return await self._call("unlink", self._writer, partial(client.unlink, _name(key))) is not None
        # Entries of one burst do not expire in one moment.
        ttl_ms = round(self._config.ttl_s * 1000 * random.uniform(0.9, 1.1))
        write = partial(client.set, _name(key), data, px=ttl_ms)
        return await self._call("set", self._writer, write, num_bytes=len(data)) is not None

    async def _call(self, operation: str, lane: _Lane, call: Callable[[], T], *, num_bytes: int = 0) -> T | None:
        """Makes a blocking call on a thread. None if it failed, took too long, or was not admitted."""
        if not self._breaker.admit():
            return None
        try:
            answer = asyncio.get_running_loop().run_in_executor(lane.threads, call)
            result = await _within(self._limit_s(num_bytes), answer)
        except Exception as exc:  # whatever the client raises, it is a miss
            self._count_failure(operation, exc)
            return None
        if self._breaker.is_open:
            logger.info("Redis at %s answers again", self._address)
        self._breaker.record_success()
        return result

    def _limit_s(self, num_bytes: int) -> float:
        return self._config.connect_timeout_s + self._config.timeout_s + num_bytes / self._config.min_bytes_per_s

    def _count_failure(self, operation: str, exc: Exception) -> None:
        metrics.redis_errors.inc(tags={"operation": operation})
        was_open = self._breaker.is_open
        self._breaker.record_failure()
        if self._breaker.is_open and not was_open:
            logger.warning("Redis at %s is left alone, but for a probe now and then: %r", self._address, exc)


def open_cache(config: CacheConfig) -> EmbeddingCache:
    """The cache of one replica; without a URL it is this process's own."""
    remote = RedisTier(config, config.redis_url) if config.redis_url is not None else None
    return TieredCache(LocalTier(config.local_bytes), remote)


async def _within(limit_s: float, answer: asyncio.Future[T]) -> T:
    """Unlike asyncio.timeout(), takes an answer that arrived in time while the event loop was busy."""
    try:
        await asyncio.wait([answer], timeout=limit_s)
        if not answer.done():
            raise TimeoutError(f"no answer within {limit_s:.3f} s")
        return answer.result()
    finally:
        answer.cancel()


def _name(key: str) -> str:
    return f"fovea:{key}"


def _address(url: str) -> str:
    """The URL without the user, the password and the query, which may hold them too."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
