"""The Ray Serve shell around EncoderServer."""

import logging
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from common import metrics
from common.config import CacheConfig, ModelConfig
from common.garbage import leave_alone_what_is_there
from common.identity import EmbeddingNamespace
from common.logs import log_as_serve_does
from common.media import MediaItem
from common.media_store import DeletionWatcher, open_media_store
from common.redis_store import open_cache
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer

logger = logging.getLogger(__name__)

# A key is the image's digest, so identical images meet at one replica, where they are encoded once. Serve's 100 virtual
# nodes for each replica would give the busiest of four 10 % more than its share, by which the others wait: 4000 give it
# 1.6 % more.
_BY_IMAGE = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    request_router_kwargs={"num_fallback_replicas": 0, "num_virtual_nodes": 4000},
)


@serve.deployment(name="encoder", request_router_config=_BY_IMAGE)
class EncoderDeployment:
    """Replica count, GPUs and autoscaling are set by name in the application's YAML."""

    def __init__(self, model: ModelConfig, config: EncoderConfig, cache: CacheConfig) -> None:
        log_as_serve_does()
        replica = serve.get_replica_context().replica_tag
        store = open_media_store(cache)
        if cache.pixel_alias and cache.media_redis_url is None:
            logger.warning(
                "without a Redis for media, deletions would not find copies: cache.pixel_alias has no effect"
            )
        alias_store = store if cache.pixel_alias and cache.media_redis_url is not None else None
        self._server = EncoderServer(model, config, open_cache(cache), producer=replica, alias_store=alias_store)
        self._deletions = DeletionWatcher(store, self._server.discard)
        leave_alone_what_is_there()

    async def encode(self, item: MediaItem) -> bytes:
        await self._deletions.listen()
        return await self._server.encode(item)

    async def audit(self, item: MediaItem, namespace: str, digest: str) -> bool | None:
        return await self._server.audit(item, namespace, digest)

    def check_health(self) -> None:
        """Called by Serve every few seconds."""
        self._server.backlog()  # sets its gauge
        metrics.repeat_gauges()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where the encoder is autoscaled; `deploy/autoscaling.py` decides by it."""
        return self._server.backlog()

    async def __del__(self) -> None:
        """Called by Serve, when a replica that is to go has answered what it held."""
        await self._server.aclose()

    async def stats(self) -> dict[str, Any]:
        return self._server.stats()

    async def describe(self, image: str | None = None) -> EmbeddingNamespace:
        return await self._server.describe(image)
