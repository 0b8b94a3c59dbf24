"""Image bytes -> embeddings: from the cache, joined with an identical request, or from the encoder service."""

import asyncio
import dataclasses
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from common import metrics
from common.cache import EmbeddingCache, SingleFlight
from common.embedding import EmbeddingFormatError, EmbeddingSpec, Grid, VisionEmbedding, content_digest, unpack
from common.errors import DeadlineExceededError, InvalidRequestError, UnavailableError
from common.geometry import ImageGeometry
from common.identity import EmbeddingNamespace
from common.media import MediaItem
from common.tracing import span

logger = logging.getLogger(__name__)

_MAX_ENCODES = 16  # of one request at a time: the grids of a clip are megabytes each, and other requests want to encode


class EncoderClient(Protocol):
    """The encoder service, as the LLM service sees it."""

    async def encode(self, item: MediaItem) -> bytes: ...

    async def describe(self, image: str | None = None) -> EmbeddingNamespace:
        """Of the replica that encodes the image with this `mm_hash`, or of any: one may be of another version."""

    async def audit(self, item: MediaItem, namespace: str, digest: str) -> bool | None:
        """Encodes again in idle time: is this the embedding's `content_digest()`? None: nothing can be said."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """An image whose header has been read: what to encode, the patch grid its size implies, where it was sent.

    With a `source`, `item` has no bytes: they are fetched from the media store when they are needed. The embedding of
    a `pinned` one does not expire.
    """

    item: MediaItem
    grid_thw: Grid
    field: str
    source: Callable[[], Awaitable[bytes]] | None = None
    pinned: bool = False

    async def whole_item(self) -> MediaItem:
        """With its bytes."""
        return self.item if self.source is None else dataclasses.replace(self.item, data=await self.source())


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """`source` is `local`, `redis` or `encoder`; `wait_ms` is how long this request waited for it."""

    key: str
    embedding: VisionEmbedding
    source: str
    wait_ms: float


class FeatureSource:
    """Asks the cache first. Identical misses of this replica join into one call of the encoder."""

    def __init__(
        self,
        encoder: EncoderClient,
        cache: EmbeddingCache,
        geometry: ImageGeometry,
        audit_fraction: float = 0.0,
        announce_quarantine: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._encoder = encoder
        self._cache = cache
        self._geometry = geometry
        self._in_flight: SingleFlight[ImageFeatures] = SingleFlight()
        self._namespace: EmbeddingNamespace | None = None
        self._auditor = Auditor(encoder, cache, audit_fraction, announce_quarantine)

    async def namespace(self) -> EmbeddingNamespace:
        """What the encoder service says of its embeddings, of no tenant; asked once, and again when a reply differs."""
        if self._namespace is None:
            self._namespace = await self._encoder.describe()
        return self._namespace

    async def ask_encoder(self) -> EmbeddingNamespace:
        """What it says now. Raises UnavailableError."""
        return await self._encoder.describe()

    async def get_many(self, images: Sequence[ImageRequest]) -> list[ImageFeatures]:
        """One result for each image, in order. Raises what the encoder raises, for the first image that fails."""
        if not images:
            return []
        started = time.perf_counter()
        namespace = await self.namespace()
        keys = [embedding_key(namespace, image.item) for image in images]
        specs = {key: self._spec(image, namespace) for key, image in zip(keys, images, strict=True)}
        with span("cache.get", images=len(specs)):
            hits = await self._cache.get_many(specs)
        looked_up_ms = (time.perf_counter() - started) * 1000
        window = asyncio.Semaphore(_MAX_ENCODES)

        async def one(key: str, image: ImageRequest) -> ImageFeatures:
            if hit := hits.get(key):
                return ImageFeatures(key, hit.embedding, hit.tier, looked_up_ms)
            async with window:
                features = await self._join_or_encode(key, image)
            elapsed_ms = (time.perf_counter() - started) * 1000
            return ImageFeatures(features.key, features.embedding, features.source, elapsed_ms)

        unique = dict(zip(keys, images, strict=True))  # where nothing moves a clip has one grid many times
        done = await asyncio.gather(*(one(*each) for each in unique.items()), return_exceptions=True)
        result_of = dict(zip(unique, done, strict=True))
        results = [result_of[key] for key in keys]
        for image, result in zip(images, results, strict=True):
            if isinstance(result, InvalidRequestError):
                raise type(result)(result.message, param=image.field, code=result.code) from result
            if isinstance(result, BaseException):
                raise result
        found = [result for result in results if isinstance(result, ImageFeatures)]
        for image, features in zip(images, found, strict=True):
            self._count(image, features, namespace)
        return found

    async def _join_or_encode(self, key: str, image: ImageRequest) -> ImageFeatures:
        while True:
            try:
                return await self._in_flight.run(key, lambda: self._encode(image))
            except DeadlineExceededError:
                image.item.check_deadline()  # else the work was another request's, whose time was over

    async def _encode(self, image: ImageRequest) -> ImageFeatures:
        since = self._cache.moment
        with span("encode", image=image.item.mm_hash):
            data = await self._encoder.encode(await image.whole_item())
        namespace = await self.namespace()
        for _ in range(2):
            key = embedding_key(namespace, image.item)
            try:
                embedding = unpack(data, key=key, spec=self._spec(image, namespace), seal=self._cache.seal)
            except EmbeddingFormatError as exc:
                logger.warning("the encoder's reply does not fit its namespace, asking again: %s", exc)
                # Another version may be replacing this one, or an encoder on another device run beside it.
                namespace = self._namespace = await self._encoder.describe(image.item.mm_hash)
                continue
            # the encoder itself publishes to the shared tier
            self._cache.put_local(key, data, embedding, since=since)
            return ImageFeatures(key, embedding, "encoder", 0.0)
        raise UnavailableError("the encoder service gave an embedding that does not fit the image")

    def _count(self, image: ImageRequest, features: ImageFeatures, namespace: EmbeddingNamespace) -> None:
        tags = {"source": features.source, "tenant": image.item.tenant}
        metrics.images.inc(tags=tags)
        metrics.mm_cache_queries.inc()
        metrics.embedding_wait_seconds.observe(features.wait_ms / 1000, tags={"source": features.source})
        if features.source != "encoder":
            metrics.mm_cache_hits.inc()
            metrics.encoder_seconds_saved.inc(features.embedding.encode_ms / 1000, tags=tags)
            self._auditor.consider(image, str(namespace.of(image.item.tenant)), features.embedding)

    def _spec(self, image: ImageRequest, namespace: EmbeddingNamespace) -> EmbeddingSpec:
        dtype = getattr(torch, namespace.dtype)
        return self._geometry.embedding_spec(image.grid_thw, dtype, image.item.params.reduction)


def embedding_key(namespace: EmbeddingNamespace, item: MediaItem) -> str:
    """The cache key of an image, which is its tenant's alone."""
    return namespace.of(item.tenant).key(item.mm_hash, str(item.params))


class Auditor:
    """Has a share of the embeddings that were found encoded again, one at a time, while the encoder is idle.

    A mismatch means that the cache, the wire or a device changes bits, so nothing that is kept of the namespace is used
    any more, by this replica from now on and by the others as soon as they hear of it.
    """

    def __init__(
        self,
        encoder: EncoderClient,
        cache: EmbeddingCache,
        fraction: float,
        announce: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._announce = announce
        self._encoder = encoder
        self._cache = cache
        self._fraction = fraction
        self._running: asyncio.Task[None] | None = None

    def consider(self, image: ImageRequest, namespace: str, embedding: VisionEmbedding) -> None:
        """Returns at once. While an audit runs, no other one is begun."""
        is_free = self._running is None or self._running.done()
        if is_free and random.random() < self._fraction:
            self._running = asyncio.create_task(self._audit(image, namespace, embedding))

    async def _audit(self, image: ImageRequest, namespace: str, embedding: VisionEmbedding) -> None:
        try:
            digest = await asyncio.to_thread(content_digest, embedding)
            is_right = await self._encoder.audit(await image.whole_item(), namespace, digest)
            if is_right is False:
                self._cache.quarantine(namespace)
                if self._announce is not None:
                    await self._announce(namespace)
        except Exception:  # nobody awaits this task, and requests go on without it
            logger.exception("the audit of %s failed", image.item.mm_hash)
            metrics.audits.inc(tags={"result": "failed"})
            return
        metrics.audits.inc(tags={"result": {True: "equal", False: "different", None: "skipped"}[is_right]})
