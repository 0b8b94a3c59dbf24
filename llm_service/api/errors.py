"""Errors as answers: statuses, headers and bodies, in OpenAI's form or, below /v1/messages, in Anthropic's."""

import logging
import math
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from common.errors import InvalidRequestError, ModelNotFoundError, ServingError

logger = logging.getLogger(__name__)

ANTHROPIC_PATH = "/v1/messages"

MAX_RETRY_AFTER_S = 60.0  # beyond 120 s OpenAI's client does not try again at all

_RETRY_AFTER_S = 1.0
# OpenAI's and Anthropic's clients try these again by themselves, which can only make things worse.
_NOT_TO_BE_RETRIED = (408, 409, 504, 507)
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: ServingError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def anthropic_error_body(error: ServingError) -> dict[str, Any]:
    """Anthropic's error object."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    named = f"{error.param}: " if error.param and not error.message.startswith(error.param) else ""
    return {"type": "error", "error": {"type": kind, "message": named + error.message}}


def error_response(scope: Scope, error: ServingError, status: int | None = None) -> JSONResponse:
    """`status` is the error's own unless it is given."""
    status = status or error.status
    headers = {}
    if status in (429, 503):
        retry_after_s = _RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers["retry-after"] = str(max(1, math.ceil(min(retry_after_s, MAX_RETRY_AFTER_S))))
    if status in _NOT_TO_BE_RETRIED:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    body = anthropic_error_body if scope["path"].startswith(ANTHROPIC_PATH) else error_body
    return JSONResponse(body(error), status_code=status, headers=headers)


async def on_serving_error(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, ServingError)
    return error_response(request.scope, exc)


async def on_validation_error(request: Request, exc: Exception) -> JSONResponse:
    """Names the field that is wrong, as the others do: `messages[0].role`."""
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    if first["type"] == "json_invalid":
        return error_response(request.scope, InvalidRequestError("the body is not valid JSON", code="invalid_json"))
    name = ""
    for part in first["loc"][1:]:  # without `body` or `query`
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    error = InvalidRequestError(f"{name or 'body'}: {first['msg']}", param=name or None)
    return error_response(request.scope, error)


async def on_http_exception(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, HTTPException)
    if isinstance(exc.__cause__, ServingError):  # raised while the body was read, and wrapped by FastAPI
        return error_response(request.scope, exc.__cause__)
    kind = ModelNotFoundError if exc.status_code == 404 else InvalidRequestError
    error = kind(f"{request.method} {request.url.path[:128]}: {exc.detail}")
    response = error_response(request.scope, error, exc.status_code)
    response.headers.update(exc.headers or {})
    return response


async def on_bug(request: Request, exc: Exception) -> JSONResponse:
    logger.error("unexpected error in %s %s", request.method, request.url.path, exc_info=exc)
    return error_response(request.scope, ServingError("internal error"))
