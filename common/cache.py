"""Where embeddings are kept: an in-process tier in front of a shared one. A cache may fail; an answer may not.

Everything here belongs to one event loop: it takes no lock, and it never blocks.
"""

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from common import metrics
from common.embedding import EmbeddingFormatError, EmbeddingSpec, VisionEmbedding, check, unpack

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_FRAME_OVERHEAD = 128 * 1024  # prefix, header and padding of a packed embedding


class CacheHit(NamedTuple):
    """`data` is the packed frame, whose memory `embedding` shares."""

    embedding: VisionEmbedding
    data: bytes
    tier: Literal["local", "redis"]


class EmbeddingCache(Protocol):
    async def get_many(self, wanted: Mapping[str, EmbeddingSpec]) -> dict[str, CacheHit]:
        """The entries that are there and are what their image implies. Whatever goes wrong is a miss."""

    def put(self, key: str, data: bytes, embedding: VisionEmbedding | None = None) -> None:
        """Returns at once. `embedding` is what was unpacked from `data`, if it was: it saves doing so on a hit."""

    def put_local(self, key: str, data: bytes, embedding: VisionEmbedding | None = None) -> None:
        """For this process alone: the entry is someone else's to publish."""

    def discard(self, key: str) -> None: ...

    async def aclose(self) -> None: ...


class RemoteTier(Protocol):
    """A store shared by processes. It never raises: what it cannot tell is absent, what it cannot write is dropped."""

    async def get(self, key: str, max_bytes: int) -> bytes | None:
        """The value, of which nothing after the first `max_bytes` is read."""

    def put(self, key: str, data: bytes) -> None: ...

    def discard(self, key: str) -> None: ...

    async def aclose(self) -> None: ...


class Entry(NamedTuple):
    data: bytes
    embedding: VisionEmbedding | None


class LocalTier:
    """The most recently used entries, at most `max_bytes` of frames."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def get(self, key: str) -> Entry | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: str, entry: Entry) -> None:
        self.discard(key)
        if len(entry.data) > self.max_bytes:
            return
        self._entries[key] = entry
        self.num_bytes += len(entry.data)
        while self.num_bytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.num_bytes -= len(evicted.data)

    def discard(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= len(entry.data)


class TieredCache:
    """The EmbeddingCache of both services: local first, then the shared tier, if there is one."""

    def __init__(self, local: LocalTier, remote: RemoteTier | None) -> None:
        self._local = local
        self._remote = remote

    async def get_many(self, wanted: Mapping[str, EmbeddingSpec]) -> dict[str, CacheHit]:
        found = {key: self._get_local(key, spec) for key, spec in wanted.items()}
        if self._remote is not None:
            missing = [key for key, hit in found.items() if hit is None]
            remote_hits = await asyncio.gather(*(self._get_remote(self._remote, key, wanted[key]) for key in missing))
            found.update(zip(missing, remote_hits, strict=True))
        hits = {key: hit for key, hit in found.items() if hit is not None}
        for hit in hits.values():
            metrics.cache_hits.inc(tags={"tier": hit.tier})
        metrics.cache_misses.inc(len(wanted) - len(hits))
        return hits

    def put(self, key: str, data: bytes, embedding: VisionEmbedding | None = None) -> None:
        self.put_local(key, data, embedding)
        if self._remote is not None:
            self._remote.put(key, data)

    def put_local(self, key: str, data: bytes, embedding: VisionEmbedding | None = None) -> None:
        self._local.put(key, Entry(data, embedding))

    def discard(self, key: str) -> None:
        self._local.discard(key)
        if self._remote is not None:
            self._remote.discard(key)

    async def aclose(self) -> None:
        if self._remote is not None:
            await self._remote.aclose()

    def _get_local(self, key: str, spec: EmbeddingSpec) -> CacheHit | None:
        entry = self._local.get(key)
        if entry is None:
            return None
        embedding = _checked(key, entry, spec)
        if embedding is None:
            self._local.discard(key)
            return None
        if entry.embedding is None:
            self._local.put(key, Entry(entry.data, embedding))
        return CacheHit(embedding, entry.data, "local")

    async def _get_remote(self, remote: RemoteTier, key: str, spec: EmbeddingSpec) -> CacheHit | None:
        data = await remote.get(key, _max_frame_bytes(spec))
        if data is None:
            return None
        embedding = _checked(key, Entry(data, None), spec)
        if embedding is None:
            return None  # the encoder's answer will overwrite it
        self._local.put(key, Entry(data, embedding))
        return CacheHit(embedding, data, "redis")


def _checked(key: str, entry: Entry, spec: EmbeddingSpec) -> VisionEmbedding | None:
    """The embedding of an entry, or None if it is not the one that the image implies."""
    try:
        if entry.embedding is None:
            return unpack(entry.data, key=key, spec=spec)
        check(entry.embedding, spec)
    except EmbeddingFormatError as exc:
        logger.warning("the cache entry %s is refused: %s", key, exc)
        metrics.cache_rejected.inc(tags={"reason": exc.reason})
        return None
    return entry.embedding


def _max_frame_bytes(spec: EmbeddingSpec) -> int:
    return sum(map(math.prod, spec.shapes.values())) * spec.dtype.itemsize + _MAX_FRAME_OVERHEAD


@dataclass(slots=True)
class _Flight(Generic[T]):
    work: asyncio.Future[T]
    num_waiters: int = 0


class SingleFlight(Generic[T]):
    """Joins identical work: whoever asks for a key that is being worked on waits for the same result or error.

    A waiter that is cancelled leaves the work to the others; the last one to leave cancels it.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def run(self, key: Hashable, factory: Callable[[], Awaitable[T]]) -> T:
        flight = self._flights.get(key)
        if flight is None or flight.work.done():  # an error that is known already is not handed to a newcomer
            flight = self._flights[key] = _Flight(asyncio.ensure_future(factory()))
        flight.num_waiters += 1
        try:
            return await asyncio.shield(flight.work)
        finally:
            flight.num_waiters -= 1
            if flight.num_waiters == 0:
                flight.work.cancel()  # without effect on work that is done
                if self._flights.get(key) is flight:
                    del self._flights[key]
