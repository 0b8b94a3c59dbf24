"""Image bytes -> embeddings: from the cache, joined with an identical request, or from the encoder service."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from common.cache import EmbeddingCache, SingleFlight
from common.embedding import EmbeddingFormatError, EmbeddingSpec, Grid, VisionEmbedding, unpack
from common.errors import InvalidRequestError, UnavailableError
from common.families import ImageGeometry
from common.identity import EmbeddingNamespace
from common.media import MediaItem

logger = logging.getLogger(__name__)


class EncoderClient(Protocol):
    """The encoder service, as the LLM service sees it."""

    async def encode(self, item: MediaItem) -> bytes: ...

    async def describe(self) -> EmbeddingNamespace: ...


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """An image whose header has been read: what to encode, the patch grid its size implies, where it was sent."""

    item: MediaItem
    grid_thw: Grid
    field: str


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """`source` is `local`, `redis` or `encoder`; `milliseconds` is how long this request waited for it."""

    key: str
    embedding: VisionEmbedding
    source: str
    milliseconds: float


class FeatureSource:
    """Asks the cache first. Identical misses of this replica join into one call of the encoder."""

    def __init__(self, encoder: EncoderClient, cache: EmbeddingCache, geometry: ImageGeometry) -> None:
        self._encoder = encoder
        self._cache = cache
        self._geometry = geometry
        self._in_flight: SingleFlight[ImageFeatures] = SingleFlight()
        self._namespace: EmbeddingNamespace | None = None

    async def namespace(self) -> EmbeddingNamespace:
        """What the encoder service says of its embeddings; asked once, and again when a reply differs."""
        if self._namespace is None:
            self._namespace = await self._encoder.describe()
        return self._namespace

    async def get_many(self, images: Sequence[ImageRequest]) -> list[ImageFeatures]:
        """One result for each image, in order. Raises what the encoder raises, for the first image that fails."""
        if not images:
            return []
        started = time.perf_counter()
        namespace = await self.namespace()
        keys = [namespace.key(image.item.mm_hash, str(image.item.params)) for image in images]
        specs = {key: self._spec(image, namespace) for key, image in zip(keys, images, strict=True)}
        hits = await self._cache.get_many(specs)
        looked_up_ms = (time.perf_counter() - started) * 1000

        async def one(key: str, image: ImageRequest) -> ImageFeatures:
            if hit := hits.get(key):
                return ImageFeatures(key, hit.embedding, hit.tier, looked_up_ms)
            features = await self._in_flight.run(key, lambda: self._encode(image))
            elapsed_ms = (time.perf_counter() - started) * 1000
            return ImageFeatures(features.key, features.embedding, features.source, elapsed_ms)

        waiting = [one(key, image) for key, image in zip(keys, images, strict=True)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        for image, result in zip(images, results, strict=True):
            if isinstance(result, InvalidRequestError):
                raise type(result)(result.message, param=image.field, code=result.code) from result
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if isinstance(result, ImageFeatures)]

    async def _encode(self, image: ImageRequest) -> ImageFeatures:
        data = await self._encoder.encode(image.item)
        for _ in range(2):
            namespace = await self.namespace()
            key = namespace.key(image.item.mm_hash, str(image.item.params))
            try:
                embedding = unpack(data, key=key, spec=self._spec(image, namespace))
            except EmbeddingFormatError as exc:
                logger.warning("the encoder's reply does not fit its namespace, asking again: %s", exc)
                self._namespace = None  # an encoder with other weights may have been deployed
                continue
            self._cache.put_local(key, data, embedding)  # the encoder itself publishes to the shared tier
            return ImageFeatures(key, embedding, "encoder", 0.0)
        raise UnavailableError("the encoder service gave an embedding that does not fit the image")

    def _spec(self, image: ImageRequest, namespace: EmbeddingNamespace) -> EmbeddingSpec:
        dtype = getattr(torch, namespace.dtype)
        return self._geometry.embedding_spec(image.grid_thw, dtype)
