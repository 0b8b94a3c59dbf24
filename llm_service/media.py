"""Managed media and aliases, as requests see them: an image by its bytes, by its id, or by a name it was given."""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError

from common import metrics
from common.cache import EmbeddingCache
from common.config import ImageLimits, TokenReduction
from common.embedding import Buffer, EmbeddingFormatError, EmbeddingSpec, Grid, check, unpack
from common.errors import (
    ConflictError,
    InsufficientStorageError,
    InvalidRequestError,
    UnavailableError,
)
from common.geometry import ImageGeometry
from common.identity import images_of, mm_hash, params_of
from common.media import ImageHeader, MediaItem, MediaParams, image_header, reduction_of
from common.media_store import DeletionWatcher, MediaRecord, MediaStore, discard_from, media_id_of
from common.threads import on_thread_if_large
from llm_service.admission import ANYONE, RequestContext
from llm_service.answer_cache import AnswerCache
from llm_service.clips import ClipLibrary, ClipRequest, Visual
from llm_service.features import FeatureSource, ImageFeatures, ImageRequest, embedding_key
from llm_service.fetch import ImageFetcher
from llm_service.image_parts import ContentHash, Detail, ImagePart, MediaPart, UrlPart, with_detail
from llm_service.video_parts import ClipPart, VisualPart

FetchedPart = ImagePart | MediaPart | ClipPart

_PIN_ATTEMPTS = 40  # the encoder publishes behind its answer, so an entry is there a moment later
_PIN_RETRY_S = 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class MediaStatus:
    """A record, what its embedding at the usual detail is like, and where that is now."""

    record: MediaRecord
    num_tokens: int
    grid_thw: Grid
    tiers: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class MediaContext:
    """What features of some families depend on besides the image: see `MediaParams`."""

    alone: bool = True
    instruction: str = ""


ALONE = MediaContext()


class MediaLibrary:
    """Resolves the images of requests and keeps managed ones. One event loop, as the cache."""

    def __init__(
        self,
        store: MediaStore,
        features: FeatureSource,
        cache: EmbeddingCache,
        geometry: ImageGeometry,
        params: MediaParams,
        limits: ImageLimits,
        fetcher: ImageFetcher,
        answers: AnswerCache | None = None,
        clips: ClipLibrary | None = None,
    ) -> None:
        """Without `clips` they are refused."""
        self.store = store
        self.deletions = DeletionWatcher(store, self._discard)
        self._features = features
        self._cache = cache
        self._geometry = geometry
        self._limits = limits
        self._fetcher = fetcher
        self._answers = answers
        self._clips = clips
        self.params = params
        self._pinning: dict[str, asyncio.Task[None]] = {}

    async def resolve(
        self, parts: Sequence[VisualPart], context: MediaContext = ALONE, caller: RequestContext = ANYONE
    ) -> list[Visual]:
        """What to encode for each part, in order. No image is decoded; bytes of managed ones are not read yet."""
        await self.deletions.listen()
        return [await self._resolve(part, context, caller) for part in await self.fetched(parts)]

    async def fetched(self, parts: Sequence[VisualPart]) -> list[FetchedPart]:
        """With the bytes of the images behind URLs, fetched at the same time; clips have theirs when they are resolved.

        Raises what `ImageFetcher.fetch()` raises.
        """
        return await asyncio.gather(*map(self._fetch, parts))

    def forget_clips(self, parts: Sequence[VisualPart], caller: RequestContext) -> None:
        """Frees their frames, which nothing needs once they are encoded."""
        for part in parts:
            if self._clips is not None and isinstance(part, ClipPart):
                self._clips.forget(part, caller)

    async def tiers(self, image: ImageRequest) -> list[str]:
        """Where the embedding of an image is now."""
        return await self._cache.tiers(embedding_key(await self._features.namespace(), image.item))

    async def add(
        self,
        source: bytes,
        *,
        tenant: str = "",
        ttl_s: float | None = None,
        pin: bool | None = None,
        prewarm: bool = False,
    ) -> MediaStatus:
        """Keeps an image. The same bytes are the same media."""
        await self.deletions.listen()
        request, header = await self._sent(source, "auto", "file", ALONE, RequestContext(tenant))
        record = await self._keep(request, header, ttl_s, pin)
        if prewarm:
            await self._features.get_many([request])
        key = embedding_key(await self._features.namespace(), request.item)
        if pin is False:
            self._cache.discard(key)  # it may have been pinned, and would stay
        status = await self._status(record)
        if record.pinned and (prewarm or status.tiers):
            self._pin_later(key)
        return status

    async def show(self, media_id: str, tenant: str = "") -> MediaStatus:
        """Raises MediaNotFoundError."""
        return await self._status(await self.store.get(media_id, tenant, param="media_id"))

    async def page(self, after: str, limit: int, tenant: str = "") -> tuple[list[MediaStatus], bool]:
        """In the order of ids, and whether there are more."""
        page = await self.store.page(tenant, after=after, limit=limit)
        return [await self._status(record) for record in page.records], page.has_more

    async def delete(self, media_id: str, tenant: str = "") -> None:
        """Raises MediaNotFoundError. Here its embeddings are gone at once, elsewhere a moment later.

        What was being encoded or answered meanwhile is not kept.
        """
        await self.deletions.poll()  # so that it listens from here on
        record = await self.store.delete(media_id, tenant)
        await self.deletions.poll()
        await self._cache.sweep(record.mm_hash)  # those of other weights, dtypes or pixel budgets

    def pin_again(self, images: Sequence[ImageRequest], features: Sequence[ImageFeatures]) -> None:
        """Has embeddings of pinned media pinned that were encoded anew, or by someone who did not know of the pin."""
        for image, found in zip(images, features, strict=True):
            if image.pinned and found.source != "local":
                self._pin_later(found.key)

    async def warm(self, source: bytes, tenant: str = "") -> ImageFeatures:
        """Has an image encoded, unless it is cached, without keeping its bytes."""
        await self.deletions.listen()
        request, _ = await self._sent(source, "auto", "file", ALONE, RequestContext(tenant))
        return (await self._features.get_many([request]))[0]

    async def tiers_of_image(self, mm_hash: str, tenant: str = "") -> list[str]:
        """Where the embedding of an image at the usual detail is now."""
        namespace = (await self._features.namespace()).of(tenant)
        return await self._cache.tiers(namespace.key(mm_hash, str(self.params)))

    async def keys(self, tenant: str = "") -> list[str]:
        """Of the tenant's embeddings that the current encoder could have made."""
        prefix = f"{(await self._features.namespace()).of(tenant)}:"
        return [key for key in await self._cache.keys() if key.startswith(prefix)]

    async def export(self, key: str) -> Buffer | None:
        """A frame, if it is there and sound."""
        frame = await self._cache.read(key)
        return frame if frame is not None and await self._is_sound(key, frame) else None

    async def import_frame(self, key: str, frame: bytes, tenant: str = "") -> None:
        """Raises InvalidRequestError unless the current encoder could have made the embedding for the tenant."""
        since = self._cache.moment
        if not key.startswith(f"{(await self._features.namespace()).of(tenant)}:"):
            raise InvalidRequestError(
                "the embedding is of another model, device, version or tenant", code="other_namespace"
            )
        if not await self._is_sound(key, frame):
            raise InvalidRequestError("the embedding is damaged or not of this model", code="invalid_embedding")
        self._cache.put(key, frame, since=since)

    async def report(self) -> Mapping[str, str | int]:
        """What the second store holds, in JSON's types."""
        try:
            return await self.store.stats()
        except UnavailableError as exc:
            return {"error": exc.message}

    async def check_store(self) -> dict[str, Any]:
        """Raises UnavailableError if the second store does not answer."""
        await self.store.last_deletion()
        return {}

    async def purge(self) -> int:
        """Empties the shared tier and the local tiers of all replicas, and forgets kept answers; media stay.

        Returns how many embeddings it saw.
        """
        if self._answers is not None:
            self._answers.discard_all()
        keys = await self._cache.keys()
        for key in keys:
            self._cache.discard(key)
        await self.deletions.poll()  # so that it listens from here on
        await self.store.forget_embeddings()
        await self.deletions.poll()
        return len(keys)

    async def _fetch(self, part: VisualPart) -> FetchedPart:
        if not isinstance(part, UrlPart):
            return part
        data = await self._fetcher.fetch(part.url, part.field)
        if part.content_hash is not None:
            await on_thread_if_large(len(data), part.content_hash.check, data)
        return ImagePart(data, part.detail, part.field, part.alias)

    async def _resolve(self, part: FetchedPart, context: MediaContext, caller: RequestContext) -> Visual:
        if isinstance(part, ClipPart):
            return await self._clip(part, caller)
        if isinstance(part, MediaPart):
            record = await self._record(part, caller.tenant)
            return self._managed(record, part.detail, part.field, context, caller.deadline)
        request, header = await self._sent(part.data, part.detail, part.field, context, caller)
        if part.alias is not None:
            await self._bind(part, request, header)
        return request

    async def _clip(self, part: ClipPart, caller: RequestContext) -> ClipRequest:
        if self._clips is None:
            raise InvalidRequestError(
                "this model takes no clips: send frames as images",
                param=part.field,
                code="unsupported_content_part",
            )
        return await self._clips.resolve(part, self._fetcher.fetch, caller)

    async def _sent(
        self, source: bytes, detail: Detail, field: str, context: MediaContext, caller: RequestContext
    ) -> tuple[ImageRequest, ImageHeader]:
        params = self._params_in(detail, context)
        try:
            header = await on_thread_if_large(len(source), image_header, source, self._limits)
            grid = params.grid(self._geometry, header.height, header.width)
        except InvalidRequestError as exc:
            raise type(exc)(exc.message, param=field, code=exc.code) from exc
        digest = await on_thread_if_large(len(source), mm_hash, source)
        item = MediaItem(source, digest, params, caller.tenant, caller.deadline)
        return ImageRequest(item, grid, field), header

    def _params_in(self, detail: Detail, context: MediaContext) -> MediaParams:
        params = with_detail(self.params, detail)
        return dataclasses.replace(params, alone=context.alone, instruction=context.instruction)

    def _managed(
        self, record: MediaRecord, detail: Detail, field: str, context: MediaContext, deadline: float | None = None
    ) -> ImageRequest:
        params = self._params_in(detail, context)
        return ImageRequest(
            item=MediaItem(b"", record.mm_hash, params, record.tenant, deadline),
            grid_thw=params.grid(self._geometry, record.height, record.width),
            field=field,
            source=partial(self.store.source, record),
            pinned=record.pinned,
        )

    async def _record(self, part: MediaPart, tenant: str) -> MediaRecord:
        match part.kind:
            case "id":
                return await self.store.get(part.name, tenant, param=part.field)
            case "digest":
                return await self.store.get(media_id_of(tenant, part.name), tenant, param=part.field)
        record = await self.store.find(part.name, tenant)
        if record is None:
            raise InvalidRequestError(
                f"no image is known by the uuid {part.name!r}: send its bytes in image_url.url",
                param=part.field,
                code="unknown_uuid",
            )
        if part.content_hash is not None:
            await self._check_content(part.content_hash, record)
        return record

    async def _check_content(self, expected: ContentHash, record: MediaRecord) -> None:
        if expected.algorithm == "blake3":
            expected.check_digest(record.mm_hash)
        else:
            source = await self.store.source(record)
            await on_thread_if_large(len(source), expected.check, source)

    async def _bind(self, part: ImagePart, request: ImageRequest, header: ImageHeader) -> None:
        """An image that is sent with an alias is kept as any other media, so that the alias alone is enough later."""
        assert part.alias is not None
        field = part.field.removesuffix("image_url.url") + "uuid"
        try:
            known = await self.store.find(part.alias, request.item.tenant)
            if known is not None and known.mm_hash == request.item.mm_hash:
                return
            if known is not None:
                raise ConflictError(f"{part.alias!r} is another image's already", param=field, code="alias_conflict")
            record = await self._keep(request, header, None, None)
            await self.store.bind(part.alias, record, param=field)
        except (InsufficientStorageError, UnavailableError):
            metrics.aliases_unchecked.inc()  # never a key, so the answer is right without it

    async def _keep(
        self, request: ImageRequest, header: ImageHeader, ttl_s: float | None, pin: bool | None
    ) -> MediaRecord:
        spec = await self._spec(request.grid_thw, request.item.params.reduction)
        return await self.store.add(
            request.item.data,
            header,
            tenant=request.item.tenant,
            embedding_bytes=spec.num_bytes,
            ttl_s=ttl_s,
            pin=pin,
        )

    async def _status(self, record: MediaRecord) -> MediaStatus:
        request = self._managed(record, "auto", "media_id", ALONE)
        spec = await self._spec(request.grid_thw, request.item.params.reduction)
        return MediaStatus(record, spec.num_tokens, request.grid_thw, await self.tiers(request))

    async def _spec(self, grid: Grid, reduction: TokenReduction | None) -> EmbeddingSpec:
        dtype = getattr(torch, (await self._features.namespace()).dtype)
        return self._geometry.embedding_spec(grid, dtype, reduction)

    async def _is_sound(self, key: str, frame: Buffer) -> bool:
        try:
            embedding = await asyncio.to_thread(unpack, frame, key=key, seal=self._cache.seal)
            check(embedding, await self._spec(embedding.grid_thw, reduction_of(params_of(key))))
        except (EmbeddingFormatError, InvalidRequestError, ValidationError):
            return False
        return True

    async def _discard(self, event: str) -> None:
        deleted = discard_from(self._cache, event)
        if deleted is None:
            return
        for key in [key for key in self._pinning if deleted.mm_hash in images_of(key)]:
            self._pinning[key].cancel()
        if self._answers is not None:
            self._answers.discard_image(deleted.mm_hash)
        # The shared tier may have what this replica does not.
        namespace = (await self._features.namespace()).of(deleted.tenant)
        for params in (self.params, with_detail(self.params, "low")):
            self._cache.discard(namespace.key(deleted.mm_hash, str(params)))

    def _pin_later(self, key: str) -> None:
        if key not in self._pinning:
            self._pinning[key] = asyncio.create_task(self._pin(key))
            self._pinning[key].add_done_callback(lambda _: self._pinning.pop(key))

    async def _pin(self, key: str) -> None:
        for _ in range(_PIN_ATTEMPTS):
            if await self._cache.pin(key):
                return
            await asyncio.sleep(_PIN_RETRY_S)
