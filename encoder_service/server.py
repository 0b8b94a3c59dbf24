"""One image from bytes to packed embedding: cache, join identical work, preprocess, batch, encode, publish. No Ray."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from common import metrics
from common.cache import EmbeddingCache, SingleFlight
from common.checkpoint import LoadedHalf, checkpoint_directory, load_geometry, load_half
from common.config import ModelConfig
from common.embedding import EmbeddingSpec, VisionEmbedding, content_digest, pack, unpack
from common.errors import InvalidRequestError, OverloadedError
from common.identity import EmbeddingNamespace
from common.media import MediaItem, item_hash
from common.media_store import MediaStore, discard_from
from common.threads import on_thread_if_large
from common.tracing import span
from encoder_service.backlog import Stage
from encoder_service.batcher import Batcher
from encoder_service.config import EncoderConfig
from encoder_service.encoder import Preprocessed, VisionEncoder, load_preprocessor
from encoder_service.pixel_alias import PixelAlias, pixel_digest
from encoder_service.reduction import reduce_tokens

T = TypeVar("T")

_LOOKUP_S = 0.02
_MAX_COPIES = 4  # of which an embedding is looked for


class EncoderServer:
    """Owns the vision half and the namespace of its embeddings. `producer` names this replica in what it writes."""

    def __init__(
        self,
        model: ModelConfig,
        config: EncoderConfig,
        cache: EmbeddingCache,
        producer: str = "",
        alias_store: MediaStore | None = None,
        half: LoadedHalf | None = None,
    ) -> None:
        """With an `alias_store`, files with the same pixels share an embedding. A `half` that is given stays as it is;
        otherwise it is loaded."""
        if config.device is not None:
            model = model.model_copy(update={"device": config.device})
        torch.set_num_threads(model.num_threads)
        is_own = half is None
        half = half or load_half(model, "vision")
        directory = checkpoint_directory(model)
        self._geometry = load_geometry(directory, half.config)
        self._limits = model.limits
        self._preprocess = load_preprocessor(directory, half.config, model.limits, model.image_backend)
        self._encoder = VisionEncoder(half, self._preprocess, model.numerics)
        if is_own:
            self._encoder.speed_up()
        self._dtype = half.dtype
        self._batcher = Batcher(self._encoder.encode, config, self._encoder.num_at_once)
        self._max_images = config.max_queued_images
        self._preprocessing = Stage(config.preprocess_threads)
        self._encoding = Stage()
        self._pool = ThreadPoolExecutor(config.preprocess_threads, thread_name_prefix="preprocess")
        self._in_flight: SingleFlight[bytes] = SingleFlight()
        self._cache = cache
        self._producer = producer
        self._alias_store = alias_store
        self._params: set[str] = set()  # of all images so far: a few, because requests choose among the details
        self._has_other_keys = False  # which name another frame, or the text of a prompt, too
        self._sweeps: set[asyncio.Task[None]] = set()
        self.num_encoded = 0

    async def describe(self, image: str | None = None) -> EmbeddingNamespace:
        """What this replica's embeddings depend on besides the image and its params, whatever the `image`."""
        return self._encoder.namespace

    async def encode(self, item: MediaItem) -> bytes:
        """The packed embedding of one image. Identical images in flight are encoded once.

        Raises InvalidRequestError for bad bytes, OverloadedError when too many images wait, and DeadlineExceededError.
        """
        if await on_thread_if_large(len(item.data), item_hash, item.data, item.params) != item.mm_hash:
            raise InvalidRequestError("the image bytes do not match their mm_hash")
        if item.params.frames > 1 or item.params.instruction:
            self._has_other_keys = True
        else:
            self._params.add(str(item.params))
        key = self._encoder.namespace.of(item.tenant).key(item.mm_hash, str(item.params))
        return await self._in_flight.run(key, lambda: self._find_or_encode(key, item))

    async def audit(self, item: MediaItem, namespace: str, digest: str) -> bool | None:
        """Encodes an image again once no other one waits: are these the bits that `digest` was made of?

        If not, this replica uses no stored embedding of its namespace any more. None: the digest is of another
        namespace, so that nothing can be said.
        """
        if namespace != str(self._encoder.namespace.of(item.tenant)):
            return None
        await self._batcher.idle()
        spec = await on_thread_if_large(len(item.data), self._spec, item)
        with self._room(item, spec):
            embedding = await self._encode(item, spec)
        is_right = await self._on_thread(content_digest, embedding) == digest
        if not is_right:
            self._cache.quarantine(namespace)
        return is_right

    async def discard(self, event: str) -> None:
        """Discards what an event of the log of deletions names."""
        deleted = discard_from(self._cache, event)
        if deleted is None:
            return
        namespace = self._encoder.namespace.of(deleted.tenant)
        for params in self._params:  # what was published a moment ago need not be in the local tier any more
            self._cache.discard(namespace.key(deleted.mm_hash, params))
        if self._has_other_keys:
            sweep = asyncio.create_task(self._cache.sweep(deleted.mm_hash))
            self._sweeps.add(sweep)
            sweep.add_done_callback(self._sweeps.discard)

    def backlog(self) -> dict[str, float]:
        """The images that are not encoded yet, and the seconds that the slower one of decoding and encoding will take.

        An image counts from when it is known to be in no cache, with what images of its tokens have cost of late.
        """
        seconds = max(self._preprocessing.seconds, self._encoding.seconds)
        metrics.encoder_backlog_seconds.set(seconds)
        return {"backlog_images": float(self._encoding.num_images), "backlog_seconds": seconds}

    def stats(self) -> dict[str, Any]:
        """How many images this replica has encoded and is working on, in JSON's types."""
        counts = {"producer": self._producer, "encoded": self.num_encoded, "in_flight": len(self._in_flight)}
        return counts | self.backlog()

    async def aclose(self) -> None:
        """Lets the shared tier have what was encoded last."""
        await asyncio.gather(*self._sweeps)
        await self._cache.aclose()

    async def _find_or_encode(self, key: str, item: MediaItem) -> bytes:
        # The caller missed a moment ago, but another replica may have published the image since. A store that does not
        # answer has cost the caller its time already, so it is not waited for once more.
        since = self._cache.moment
        spec = await on_thread_if_large(len(item.data), self._spec, item)
        hits = await _soon(self._cache.get_many({key: spec}))
        hit = None if hits is None else hits.get(key)
        if hits is not None and hit is None and await _soon(self._cache.claim(key, spec, self._producer)) is False:
            hit = await self._cache.wait_for(key, spec, self._producer)
        if hit is not None:
            return bytes(hit.data)  # itself, if it is that already
        with self._room(item, spec):
            alias_store = self._alias_store if item.params.frames == 1 else None
            if alias_store is not None and (copy := await self._copy(alias_store, item, spec)):
                data, packed = await self._on_thread(self._pack, key, copy)
                self._cache.put_local(key, data, packed, since=since)  # the shared tier has it already, as the copy's
                return data
            started = time.perf_counter()
            embedding = await self._encode(item, spec)
        data, packed = await self._on_thread(self._pack, key, embedding)
        metrics.encode_seconds.observe(time.perf_counter() - started)
        self._cache.put(key, data, packed, since=since)
        return data

    async def _copy(self, store: MediaStore, item: MediaItem, spec: EmbeddingSpec) -> VisionEmbedding | None:
        """The embedding of another file of the tenant's with the same pixels."""
        namespace = self._encoder.namespace.of(item.tenant)
        alias = PixelAlias(store, namespace)
        pixels = await self._on_thread(pixel_digest, item.data, self._limits, str(namespace))
        copies = await _soon(alias.copies(pixels, item.mm_hash))
        for copy in (copies or [])[:_MAX_COPIES]:
            key = namespace.key(copy, str(item.params))
            hits = await _soon(self._cache.get_many({key: spec}))
            if hits:
                metrics.pixel_alias_hits.inc()
                return hits[key].embedding
        return None

    async def _encode(self, item: MediaItem, spec: EmbeddingSpec) -> VisionEmbedding:
        item.check_deadline()  # looking for a copy may have taken its time
        runs = self._geometry.runs(spec.grid_thw)
        num_tokens = sum(runs)
        with self._preprocessing.holding(num_tokens), span("preprocess", image=item.mm_hash):
            image, preprocess_ms = await self._on_thread(self._preprocess_and_time, item)
        item.check_deadline()
        with span("vision", image=item.mm_hash):
            embedding = await self._batcher.submit(image)
        self._preprocessing.note(num_tokens, preprocess_ms / 1000)
        self._encoding.note(num_tokens, embedding.encode_ms / 1000)
        if item.params.reduction is not None:
            embedding = await self._on_thread(reduce_tokens, embedding, item.params.reduction, runs)
        self.num_encoded += 1
        metrics.images_encoded.inc()
        return dataclasses.replace(embedding, encode_ms=preprocess_ms + embedding.encode_ms)

    @contextlib.contextmanager
    def _room(self, item: MediaItem, spec: EmbeddingSpec) -> Iterator[None]:
        """For one image more, before anything of it is decoded.

        Raises OverloadedError when this replica holds as many images as it may, and DeadlineExceededError.
        """
        item.check_deadline()
        if self._encoding.num_images >= self._max_images:
            raise OverloadedError(
                f"{self._encoding.num_images} images wait for this encoder, the limit is {self._max_images} "
                "(encoder.max_queued_images)",
                code="encoder_overloaded",
                retry_after_s=self.backlog()["backlog_seconds"],
            )
        with self._encoding.holding(self._geometry.num_tokens(spec.grid_thw)):
            yield

    def _preprocess_and_time(self, item: MediaItem) -> tuple[Preprocessed, float]:
        started = time.thread_time()  # what it costs, not how long other threads kept it waiting
        image: Preprocessed = self._preprocess(item.data, item.params)
        return image, (time.thread_time() - started) * 1000

    def _pack(self, key: str, embedding: VisionEmbedding) -> tuple[bytes, VisionEmbedding]:
        """The frame, and the embedding that shares its memory, so that the cache keeps one of them."""
        data = pack(embedding, key=key, producer=self._producer, seal=self._cache.seal)
        return data, unpack(data, key=key, seal=self._cache.seal)

    async def _on_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _spec(self, item: MediaItem) -> EmbeddingSpec:
        grid = item.params.grid(self._geometry, *item.displayed_size(self._limits))
        return self._geometry.embedding_spec(grid, self._dtype, item.params.reduction)


async def _soon(answer: Awaitable[T]) -> T | None:
    """None if there is none within `_LOOKUP_S`; it may come later, for nobody."""
    waiting = asyncio.ensure_future(answer)
    await asyncio.wait([waiting], timeout=_LOOKUP_S)
    return waiting.result() if waiting.done() else None
