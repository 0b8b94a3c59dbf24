"""One image from bytes to packed embedding: cache, join identical work, preprocess, batch, encode, publish. No Ray."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from common import metrics
from common.cache import EmbeddingCache, SingleFlight
from common.checkpoint import checkpoint_directory, load_half, load_preprocessor_config
from common.config import ModelConfig
from common.embedding import EmbeddingSpec, pack
from common.errors import InvalidRequestError
from common.families import ImageGeometry
from common.identity import EmbeddingNamespace, mm_hash
from common.media import MediaItem, image_header
from encoder_service.batcher import Batcher
from encoder_service.config import EncoderConfig
from encoder_service.encoder import VisionEncoder
from encoder_service.preprocess import ImagePreprocessor


class EncoderServer:
    """Owns the vision half and the namespace of its embeddings. `producer` names this replica in what it writes."""

    def __init__(self, model: ModelConfig, config: EncoderConfig, cache: EmbeddingCache, producer: str = "") -> None:
        torch.set_num_threads(model.num_threads)
        half = load_half(model, "vision")
        preprocessor_config = load_preprocessor_config(checkpoint_directory(model))
        self._geometry = ImageGeometry.of(half.config, preprocessor_config)
        self._limits = model.limits
        self._preprocess = ImagePreprocessor(self._geometry, preprocessor_config, model.limits)
        self._encoder = VisionEncoder(half, self._preprocess, model.numerics)
        self._dtype = half.dtype
        self._batcher = Batcher(self._encoder.encode, config)
        self._pool = ThreadPoolExecutor(config.preprocess_threads, thread_name_prefix="preprocess")
        self._in_flight: SingleFlight[bytes] = SingleFlight()
        self._cache = cache
        self._producer = producer
        self.num_encoded = 0

    async def describe(self) -> EmbeddingNamespace:
        """What this replica's embeddings depend on besides the image and its params."""
        return self._encoder.namespace

    async def encode(self, item: MediaItem) -> bytes:
        """The packed embedding of one image. Identical images in flight are encoded once.

        Raises InvalidRequestError for bad bytes and OverloadedError when too many images wait.
        """
        if mm_hash(item.data) != item.mm_hash:
            raise InvalidRequestError("the image bytes do not match their mm_hash")
        key = self._encoder.namespace.key(item.mm_hash, str(item.params))
        return await self._in_flight.run(key, lambda: self._find_or_encode(key, item))

    async def _find_or_encode(self, key: str, item: MediaItem) -> bytes:
        # The caller missed a moment ago, but another replica may have published the image since.
        spec = self._spec(item)
        hits = await self._cache.get_many({key: spec})
        if key in hits:
            return hits[key].data
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(self._pool, self._preprocess, item.data, item.params)
        embedding = await self._batcher.submit(image)
        data = await loop.run_in_executor(self._pool, lambda: pack(embedding, key=key, producer=self._producer))
        self.num_encoded += 1
        metrics.images_encoded.inc()
        metrics.encode_seconds.observe(time.perf_counter() - started)
        self._cache.put(key, data)
        return data

    def _spec(self, item: MediaItem) -> EmbeddingSpec:
        header = image_header(item.data, self._limits)
        grid = item.params.grid(self._geometry, header.height, header.width)
        return self._geometry.embedding_spec(grid, self._dtype)
