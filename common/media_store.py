"""The second store: what must not be evicted. Sources and records of managed media, aliases, the log of deletions.

Unlike the embedding cache it says when it cannot do what it is asked: a full store is an InsufficientStorageError, one
that does not answer an UnavailableError. Requests without media never come here. One server, no cluster: writes of
several names are transactions.
"""

import asyncio
import contextlib
import logging
import math
import re
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import msgpack
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from common import metrics
from common.cache import EmbeddingCache
from common.config import CacheConfig
from common.errors import (
    ConflictError,
    InsufficientStorageError,
    InvalidRequestError,
    MediaNotFoundError,
    UnavailableError,
)
from common.identity import framed_digest, mm_hash
from common.media import ImageHeader
from common.redis_store import CircuitBreaker

logger = logging.getLogger(__name__)

T = TypeVar("T")

EVERYTHING = "*"  # in the log of deletions: all embeddings
QUARANTINE = "quarantine:"  # and with a namespace: its embeddings, then and later
BEGINNING = "0-0"  # of the log of deletions

_PREFIX = "fovea:media:"
_LOG = _PREFIX + "deleted"
_PINS = _PREFIX + "pins"
_MEDIA_ID = re.compile(r"media-[0-9a-f]{64}")
_MAX_EVENTS = 10_000
_MAX_RECORD_BYTES = 4096
_RESERVED_SHARE = 64  # this fraction of the memory is kept for what deleting itself has to write
_NUM_CONNECTIONS = 4
_SCAN_COUNT = 1000
_MAX_MEMBERS = 64  # of a set
_DELETED_S = 120.0  # longer than any encode is waited for
_COPIES_TTLS = 3  # in the encoder's local tier until its time is over, and then as long in that of an LLM replica
_POLL_S = 0.3
_LISTEN_S = 0.1
# The others are compressed already: zlib saves under 1 % of a JPEG, PNG or WebP, and under 5 % of a GIF.
_COMPRESSIBLE = {"BMP"}


class MediaDamagedError(UnavailableError):
    """Stored bytes are not those of their digest."""


@dataclass(frozen=True, slots=True)
class MediaRecord:
    """One managed image, without its bytes. `num_bytes` as sent; `expires` is None while it is pinned."""

    id: str
    tenant: str
    mm_hash: str
    num_bytes: int
    height: int
    width: int
    format: str
    created: float
    expires: float | None
    pinned: bool
    compressed: bool

    @property
    def header(self) -> ImageHeader:
        """With the orientation applied already, as height and width are."""
        return ImageHeader(format=self.format, height=self.height, width=self.width, orientation=1)


class Page(NamedTuple):
    """`has_more`: a page after the last of these has some."""

    records: list[MediaRecord]
    has_more: bool


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


class MediaStore:
    """Managed media and aliases, each of one tenant."""

    def __init__(
        self, storage: Storage, *, ttl_s: float, max_pinned_bytes: int, copies_ttl_s: float | None = None
    ) -> None:
        """`copies_ttl_s` is how long a deletion finds the copies of an image: longer than any tier keeps embeddings."""
        self._storage = storage
        self._copies_ttl_s = copies_ttl_s or ttl_s
        self._ttl_s = ttl_s
        self._max_pinned_bytes = max_pinned_bytes

    async def add(
        self,
        source: bytes,
        header: ImageHeader,
        *,
        tenant: str,
        embedding_bytes: int,
        ttl_s: float | None = None,
        pin: bool | None = None,
    ) -> MediaRecord:
        """The same bytes of a tenant are the same media: they are added once, and then live longer.

        `embedding_bytes` counts against the limit on pins, beside the source. `pin` None leaves a pin as it is.
        """
        digest = mm_hash(source)
        media_id = media_id_of(tenant, digest)
        known = await self._find(media_id, tenant)
        pinned = bool(pin) if pin is not None or known is None else known.pinned
        if pinned and ttl_s is not None:
            raise InvalidRequestError("pinned media have no ttl: send either pin or ttl", param="ttl")
        lifetime_s = None if pinned else ttl_s or self._lifetime_s(known)
        now = time.time()
        record = MediaRecord(
            id=media_id,
            tenant=tenant,
            mm_hash=digest,
            num_bytes=len(source),
            height=header.height,
            width=header.width,
            format=header.format,
            created=now if known is None else known.created,
            expires=None if lifetime_s is None else now + lifetime_s,
            pinned=pinned,
            compressed=False,
        )
        is_new_pin = pinned and await self._hold(media_id, len(source) + embedding_bytes)
        try:
            record = await self._write(record, source, known, lifetime_s)
        except (InsufficientStorageError, UnavailableError):
            if is_new_pin:
                await self._storage.release(media_id)
            raise
        if not pinned:
            await self._storage.release(media_id)
        return record

    async def get(self, media_id: str, tenant: str, *, param: str | None = None) -> MediaRecord:
        """Raises MediaNotFoundError."""
        record = await self._find(media_id, tenant)
        if record is None:
            raise MediaNotFoundError(
                f"there are no media {media_id[:128]!r}, or no longer", param=param, code="media_not_found"
            )
        return record

    async def source(self, record: MediaRecord) -> bytes:
        """The bytes as sent, checked. Raises MediaNotFoundError if the media have been deleted meanwhile."""
        (stored,) = await self._storage.read(_source_name(record.id))
        if stored is None:
            raise MediaNotFoundError(f"the media {record.id!r} have been deleted", code="media_not_found")
        source = await asyncio.to_thread(_decompress, stored, record.num_bytes) if record.compressed else stored
        if mm_hash(source) != record.mm_hash:
            metrics.media_store_errors.inc(tags={"operation": "damaged"})
            raise MediaDamagedError(
                f"the stored bytes of {record.id!r} are damaged: add it again", code="media_damaged"
            )
        return source

    async def page(self, tenant: str, *, after: str = "", limit: int = 100) -> Page:
        """In the order of ids."""
        prefix = _record_name("", tenant)
        names = sorted(name for name in await self._storage.names(prefix) if name > prefix + after)
        page = names[:limit]
        values = await self._storage.read(*page) if page else []
        records = [_unpack_record(value) for value in values if value is not None]
        return Page([record for record in records if record is not None], len(names) > limit)

    async def delete(self, media_id: str, tenant: str) -> MediaRecord:
        """Returns what it was; every replica hears of it by the log. Raises MediaNotFoundError."""
        record = await self.get(media_id, tenant)
        # First the media, so that nobody encodes it anew after having heard; and it makes room for the log's entry.
        await self._storage.remove(_record_name(media_id, tenant), _source_name(media_id))
        suffix = f"/{tenant}" if tenant else ""
        for digest in sorted({record.mm_hash, *await self._take_copies(record.mm_hash, tenant)}):
            await self._storage.append(digest + suffix)
        await self._storage.release(media_id)
        return record

    async def join_copies(self, pixels: str, digest: str, tenant: str) -> list[str]:
        """The other images with these pixels, of which this one is a copy from now on.

        `pixels` names the tenant too. None for the 65th copy and those after it, and for an image that was deleted a
        moment ago: an encode of it may still be under way.
        """
        members = await self._storage.join(
            _copies_name(pixels),
            digest,
            _copied_name(digest, tenant),
            self._copies_ttl_s,
            unless=_deleted_name(digest, tenant),
        )
        return sorted(members - {digest}) if digest in members else []

    async def _take_copies(self, digest: str, tenant: str) -> set[str]:
        """All images whose embedding may be that of this one. They are copies of nothing afterwards."""
        # From here on it joins no others. Who has joined it before is found, who joins later does not see it.
        await self._storage.mark(_deleted_name(digest, tenant), _DELETED_S)
        copies: set[str] = set()
        for group in await self._storage.take(_copied_name(digest, tenant)):
            members = await self._storage.take(group)
            for member in members:
                await self._storage.leave(_copied_name(member, tenant), group)
            copies |= members
        return copies

    async def forget_embeddings(self) -> None:
        """Tells every replica to empty its local tier; the media stay."""
        await self._storage.append(EVERYTHING)

    async def quarantine(self, namespace: str) -> None:
        """Tells every replica to use no embedding of the namespace any more."""
        await self._storage.append(QUARANTINE + namespace)

    async def bind(self, alias: str, record: MediaRecord, *, param: str) -> None:
        """Raises ConflictError if the alias names other media that are still there."""
        name = _alias_name(alias, record.tenant)
        for _ in range(2):
            bound = (await self._storage.bind(name, record.id.encode(), self._ttl_s)).decode(errors="replace")
            if bound == record.id:
                await self._storage.touch([name], None if record.pinned else self._ttl_s)
                return
            if await self._find(bound, record.tenant) is not None:
                break
            await self._storage.remove(name)  # what it named is gone, so it is free again
        raise ConflictError(f"{alias!r} is another image's already", param=param, code="alias_conflict")

    async def find(self, alias: str, tenant: str) -> MediaRecord | None:
        """What an alias names, if that is still there."""
        (bound,) = await self._storage.read(_alias_name(alias, tenant))
        return None if bound is None else await self._find(bound.decode(errors="replace"), tenant)

    async def deletions(self, after: str) -> list[tuple[str, str]]:
        """Position in the log, and what was deleted, EVERYTHING, or QUARANTINE and a namespace: see discard_from()."""
        return await self._storage.events(after)

    async def last_deletion(self) -> str:
        """The position from which a replica that holds nothing yet has to listen."""
        return await self._storage.last_event()

    async def stats(self) -> dict[str, str | int]:
        """For the admin API."""
        records = await self._storage.names(_PREFIX + "record:")
        held = await self._storage.held_bytes()
        counts = {"media": len(records), "pinned_bytes": held, "max_pinned_bytes": self._max_pinned_bytes}
        return {**await self._storage.stats(), **counts}

    async def aclose(self) -> None:
        await self._storage.aclose()

    async def _find(self, media_id: str, tenant: str) -> MediaRecord | None:
        if not _MEDIA_ID.fullmatch(media_id):
            return None
        (value,) = await self._storage.read(_record_name(media_id, tenant))
        record = _unpack_record(value) if value is not None else None
        return record if record is not None and (record.id, record.tenant) == (media_id, tenant) else None

    async def _write(
        self, record: MediaRecord, source: bytes, known: MediaRecord | None, lifetime_s: float | None
    ) -> MediaRecord:
        """Returns the record as it is written. A sound source that is there already is left, and lives as long."""
        names = [_record_name(record.id, record.tenant), _source_name(record.id)]
        if known is not None and await self._is_sound(known):
            record = replace(record, compressed=known.compressed)
            await self._storage.write({names[0]: _pack_record(record)}, lifetime_s)
            await self._storage.touch(names, lifetime_s)
            return record
        stored = await asyncio.to_thread(_compress, source) if record.format in _COMPRESSIBLE else source
        record = replace(record, compressed=stored is not source)
        await self._storage.write(dict(zip(names, [_pack_record(record), stored], strict=True)), lifetime_s)
        return record

    async def _is_sound(self, record: MediaRecord) -> bool:
        try:
            await self.source(record)
        except (MediaNotFoundError, MediaDamagedError):
            return False
        return True

    def _lifetime_s(self, known: MediaRecord | None) -> float:
        left_s = 0.0 if known is None or known.expires is None else known.expires - time.time()
        return max(self._ttl_s, left_s)

    async def _hold(self, media_id: str, num_bytes: int) -> bool:
        # Add first and check then: two pins at once may both be refused, but never both exceed the limit.
        is_new, total = await self._storage.hold(media_id, num_bytes)
        if is_new and total > self._max_pinned_bytes:
            await self._storage.release(media_id)
            raise InsufficientStorageError(
                f"{total - num_bytes} bytes are pinned, {num_bytes} more would exceed the limit of "
                f"{self._max_pinned_bytes} (cache.max_pinned_bytes)",
                param="pin",
                code="pin_limit",
            )
        return is_new


class Deletion(NamedTuple):
    """An image that was deleted, and whose it was."""

    mm_hash: str
    tenant: str


def discard_from(cache: EmbeddingCache, event: str) -> Deletion | None:
    """Does in one process what an event of the log says. Returns the image, if it is about one."""
    if event == EVERYTHING:
        cache.clear_local()
    elif event.startswith(QUARANTINE):
        cache.quarantine(event.removeprefix(QUARANTINE))
    else:
        mm_hash, _, tenant = event.partition("/")
        cache.discard_image(mm_hash)
        return Deletion(mm_hash, tenant)
    return None


class DeletionWatcher:
    """Reads the log of deletions every 0.3 s and has what each event names discarded in this replica."""

    def __init__(self, store: MediaStore, discard: Callable[[str], Awaitable[None]]) -> None:
        self._store = store
        self._discard = discard
        self._position: str | None = None
        self._polling: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def listen(self) -> None:
        """Called before any work whose result is kept: what is deleted from then on is heard of.

        The first call waits for the store, and not for long: without an answer all that is in the log will be
        discarded later, however old.
        """
        if self._position is None:
            with contextlib.suppress(UnavailableError, TimeoutError):
                await asyncio.wait_for(self.poll(), _LISTEN_S)
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll_forever())

    async def aclose(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait([self._polling])

    async def poll(self) -> None:
        """What was deleted before has been discarded when it returns, and will not be once more."""
        async with self._turn:
            if self._position is None:
                # if the next line fails or is given up, this replica will hold something when it succeeds
                self._position = BEGINNING
                self._position = await self._store.last_deletion()
            for position, event in await self._store.deletions(self._position):
                await self._discard(event)
                self._position = position

    async def _poll_forever(self) -> None:
        while True:
            try:
                await self.poll()
            except UnavailableError as exc:
                logger.debug("the log of deletions cannot be read: %s", exc)  # counted where it failed
            except Exception:  # the task must not end in silence: deletions would never arrive
                logger.exception("a deletion could not be carried out")
            await asyncio.sleep(_POLL_S)


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


def open_media_store(config: CacheConfig) -> MediaStore:
    """The second store of one replica; without a URL it is this process's own."""
    url = config.media_redis_url
    storage: Storage = LocalStorage(config.media_redis_bytes) if url is None else RedisStorage(config, url)
    return MediaStore(
        storage,
        ttl_s=config.media_ttl_s,
        max_pinned_bytes=config.max_pinned_bytes,
        copies_ttl_s=_COPIES_TTLS * config.ttl_s,
    )


def _decoded(members: Any) -> set[str]:
    """Of redis-py, whose types do not say what it returns."""
    return {member.decode() for member in members}


def media_id_of(tenant: str, digest: str) -> str:
    return "media-" + framed_digest("media", tenant, digest)


def _record_name(media_id: str, tenant: str) -> str:
    return f"{_PREFIX}record:{framed_digest(tenant)}:{media_id}"


def _source_name(media_id: str) -> str:
    return f"{_PREFIX}source:{media_id}"


def _alias_name(alias: str, tenant: str) -> str:
    return f"{_PREFIX}alias:{framed_digest(tenant)}:{alias}"


def _copies_name(pixels: str) -> str:
    return f"{_PREFIX}copies:{pixels}"


def _copied_name(digest: str, tenant: str) -> str:
    return f"{_PREFIX}copied:{framed_digest(tenant)}:{digest}"


def _deleted_name(digest: str, tenant: str) -> str:
    return f"{_PREFIX}no-copy:{framed_digest(tenant)}:{digest}"


_NUMBERS = {"num_bytes": int, "height": int, "width": int, "created": float, "pinned": bool, "compressed": bool}
_TYPES = {field.name: _NUMBERS.get(field.name, str) for field in fields(MediaRecord) if field.name != "expires"}


def _pack_record(record: MediaRecord) -> bytes:
    packed: bytes = msgpack.packb(asdict(record))
    return packed


def _unpack_record(value: bytes) -> MediaRecord | None:
    """None, and counted, unless it is exactly a record."""
    with contextlib.suppress(ValueError, msgpack.UnpackException):
        record = msgpack.unpackb(value, strict_map_key=True) if len(value) <= _MAX_RECORD_BYTES else None
        if (
            isinstance(record, dict)
            and record.keys() == _TYPES.keys() | {"expires"}
            and all(type(record[name]) is expected for name, expected in _TYPES.items())
            and type(record["expires"]) in (float, type(None))
        ):
            return MediaRecord(**record)
    logger.warning("a media record is damaged and ignored")
    metrics.media_store_errors.inc(tags={"operation": "damaged"})
    return None


def _compress(source: bytes) -> bytes:
    """`source` itself if compressing it saves less than a tenth."""
    packed = zlib.compress(source, level=1)
    return packed if len(packed) < 0.9 * len(source) else source


def _decompress(stored: bytes, num_bytes: int) -> bytes:
    """At most `num_bytes`, whatever is stored; what is not zlib is nothing."""
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj().decompress(stored, num_bytes + 1)
    return b""


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
