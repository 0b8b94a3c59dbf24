"""The second store: what must not be evicted. Sources and records of managed media, aliases, the log of deletions.

Unlike the embedding cache it says when it cannot do what it is asked: a full store is an InsufficientStorageError, one
that does not answer an UnavailableError. Requests without media never come here. media_storage.py is where it all lies.
"""

import asyncio
import contextlib
import logging
import re
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import msgpack

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
from common.media_storage import BEGINNING, PREFIX, LocalStorage, RedisStorage, Storage
from common.threads import on_thread_if_large

logger = logging.getLogger(__name__)

EVERYTHING = "*"  # in the log of deletions: all embeddings
QUARANTINE = "quarantine:"  # and with a namespace: its embeddings, then and later

_MEDIA_ID = re.compile(r"media-[0-9a-f]{64}")
_MAX_RECORD_BYTES = 4096
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
        digest = await on_thread_if_large(len(source), mm_hash, source)
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
        if await on_thread_if_large(len(source), mm_hash, source) != record.mm_hash:
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
        records = await self._storage.names(PREFIX + "record:")
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


def media_id_of(tenant: str, digest: str) -> str:
    return "media-" + framed_digest("media", tenant, digest)


def _record_name(media_id: str, tenant: str) -> str:
    return f"{PREFIX}record:{framed_digest(tenant)}:{media_id}"


def _source_name(media_id: str) -> str:
    return f"{PREFIX}source:{media_id}"


def _alias_name(alias: str, tenant: str) -> str:
    return f"{PREFIX}alias:{framed_digest(tenant)}:{alias}"


def _copies_name(pixels: str) -> str:
    return f"{PREFIX}copies:{pixels}"


def _copied_name(digest: str, tenant: str) -> str:
    return f"{PREFIX}copied:{framed_digest(tenant)}:{digest}"


def _deleted_name(digest: str, tenant: str) -> str:
    return f"{PREFIX}no-copy:{framed_digest(tenant)}:{digest}"


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
