"""Where embeddings are kept: an in-process tier in front of a shared one. A cache may fail; an answer may not.

Everything here belongs to one event loop: it takes no lock, and it never blocks.
"""

import asyncio
import heapq
import itertools
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch

from common import metrics
from common.embedding import (
    CHECKSUM,
    Buffer,
    EmbeddingFormatError,
    EmbeddingSpec,
    Seal,
    VisionEmbedding,
    check,
    pinned,
    pinned_bytes,
    unpack,
)
from common.errors import UnavailableError
from common.identity import images_of
from common.miss_ratio import MissRatioCurve

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_FRAME_OVERHEAD = 128 * 1024  # prefix, header and padding of a packed embedding
_MAX_READ_BYTES = 64 * 1024**2  # of a frame whose size nobody knows
_MAX_PAST_USES = 4096
_UNUSED_SHARE = 4  # of the tier's bytes
_MAX_DISCARDED = 4096
_LEASE_S = 2.0  # what a dead holder costs those who wait for it
_LEASE_POLL_S = 0.05
_SWEEP_AGAIN_S = 2.0
_MS_PER_BYTE = 2.5e-5  # 100 ms for 4 MiB: until the first entry of a known cost


class CacheHit(NamedTuple):
    """`data` is the packed frame, whose memory `embedding` shares."""

    embedding: VisionEmbedding
    data: Buffer
    tier: Literal["local", "redis"]


class EmbeddingCache(Protocol):
    seal: Seal  # of the frames that are put and got

    async def get_many(self, wanted: Mapping[str, EmbeddingSpec]) -> dict[str, CacheHit]:
        """The entries that are there and are what their image implies. Whatever goes wrong is a miss."""

    @property
    def moment(self) -> int:
        """Taken when the making of an entry begins: see `put()`. Grows whenever an image is discarded."""

    def put(self, key: str, data: bytes, embedding: VisionEmbedding | None = None, *, since: int | None = None) -> None:
        """Returns at once. `embedding` is what was unpacked from `data`, if it was: it saves doing so on a hit.

        An entry whose image was discarded after the moment `since`, at which its making began, is not kept.
        """

    def put_local(
        self, key: str, data: bytes, embedding: VisionEmbedding | None = None, *, since: int | None = None
    ) -> None:
        """For this process alone: the entry is someone else's to publish."""

    async def claim(self, key: str, spec: EmbeddingSpec, holder: str) -> bool:
        """Whether `holder` is to make the entry. No: another process began a moment ago; see `wait_for()`."""

    async def wait_for(self, key: str, spec: EmbeddingSpec, holder: str) -> CacheHit | None:
        """The entry as soon as the other process has made it; None once its claim is over."""

    def discard(self, key: str) -> None: ...

    def discard_image(self, mm_hash: str) -> None:
        """Discards every entry of these bytes that this process has, whatever their namespace and params.

        What is being read or made now is not kept either.
        """

    async def sweep(self, mm_hash: str) -> None:
        """Discards what the shared tier has of these bytes under any namespace and params; takes a while.

        If the tier does not answer, that is done later.
        """

    def clear_local(self) -> None: ...

    async def tiers(self, key: str) -> list[str]:
        """Where an entry is now."""

    async def read(self, key: str) -> Buffer | None:
        """The frame of an entry, unchecked."""

    async def keys(self) -> list[str]:
        """Of all entries that this process and the shared tier have; takes a while."""

    async def pin(self, key: str) -> bool:
        """Whether the shared tier has the entry, which it then keeps until it is discarded."""

    def quarantine(self, namespace: str) -> None:
        """From now on every entry of the namespace is a miss here, and none is kept."""

    def report(self) -> dict[str, Any]:
        """What the tiers hold and what more memory would bring, in JSON's types."""

    async def aclose(self) -> None: ...


class RemoteTier(Protocol):
    """A store shared by processes. It never raises: what it cannot tell is absent, what it cannot write is dropped."""

    async def get(self, key: str, max_bytes: int) -> bytes | None:
        """The value, of which nothing after the first `max_bytes` is read."""

    def put(self, key: str, data: bytes) -> None: ...

    def record_encode(self, num_bytes: int, seconds: float) -> None:
        """What making an entry took: a store that is slower than that is not asked."""

    async def lease(self, key: str, holder: str, seconds: float, max_bytes: int) -> bool:
        """False if another holder took it less than `seconds` ago; it ends by itself and in no other way."""

    def discard(self, key: str) -> None: ...

    async def pin(self, key: str) -> bool:
        """Whether the entry is there; if so, it no longer expires."""

    async def keys(self) -> list[str]: ...

    def stats(self) -> Mapping[str, Any]: ...

    async def aclose(self) -> None: ...


class Entry(NamedTuple):
    data: Buffer
    embedding: VisionEmbedding | None


@dataclass(slots=True, eq=False)
class _Resident:
    entry: Entry
    num_bytes: int
    ms_per_byte: float  # what keeping one byte of it saves at each use
    expires: float
    order: int
    num_uses: int
    priority: float


class LocalTier:
    """At most `max_bytes` of frames: those that save most encoding for their size.

    GreedyDual-Size-Frequency (Cherkasova 1998, after Cao and Irani 1997). An entry's priority is the tier's age at its
    last use, plus encode cost x uses / bytes. Whatever has the lowest leaves, be it the newcomer, and the age becomes
    its priority: what was precious long ago goes in the end. The uses of an entry that left are remembered for a while,
    so that one which comes back weighs more than one which comes once. A use is O(1), an eviction O(log n), amortised.

    With `pinned`, embeddings are kept in page-locked memory and count as what torch's allocator takes for them.
    """

    def __init__(self, max_bytes: int, ttl_s: float = math.inf, *, pinned: bool = False) -> None:
        self.max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._is_pinned = pinned
        self._num_unused_bytes = 0  # page-locked ones, which the allocator keeps for later blocks of their size
        self.num_bytes = 0
        self._residents: dict[str, _Resident] = {}
        # (priority, order, key). A use raises the priority of the resident, not of its item here, which is put right
        # when it comes to the top; an item whose order is not its resident's is of one that left.
        self._heap: list[tuple[float, int, str]] = []
        self._past_uses: OrderedDict[str, int] = OrderedDict()  # of the last that left
        self._order = itertools.count()
        self._age = 0.0
        self._known_ms = 0.0
        self._known_bytes = 0

    def __len__(self) -> int:
        return len(self._residents)

    def __iter__(self) -> Iterator[str]:
        return iter(self._residents)

    def __contains__(self, key: str) -> bool:
        return key in self._residents

    def get(self, key: str) -> Entry | None:
        resident = self._residents.get(key)
        if resident is None:
            return None
        if resident.expires <= time.monotonic():
            self.discard(key)
            return None
        resident.num_uses += 1
        resident.priority = self._priority(resident.num_uses, resident.ms_per_byte)
        return resident.entry

    def put(self, key: str, entry: Entry) -> None:
        """Keeps the entry if it is worth more than what would have to leave for it."""
        resident = self._residents.get(key)
        num_uses = resident.num_uses if resident is not None else self._past_uses.pop(key, 0) + 1
        self.discard(key)
        num_bytes = pinned_bytes(len(entry.data)) if self._is_pinned else len(entry.data)
        if num_bytes > self.max_bytes:
            return
        ms_per_byte = self._ms_per_byte(entry)
        priority = self._priority(num_uses, ms_per_byte)
        expires = time.monotonic() + self._ttl_s
        resident = _Resident(entry, num_bytes, ms_per_byte, expires, next(self._order), num_uses, priority)
        self._residents[key] = resident
        self.num_bytes += num_bytes
        heapq.heappush(self._heap, (priority, resident.order, key))
        while self.num_bytes > self.max_bytes:
            self._evict()
        if self._is_pinned and entry.embedding is not None and key in self._residents:
            resident.entry = Entry(*pinned(entry.data, entry.embedding))
        metrics.local_tier_bytes.set(self.num_bytes)

    def discard(self, key: str) -> None:
        resident = self._residents.pop(key, None)
        if resident is not None:
            self._give_back(resident)
            self._drop_stale_items()

    def _give_back(self, resident: _Resident) -> None:
        self.num_bytes -= resident.num_bytes
        if self._is_pinned:
            self._num_unused_bytes += resident.num_bytes
            if self._num_unused_bytes > self.max_bytes // _UNUSED_SHARE:
                torch.accelerator.empty_host_cache()
                self._num_unused_bytes = 0

    def _priority(self, num_uses: int, ms_per_byte: float) -> float:
        return self._age + num_uses * ms_per_byte

    def _ms_per_byte(self, entry: Entry) -> float:
        """Measured by the encoder; else that of the others, since cost grows with tokens, and so do bytes."""
        encode_ms = entry.embedding.encode_ms if entry.embedding is not None else 0.0
        if encode_ms > 0:
            self._known_ms += encode_ms
            self._known_bytes += len(entry.data)
            return encode_ms / len(entry.data)
        return self._known_ms / self._known_bytes if self._known_bytes else _MS_PER_BYTE

    def _evict(self) -> None:
        """Takes out the resident of the lowest priority."""
        while True:
            priority, order, key = self._heap[0]
            resident = self._residents.get(key)
            if resident is None or resident.order != order:
                heapq.heappop(self._heap)
            elif resident.priority > priority:
                heapq.heapreplace(self._heap, (resident.priority, order, key))
            else:
                heapq.heappop(self._heap)
                del self._residents[key]
                self._give_back(resident)
                self._age = priority
                self._past_uses[key] = resident.num_uses
                if len(self._past_uses) > _MAX_PAST_USES:
                    self._past_uses.popitem(last=False)
                return

    def _drop_stale_items(self) -> None:
        if len(self._heap) > 2 * len(self._residents) + 64:
            self._heap = [(found.priority, found.order, key) for key, found in self._residents.items()]
            heapq.heapify(self._heap)


class _Discarded:
    """When images were discarded, in moments of this process: exact for the last `_MAX_DISCARDED`, else too late."""

    def __init__(self) -> None:
        self.now = 0
        self._moments: OrderedDict[str, int] = OrderedDict()
        self._of_all_others = 0

    def record(self, mm_hash: str) -> None:
        self.now += 1
        self._moments[mm_hash] = self.now
        self._moments.move_to_end(mm_hash)
        if len(self._moments) > _MAX_DISCARDED:
            self._of_all_others = self._moments.popitem(last=False)[1]

    def record_all(self) -> None:
        self.now += 1
        self._of_all_others = self.now
        self._moments.clear()

    def is_after(self, moment: int, mm_hash: str) -> bool:
        return moment < self._moments.get(mm_hash, self._of_all_others)


class TieredCache:
    """The EmbeddingCache of both services: local first, then the shared tier, if there is one."""

    def __init__(self, local: LocalTier, remote: RemoteTier | None, seal: Seal = CHECKSUM) -> None:
        self.seal = seal
        self._local = local
        self._remote = remote
        self._lookups = MissRatioCurve()
        self._quarantined: set[str] = set()
        self._discarded = _Discarded()
        self._unswept: set[str] = set()
        self._sweeping = asyncio.Lock()
        self._sweeping_again: asyncio.Task[None] | None = None

    async def get_many(self, wanted: Mapping[str, EmbeddingSpec]) -> dict[str, CacheHit]:
        for key, spec in wanted.items():
            self._lookups.record(key, spec.num_bytes)
        found = {key: self._get_local(key, spec) for key, spec in wanted.items() if not self._is_quarantined(key)}
        if self._remote is not None:
            missing = [key for key, hit in found.items() if hit is None]
            remote_hits = await asyncio.gather(*(self._get_remote(self._remote, key, wanted[key]) for key in missing))
            found.update(zip(missing, remote_hits, strict=True))
        hits = {key: hit for key, hit in found.items() if hit is not None}
        for hit in hits.values():
            metrics.cache_hits.inc(tags={"tier": hit.tier})
        metrics.cache_misses.inc(len(wanted) - len(hits))
        return hits

    @property
    def moment(self) -> int:
        return self._discarded.now

    def put(self, key: str, data: bytes, embedding: VisionEmbedding | None = None, *, since: int | None = None) -> None:
        self.put_local(key, data, embedding, since=since)
        if self._remote is not None and self._is_wanted(key, since):
            self._remote.put(key, data)

    def put_local(
        self, key: str, data: bytes, embedding: VisionEmbedding | None = None, *, since: int | None = None
    ) -> None:
        if self._is_wanted(key, since):
            self._local.put(key, Entry(data, embedding))
        if self._remote is not None and embedding is not None and embedding.encode_ms:
            self._remote.record_encode(len(data), embedding.encode_ms / 1000)

    async def claim(self, key: str, spec: EmbeddingSpec, holder: str) -> bool:
        # Only help while replicas change and requests for one image reach two of them. What cannot be told is a claim.
        if self._remote is None or self._is_quarantined(key):
            return True
        return await self._remote.lease(key, holder, _LEASE_S, spec.num_bytes + _MAX_FRAME_OVERHEAD)

    async def wait_for(self, key: str, spec: EmbeddingSpec, holder: str) -> CacheHit | None:
        while self._remote is not None:
            await asyncio.sleep(_LEASE_POLL_S)
            hit = await self._get_remote(self._remote, key, spec)
            if hit is not None or await self.claim(key, spec, holder):
                return hit
        return None

    def discard(self, key: str) -> None:
        self._local.discard(key)
        if self._remote is not None:
            self._remote.discard(key)

    def discard_image(self, mm_hash: str) -> None:
        self._discarded.record(mm_hash)
        for key in [key for key in self._local if mm_hash in images_of(key)]:
            self.discard(key)

    async def sweep(self, mm_hash: str) -> None:
        # Redis has no list of an image's entries, so all names are read: at one time for all who wait.
        self._unswept.add(mm_hash)
        async with self._sweeping:
            if mm_hash in self._unswept:
                await self._sweep()

    async def _sweep(self) -> None:
        swept, self._unswept = self._unswept, set()
        if self._remote is None:
            return
        is_done = False
        try:
            for key in await self._remote.keys():
                if not swept.isdisjoint(images_of(key)):
                    self._remote.discard(key)
            is_done = True
        except UnavailableError as exc:
            logger.warning("what was deleted is looked for again later: %s", exc.message)
        finally:  # whoever asked may have left
            if not is_done:
                self._unswept |= swept
                if self._sweeping_again is None:
                    self._sweeping_again = asyncio.create_task(self._sweep_again())

    async def _sweep_again(self) -> None:
        try:
            while self._unswept:
                await asyncio.sleep(_SWEEP_AGAIN_S)
                async with self._sweeping:
                    await self._sweep()
        finally:
            self._sweeping_again = None

    def clear_local(self) -> None:
        self._discarded.record_all()
        for key in list(self._local):
            self._local.discard(key)

    async def tiers(self, key: str) -> list[str]:
        local = ["local"] if key in self._local else []
        is_remote = self._remote is not None and await self._remote.get(key, 1) is not None
        return local + (["redis"] if is_remote else [])

    async def read(self, key: str) -> Buffer | None:
        entry = self._local.get(key)
        if entry is not None or self._remote is None:
            return entry.data if entry is not None else None
        return await self._remote.get(key, _MAX_READ_BYTES)

    async def keys(self) -> list[str]:
        remote = await self._remote.keys() if self._remote is not None else []
        return sorted({*self._local, *remote})

    async def pin(self, key: str) -> bool:
        return self._remote is not None and await self._remote.pin(key)

    def quarantine(self, namespace: str) -> None:
        if namespace not in self._quarantined:
            logger.error(
                "the embeddings of namespace %s are not used any more: one was not what its image gives", namespace
            )
            metrics.cache_quarantines.inc()
            self._quarantined.add(namespace)
        for key in [key for key in self._local if self._is_quarantined(key)]:
            self._local.discard(key)

    def report(self) -> dict[str, Any]:
        sizes = [self._local.max_bytes * factor // 4 for factor in (1, 2, 4, 8, 16, 32, 64)]
        ratios = self._lookups.miss_ratios(sizes)
        return {
            "local": {
                "entries": len(self._local),
                "bytes": self._local.num_bytes,
                "max_bytes": self._local.max_bytes,
            },
            "redis": None if self._remote is None else dict(self._remote.stats()),
            "miss_ratio_curve": [{"bytes": size, "miss_ratio": round(ratio, 4)} for size, ratio in ratios.items()],
            "quarantined": sorted(self._quarantined),
        }

    async def aclose(self) -> None:
        if self._sweeping_again is not None:
            self._sweeping_again.cancel()
        if self._remote is not None:
            await self._remote.aclose()

    def _is_wanted(self, key: str, since: int | None) -> bool:
        is_discarded = since is not None and any(self._discarded.is_after(since, image) for image in images_of(key))
        return not (is_discarded or self._is_quarantined(key))

    def _is_quarantined(self, key: str) -> bool:
        return key.partition(":")[0] in self._quarantined

    def _get_local(self, key: str, spec: EmbeddingSpec) -> CacheHit | None:
        entry = self._local.get(key)
        if entry is None:
            return None
        embedding = _checked(key, entry, spec, self.seal)
        if embedding is None:
            self._local.discard(key)
            return None
        if entry.embedding is None:
            self._local.put(key, Entry(entry.data, embedding))
        return CacheHit(embedding, entry.data, "local")

    async def _get_remote(self, remote: RemoteTier, key: str, spec: EmbeddingSpec) -> CacheHit | None:
        since = self.moment
        data = await remote.get(key, spec.num_bytes + _MAX_FRAME_OVERHEAD)
        if data is None:
            return None
        embedding = _checked(key, Entry(data, None), spec, self.seal)
        if embedding is None:
            return None  # the encoder's answer will overwrite it
        if self._is_wanted(key, since):
            self._local.put(key, Entry(data, embedding))
        return CacheHit(embedding, data, "redis")


def _checked(key: str, entry: Entry, spec: EmbeddingSpec, seal: Seal) -> VisionEmbedding | None:
    """The embedding of an entry, or None if it is not the one that the image implies."""
    try:
        if entry.embedding is None:
            return unpack(entry.data, key=key, spec=spec, seal=seal)
        check(entry.embedding, spec)
    except EmbeddingFormatError as exc:
        logger.warning("the cache entry %s is refused: %s", key, exc)
        metrics.cache_rejected.inc(tags={"reason": exc.reason})
        return None
    return entry.embedding


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
