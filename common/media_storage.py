"""Where media_store.py keeps what it must not lose: named values, sets, held bytes and a log, in a process or in Redis.

A full storage is an InsufficientStorageError, one that does not answer an UnavailableError. One server, no cluster:
writes of several names are transactions.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from common import metrics
from common.config import CacheConfig
from common.errors import InsufficientStorageError, UnavailableError
from common.redis_store import CircuitBreaker

logger = logging.getLogger(__name__)

T = TypeVar("T")

PREFIX = "fovea:media:"
BEGINNING = "0-0"  # of the log of deletions
_LOG = PREFIX + "deleted"
_PINS = PREFIX + "pins"
_MAX_EVENTS = 10_000
_RESERVED_SHARE = 64  # this fraction of the memory is kept for what deleting itself has to write
_NUM_CONNECTIONS = 4
_SCAN_COUNT = 1000
_MAX_MEMBERS = 64  # of a set


class Storage(Protocol):
    """Named bytes with a lifetime, a log, and sums of what is held.

    Every call may raise UnavailableError, and those that write InsufficientStorageError.
    """

    async def read(self, *names: str) -> list[bytes | None]: ...

    async def write(self, values: Mapping[str, bytes], ttl_s: float | None) -> None:
        """All of them or none."""

    async def bind(self, name: str, value: bytes, ttl_s: float) -> bytes:
        """What the name holds now: `value` only if it held nothing."""

    async def touch(self, names: list[str], ttl_s: float | None) -> None: ...

    async def remove(self, *names: str) -> int:
        """How many were there."""

    async def names(self, prefix: str) -> list[str]: ...

    async def join(self, group: str, member: str, reverse: str, ttl_s: float, *, unless: str) -> set[str]:
        """The members of `group`, whose name is added to the set `reverse`; without `member` if the group is full.

        Empty, and nothing is added, while the name `unless` is marked. Refused once the store is half full: anyone may
        send images, and media need the room.
        """

    async def take(self, group: str) -> set[str]:
        """The members of a set, which is gone then."""

    async def leave(self, group: str, member: str) -> None: ...

    async def mark(self, name: str, ttl_s: float) -> None:
        """Even in a store that is full."""

    async def hold(self, name: str, num_bytes: int) -> tuple[bool, int]:
        """Whether it is new, and the sum of all that is held."""

    async def release(self, name: str) -> None: ...

    async def held_bytes(self) -> int: ...

    async def append(self, event: str) -> None: ...

    async def events(self, after: str) -> list[tuple[str, str]]:
        """Position and text of the log's entries after a position."""

    async def last_event(self) -> str:
        """Position of the log's last entry; BEGINNING if there is none."""

    async def stats(self) -> dict[str, str | int]: ...

    async def aclose(self) -> None: ...


class LocalStorage:
    """A Storage for one process, where there is no redis-server. Nobody else sees it, and it ends with the process."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._values: dict[str, tuple[bytes, float | None]] = {}
        self._held: dict[str, int] = {}
        self._sets: dict[str, tuple[set[str], float]] = {}
        self._events: deque[tuple[int, str]] = deque(maxlen=_MAX_EVENTS)
        self._num_events = 0

    async def read(self, *names: str) -> list[bytes | None]:
        self._expire()
        return [self._values[name][0] if name in self._values else None for name in names]

    async def write(self, values: Mapping[str, bytes], ttl_s: float | None) -> None:
        self._expire()
        growth = sum(len(value) - len(self._values.get(name, (b"",))[0]) for name, value in values.items())
        if self._num_bytes + growth > self._max_bytes:
            raise _full(self._num_bytes, growth, self._max_bytes)
        self._num_bytes += growth
        self._values.update({name: (value, _deadline(ttl_s)) for name, value in values.items()})

    async def bind(self, name: str, value: bytes, ttl_s: float) -> bytes:
        self._expire()
        if name not in self._values:
            await self.write({name: value}, ttl_s)
        return self._values[name][0]

    async def touch(self, names: list[str], ttl_s: float | None) -> None:
        for name in names:
            if name in self._values:
                self._values[name] = (self._values[name][0], _deadline(ttl_s))

    async def remove(self, *names: str) -> int:
        self._expire()
        removed = [self._values.pop(name)[0] for name in names if name in self._values]
        self._num_bytes -= sum(map(len, removed))
        return len(removed)

    async def names(self, prefix: str) -> list[str]:
        self._expire()
        return [name for name in self._values if name.startswith(prefix)]

    async def hold(self, name: str, num_bytes: int) -> tuple[bool, int]:
        is_new = name not in self._held
        self._held[name] = num_bytes
        return is_new, sum(self._held.values())

    async def join(self, group: str, member: str, reverse: str, ttl_s: float, *, unless: str) -> set[str]:
        self._expire()
        if unless in self._values:
            return set()
        members = self._members(group)
        if member in members or len(members) < _MAX_MEMBERS:
            for name, new in ((group, member), (reverse, group)):
                self._sets[name] = (self._members(name) | {new}, time.monotonic() + ttl_s)
        return self._members(group)

    async def take(self, group: str) -> set[str]:
        members = self._members(group)
        self._sets.pop(group, None)
        return members

    async def leave(self, group: str, member: str) -> None:
        if group in self._sets:
            self._sets[group][0].discard(member)

    async def mark(self, name: str, ttl_s: float) -> None:
        self._values[name] = (b"", _deadline(ttl_s))

    async def release(self, name: str) -> None:
        self._held.pop(name, None)

    async def held_bytes(self) -> int:
        return sum(self._held.values())

    async def append(self, event: str) -> None:
        self._num_events += 1
        self._events.append((self._num_events, event))

    async def events(self, after: str) -> list[tuple[str, str]]:
        last = int(after.partition("-")[0])
        return [(f"{position}-0", event) for position, event in self._events if position > last]

    async def last_event(self) -> str:
        return f"{self._num_events}-0"

    async def stats(self) -> dict[str, str | int]:
        self._expire()
        return {"address": "in process", "used_bytes": self._num_bytes, "max_bytes": self._max_bytes}

    async def aclose(self) -> None:
        pass

    def _members(self, name: str) -> set[str]:
        members, until = self._sets.get(name, (set(), math.inf))
        return set(members) if until > time.monotonic() else set()

    def _expire(self) -> None:
        now = time.monotonic()
        for name in [name for name, (_, until) in self._values.items() if until is not None and until <= now]:
            self._num_bytes -= len(self._values.pop(name)[0])


class RedisStorage:
    """A Storage on one Redis server with `noeviction`. Raises ValueError for a URL that is not one of Redis."""

    def __init__(self, config: CacheConfig, url: str) -> None:
        parts = urlsplit(url)
        self._address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._config = config
        self._client = redis.Redis.from_url(
            url,
            socket_connect_timeout=config.media_timeout_s,
            socket_timeout=config.media_timeout_s,
            retry=Retry(NoBackoff(), 0),
            # As in redis_store.py: nothing but AUTH and SELECT is sent on connecting.
            protocol=2,
            driver_info=None,
        )
        self._threads = ThreadPoolExecutor(_NUM_CONNECTIONS, thread_name_prefix="media")
        self._breaker = CircuitBreaker()

    async def read(self, *names: str) -> list[bytes | None]:
        def read() -> list[bytes | None]:
            values: Any = self._client.mget(names)
            return list(values)

        return await self._call("read", read)

    async def write(self, values: Mapping[str, bytes], ttl_s: float | None) -> None:
        def write() -> None:
            self._check_room(sum(map(len, values.values())))
            with self._client.pipeline(transaction=True) as transaction:
                for name, value in values.items():
                    transaction.set(name, value, px=_milliseconds(ttl_s))
                transaction.execute()

        await self._call("write", write, num_bytes=sum(map(len, values.values())))

    async def bind(self, name: str, value: bytes, ttl_s: float) -> bytes:
        def bind() -> bytes:
            self._check_room(len(value))
            bound: Any = None
            while bound is None:  # again if it expires between the two
                is_bound = self._client.set(name, value, nx=True, px=_milliseconds(ttl_s))
                bound = value if is_bound else self._client.get(name)
            assert isinstance(bound, bytes)
            return bound

        return await self._call("bind", bind)

    async def touch(self, names: list[str], ttl_s: float | None) -> None:
        def touch() -> None:
            for name in names:
                if ttl_s is None:
                    self._client.persist(name)
                else:
                    self._client.pexpire(name, round(ttl_s * 1000))

        await self._call("touch", touch)

    async def remove(self, *names: str) -> int:
        def remove() -> int:
            # DEL and not UNLINK: the memory is free when it returns.
            removed: Any = self._client.delete(*names)
            return int(removed)

        return await self._call("remove", remove)

    async def names(self, prefix: str) -> list[str]:
        def scan() -> list[str]:
            found: Any = self._client.scan_iter(match=prefix + "*", count=_SCAN_COUNT)
            return list({name.decode() for name in found})

        return await self._call("scan", scan)

    async def hold(self, name: str, num_bytes: int) -> tuple[bool, int]:
        def hold() -> tuple[bool, int]:
            is_new = self._client.hset(_PINS, name, str(num_bytes)) == 1
            return is_new, self._held_bytes()

        return await self._call("hold", hold)

    async def join(self, group: str, member: str, reverse: str, ttl_s: float, *, unless: str) -> set[str]:
        def join() -> set[str]:
            used, limit = self._memory()
            if limit and used > limit // 2:
                raise _full(used, 0, limit)
            with self._client.pipeline(transaction=True) as transaction:
                transaction.watch(unless)  # type: ignore[no-untyped-call]  # of redis-py
                if transaction.get(unless) is not None:
                    return set()
                members = _decoded(transaction.smembers(group))
                if member not in members and len(members) >= _MAX_MEMBERS:
                    return members
                transaction.multi()
                for name, new in ((group, member), (reverse, group)):
                    transaction.sadd(name, new)
                    transaction.pexpire(name, round(ttl_s * 1000))
                transaction.smembers(group)
                try:
                    *_, joined = transaction.execute()
                except redis.exceptions.WatchError:  # it has been marked just now
                    return set()
            return _decoded(joined)

        return await self._call("join", join)

    async def take(self, group: str) -> set[str]:
        def take() -> set[str]:
            with self._client.pipeline(transaction=True) as transaction:
                transaction.smembers(group)
                transaction.delete(group)
                members, _ = transaction.execute()
            return _decoded(members)

        return await self._call("take", take)

    async def leave(self, group: str, member: str) -> None:
        await self._call("leave", partial(self._client.srem, group, member))

    async def mark(self, name: str, ttl_s: float) -> None:
        await self._call("mark", partial(self._client.set, name, b"", px=_milliseconds(ttl_s)))

    async def release(self, name: str) -> None:
        await self._call("release", partial(self._client.hdel, _PINS, name))

    async def held_bytes(self) -> int:
        return await self._call("hold", self._held_bytes)

    async def append(self, event: str) -> None:
        append = partial(self._client.xadd, _LOG, {"event": event}, maxlen=_MAX_EVENTS, approximate=True)
        await self._call("append", append)

    async def events(self, after: str) -> list[tuple[str, str]]:
        found: Any = await self._call("events", partial(self._client.xrange, _LOG, min=f"({after}"))
        return [(position.decode(), values[b"event"].decode()) for position, values in found]

    async def last_event(self) -> str:
        found: Any = await self._call("events", partial(self._client.xrevrange, _LOG, count=1))
        return found[0][0].decode() if found else BEGINNING

    async def stats(self) -> dict[str, str | int]:
        used, limit = await self._call("stats", self._memory)
        return {"address": self._address, "used_bytes": used, "max_bytes": limit}

    async def aclose(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _held_bytes(self) -> int:
        values: Any = self._client.hvals(_PINS)
        return sum(map(int, values))

    def _memory(self) -> tuple[int, int]:
        info: Any = self._client.info("memory")
        return info["used_memory"], info["maxmemory"]

    def _check_room(self, num_bytes: int) -> None:
        # Redis itself accepts one more value of any size while it is not over its limit yet.
        used, limit = self._memory()
        if limit and used + num_bytes > limit - limit // _RESERVED_SHARE:
            raise _full(used, num_bytes, limit)

    async def _call(self, operation: str, call: Callable[[], T], *, num_bytes: int = 0) -> T:
        """Makes blocking calls on a thread, within their time."""
        if not self._breaker.admit():
            raise self._unavailable()
        limit_s = 2 * self._config.media_timeout_s + num_bytes / self._config.min_bytes_per_s
        try:
            answer = asyncio.get_running_loop().run_in_executor(self._threads, call)
            result = await asyncio.wait_for(answer, limit_s)
        except InsufficientStorageError:
            self._breaker.record_success()
            raise
        except redis.exceptions.OutOfMemoryError as exc:
            self._breaker.record_success()
            raise InsufficientStorageError("the media store is full", code="media_store_full") from exc
        except (redis.exceptions.RedisError, OSError, TimeoutError) as exc:
            metrics.media_store_errors.inc(tags={"operation": operation})
            was_open = self._breaker.is_open
            self._breaker.record_failure()
            if self._breaker.is_open and not was_open:
                logger.warning("the media store at %s does not answer: %r", self._address, exc)
            raise self._unavailable() from exc
        self._breaker.record_success()
        return result

    def _unavailable(self) -> UnavailableError:
        return UnavailableError("the media store does not answer", code="media_store_unavailable")


def _decoded(members: Any) -> set[str]:
    """Of redis-py, whose types do not say what it returns."""
    return {member.decode() for member in members}


def _full(used: int, needed: int, limit: int) -> InsufficientStorageError:
    return InsufficientStorageError(
        f"the media store is full: {used} of {limit} bytes are in use, {needed} more are needed "
        "(cache.media_redis_bytes); delete media or wait until some expire",
        code="media_store_full",
    )


def _deadline(ttl_s: float | None) -> float | None:
    return None if ttl_s is None else time.monotonic() + ttl_s


def _milliseconds(ttl_s: float | None) -> int | None:
    return None if ttl_s is None else round(ttl_s * 1000)
