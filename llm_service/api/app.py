"""create_app(): the routes together, the limit on the body at the door, and one mapping from errors to statuses."""

import logging
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common import metrics
from common.errors import InvalidRequestError, PayloadTooLargeError, ServingError
from llm_service.api import chat_completions, media, page
from llm_service.api.stream import error_body
from llm_service.server import LLMServer

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 * 1024**2
RETRY_AFTER_S = "1"


def create_app(server: LLMServer, *, admin_api: bool = False) -> FastAPI:
    """The whole HTTP surface in front of a server; anything with LLMServer's methods will do in tests.

    `admin_api` adds /v1/cache, which is for callers who may purge and import embeddings.
    """
    app = FastAPI(title="Fovea", summary="Vision-language models, served in two halves")
    app.include_router(chat_completions.create_router(server))
    app.include_router(media.create_router(server.media))
    if admin_api:
        app.include_router(media.create_admin_router(server))
    app.include_router(_status_router(server))
    app.include_router(page.create_router())
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(RequestCounter)  # the last one is the outermost
    return app


class BodyLimit:
    """Refuses a body that is too large while it is read. Plain ASGI: other middleware would cut streams silently."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        num_bytes = 0

        async def limited_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise PayloadTooLargeError(
                    f"the request body is larger than {self._max_bytes} bytes", code="request_too_large"
                )
            return message

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            error = PayloadTooLargeError(
                f"the request body has {int(declared)} bytes, the limit is {self._max_bytes}", code="request_too_large"
            )
            await _response(error)(scope, receive, send)
            return
        await self._app(scope, limited_receive, send)


class RequestCounter:
    """Counts every answer by its status, refusals included. Plain ASGI, as above."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                metrics.requests.inc(tags={"status": str(message["status"])})
            await send(message)

        try:
            await self._app(scope, receive, counting_send)
        except Exception:  # answered further out, by the handler of bugs
            metrics.requests.inc(tags={"status": "500"})
            raise


def _status_router(server: LLMServer) -> APIRouter:
    router = APIRouter()

    def model_card() -> dict[str, Any]:
        return {
            "id": server.model_name,
            "object": "model",
            "created": server.created,
            "owned_by": "fovea",
            "max_model_len": server.max_model_len,
        }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return model_card()

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

    return router


def _response(error: ServingError) -> JSONResponse:
    headers = {"retry-after": RETRY_AFTER_S} if error.status in (429, 503) else {}
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def _on_serving_error(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, ServingError)
    return _response(exc)


async def _on_validation_error(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return _response(InvalidRequestError("the body is not valid JSON", code="invalid_json"))
    name = ".".join(path) or None
    return _response(InvalidRequestError(f"{name or 'body'}: {first['msg']}", param=name))


async def _on_http_exception(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, HTTPException)
    error = InvalidRequestError(f"{request.method} {request.url.path[:128]}: {exc.detail}")
    return JSONResponse(error_body(error), status_code=exc.status_code, headers=exc.headers)


async def _on_bug(request: Request, exc: Exception) -> JSONResponse:
    logger.error("unexpected error in %s %s", request.method, request.url.path, exc_info=exc)
    return _response(ServingError("internal error"))
