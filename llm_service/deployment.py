"""The Ray Serve shell around LLMServer: builds the HTTP app in the replica and owns the encoder handle."""

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx2
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from common import metrics
from common.checkpoint import choose_device
from common.config import CacheConfig, ModelConfig
from common.errors import OverloadedError, ServingError, UnavailableError
from common.garbage import leave_alone_what_is_there
from common.identity import EmbeddingNamespace
from common.logs import log_as_serve_does
from common.media import MediaItem
from common.media_store import open_media_store
from common.redis_store import open_cache
from llm_service.answer_cache import open_answer_cache
from llm_service.api.app import create_app
from llm_service.config import ApiConfig, EngineConfig
from llm_service.server import LLMServer

logger = logging.getLogger(__name__)

T = TypeVar("T")

_METRIC = "ray_fovea_"
_SERVING = ("RUNNING", "UPDATING", "PENDING_MIGRATION")  # states of replicas that calls are routed to
_METRICS_TIMEOUT_S = 2.0


class EncoderHandle:
    """The encoder service over Ray Serve: identical images go to the same replica, a lost replica is tried again.

    Encoding has no side effect but a cache entry, so repeating it is safe.
    """

    TIMEOUT_S = 60.0
    RETRY_AFTER_S = 0.2  # time for the router to learn that a replica is gone

    def __init__(self, handle: DeploymentHandle, wait_s: float) -> None:
        """While no replica runs, a call waits for one for `wait_s` at most, and not at all once that time is over."""
        self._handle = handle
        self._outage = Outage(handle.app_name, handle.deployment_name, wait_s)

    async def encode(self, item: MediaItem) -> bytes:
        # The consistent hash is over the image alone: a new namespace keeps its images where they were.
        handle = self._handle.options(session_id=item.mm_hash)
        return await self._call(lambda: handle.encode.remote(item))

    async def audit(self, item: MediaItem, namespace: str, digest: str) -> bool | None:
        handle = self._handle.options(session_id=item.mm_hash)
        return await self._call(lambda: handle.audit.remote(item, namespace, digest))

    async def describe(self, image: str | None = None) -> EmbeddingNamespace:
        handle = self._handle if image is None else self._handle.options(session_id=image)
        return await self._call(lambda: handle.describe.remote(image))

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        """Raises what the encoder raises, and UnavailableError when there is none."""
        answer = asyncio.ensure_future(self._retry(call))
        try:
            while not (await asyncio.wait([answer], timeout=Outage.POLL_S))[0]:
                self._outage.check()
            found = await answer
        finally:
            answer.cancel()  # without effect on one that is there
        self._outage.end()
        return found

    async def _retry(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(self.TIMEOUT_S):
                while True:
                    try:
                        # In an empty context, because calls of one HTTP request would share its request id, of which
                        # the router keeps one, and because an encode that others wait for outlives the request.
                        return await contextvars.Context().run(call)
                    except RayActorError:
                        logger.warning("an encoder replica was lost, asking another one")
                        await asyncio.sleep(self.RETRY_AFTER_S)
        except RayTaskError as exc:
            # The error's text is a remote traceback; its cause is what was raised.
            if isinstance(exc.cause, ServingError):
                raise exc.cause from None
            raise
        except BackPressureError as exc:
            raise OverloadedError("too many images wait for the encoder service") from exc
        except DeploymentUnavailableError as exc:
            raise UnavailableError("the encoder service is not deployed") from exc
        except TimeoutError as exc:
            raise UnavailableError(f"the encoder service gave no answer within {self.TIMEOUT_S:.0f} s") from exc


class Outage:
    """Whether a deployment has had no running replica for too long, as Serve's controller says.

    It is asked while calls wait and none is answered, once for all of them, because Serve lets a call wait for a
    replica without end.
    """

    POLL_S = 0.5
    FRESH_S = 2.0  # how long what was heard last is believed
    RETRY_AFTER_S = 5.0  # what callers are told; when there will be a replica again, nobody knows

    def __init__(self, application: str, deployment: str, wait_s: float) -> None:
        self._application = application
        self._deployment = deployment
        self._wait_s = wait_s
        self._since: float | None = None  # when it was first seen that there is none
        self._heard_at = -math.inf
        self._asking: asyncio.Task[None] | None = None

    def check(self) -> None:
        """Raises UnavailableError. The controller is asked in the background, because it may take its time."""
        now = time.monotonic()
        if self._asking is None and now - self._heard_at > self.POLL_S:
            self._asking = asyncio.create_task(self._ask())
        is_fresh = now - self._heard_at <= self.FRESH_S
        if is_fresh and self._since is not None and now - self._since >= self._wait_s:
            raise UnavailableError(
                "no encoder replica runs, so only images whose embeddings are cached can be answered",
                code="encoder_unavailable",
                retry_after_s=self.RETRY_AFTER_S,
            )

    def end(self) -> None:
        """A replica has answered."""
        self._since = None
        self._heard_at = time.monotonic()

    async def _ask(self) -> None:
        try:
            status = await asyncio.to_thread(serve.status)
        except Exception:  # the controller may be restarting, which says nothing about replicas
            logger.warning("Serve does not say which replicas run", exc_info=True)
            self._since = None
        else:
            application = status.applications.get(self._application)
            found = None if application is None else application.deployments.get(self._deployment)
            # While an application is deployed again its deployments are not listed for a moment.
            if found is None or any(found.replica_states.get(state) for state in _SERVING):
                self._since = None
            elif self._since is None:
                self._since = time.monotonic()
        finally:
            self._heard_at = time.monotonic()
            self._asking = None


async def cluster_metrics() -> str:
    """Fovea's metrics of all replicas, as the agents of Ray's nodes export them every few seconds."""
    nodes = await asyncio.to_thread(ray.nodes)
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes if node["Alive"]
    ]
    async with httpx2.AsyncClient(timeout=_METRICS_TIMEOUT_S, trust_env=False) as client:
        answers = await asyncio.gather(*(client.get(url) for url in urls), return_exceptions=True)
    texts = [answer.text for answer in answers if isinstance(answer, httpx2.Response) and answer.status_code == 200]
    if not texts:
        raise UnavailableError("no node of the cluster exports metrics")
    return "".join(line + "\n" for text in texts for line in text.splitlines() if _METRIC in line)


@serve.deployment(name="llm")
@serve.ingress()
class LLMDeployment:
    """The application's ingress. Replica count, GPUs and autoscaling are set by name in the application's YAML."""

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        cache: CacheConfig,
        api: ApiConfig,
        encoder: DeploymentHandle,
    ) -> None:
        log_as_serve_does()
        self._admin_api = cache.admin_api
        self._server = LLMServer(
            model,
            config,
            open_cache(cache, pinned=choose_device(model).type == "cuda"),
            EncoderHandle(encoder, api.encoder_wait_s),
            media_store=open_media_store(cache),
            audit_fraction=cache.audit_fraction,
            answers=open_answer_cache(cache),
            api=api,
        )
        leave_alone_what_is_there()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(
            self._server,
            admin_api=self._admin_api,
            metrics_text=cluster_metrics,
            echo_request_id=False,  # Serve's proxy does it
        )

    async def cache_report(self) -> dict[str, Any]:
        return {"replica": serve.get_replica_context().replica_tag} | self._server.cache_report()

    async def check_health(self) -> None:
        """Called by Serve every few seconds; raising replaces the replica."""
        metrics.repeat_gauges()
        self._server.engine.check_health()
