"""What is served and how it is: /v1/models, /version, /ping, /health, /health/ready, /metrics."""

import asyncio
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse

from common import metrics
from common.errors import ServingError
from llm_service.server import LLMServer

MetricsText = Callable[[], Awaitable[str]]

_TIER_TIMEOUT_S = 2.0


async def own_metrics() -> str:
    """This process's metrics, in Prometheus's text format."""
    return metrics.exposition()


def create_router(server: LLMServer, metrics_text: MetricsText) -> APIRouter:
    router = APIRouter()

    def model_card() -> dict[str, Any]:
        return {
            "id": server.model_name,
            "object": "model",
            "created": server.created,
            "owned_by": "fovea",
            "root": server.model_name,
            "parent": None,
            "max_model_len": server.max_model_len,
            "input_modalities": ["text", "image"],
        }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return model_card()

    @router.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version("fovea")}

    @router.get("/ping")
    async def ping() -> dict[str, str]:
        server.engine.check_health()
        return {"status": "ok"}

    @router.get("/health")
    async def health() -> dict[str, Any]:
        server.engine.check_health()
        return {
            "status": "ok",
            "model": server.model_name,
            "system_fingerprint": await server.fingerprint(),
            "running": server.engine.num_running,
            "waiting": server.engine.num_waiting,
            "quarantined": server.cache_report()["quarantined"],
        }

    @router.get("/health/ready")
    async def ready() -> JSONResponse:
        tiers = {
            "decoder": await _tier(_decoder(server)),
            "encoder": await _tier(server.check_encoder()),
            "cache": await _tier(server.check_cache()),
            "media": await _tier(server.media.check_store()),
        }
        is_ready = tiers["decoder"]["status"] == "ok"
        is_whole = all(tier["status"] == "ok" for tier in tiers.values())
        status = "ok" if is_whole else "degraded" if is_ready else "unavailable"
        held = {quantity: held.amount for quantity, held in server.admission.held.items()}
        return JSONResponse({"status": status, "tiers": tiers, "held": held}, status_code=200 if is_ready else 503)

    @router.get("/metrics")
    async def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(await metrics_text(), media_type="text/plain; version=0.0.4")

    return router


async def _decoder(server: LLMServer) -> dict[str, Any]:
    server.engine.check_health()
    return {"running": server.engine.num_running, "waiting": server.engine.num_waiting}


async def _tier(look: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """A tier's own words, and whether it answers."""
    try:
        async with asyncio.timeout(_TIER_TIMEOUT_S):
            return {"status": "ok", **await look}
    except TimeoutError:
        return {"status": "unavailable", "reason": f"no answer within {_TIER_TIMEOUT_S:g} s"}
    except ServingError as exc:
        return {"status": "unavailable", "reason": exc.message}
