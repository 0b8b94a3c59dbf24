"""What every request passes first: its id and count, its key, the limits on its body, admission. Plain ASGI.

Other middleware (BaseHTTPMiddleware) would turn an exception in the middle of a stream into a clean end.
"""

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import TypeVar

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common import metrics
from common.errors import (
    AuthenticationError,
    ForbiddenError,
    InvalidRequestError,
    PayloadTooLargeError,
    ServingError,
    SlowRequestError,
    UnsupportedBodyError,
)
from common.threads import on_thread_if_large
from llm_service.admission import Admission, RequestContext
from llm_service.api.errors import error_response
from llm_service.config import ApiConfig, ApiKey

T = TypeVar("T")

TIMEOUT_HEADER = "x-request-timeout-seconds"  # also Ray Serve's
REQUEST_ID_HEADER = "x-request-id"

_PUBLIC = frozenset({"/", "/health"})  # whole paths, as the routes are matched: no prefix, no pattern
_ADMIN = "/v1/cache"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CREDENTIAL = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")
_MAX_TIMEOUT_S = 24 * 3600.0
_MIN_BODY_BYTES_PER_S = 8 * 1024
_ANSWER_MARGIN_S = 0.05  # Serve's proxy has the same time limit, and its own answer would come first


def context_of(http: Request) -> RequestContext:
    """Whose the request is and until when it is waited for."""
    context: RequestContext = http.state.context
    return context


async def parse(http: Request, parser: Callable[..., T], *arguments: object) -> T:
    """What a parser makes of a body, on a thread if that is large: the images in it are decoded, and may be hashed."""
    return await on_thread_if_large(len(await http.body()), parser, *arguments)


class RequestLog:
    """Gives each answer its request's id, or one of its own, and counts it by its status, and clients that leave."""

    def __init__(self, app: ASGIApp, echo_request_id: bool) -> None:
        self._app = app
        self._echo_request_id = echo_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get(REQUEST_ID_HEADER)
        request_id = sent if sent is not None and _REQUEST_ID.fullmatch(sent) else f"req-{uuid.uuid4().hex}"

        is_answered = has_left = False

        async def noting_receive() -> Message:
            nonlocal has_left
            message = await receive()
            has_left = has_left or message["type"] == "http.disconnect"
            return message

        async def noting_send(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                metrics.requests.inc(tags={"status": str(message["status"])})
                if self._echo_request_id:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, noting_receive, noting_send)
        except asyncio.CancelledError:  # Serve's way of saying that the client has left
            has_left = True
            raise
        except Exception:  # answered further out, by the handler of bugs
            metrics.requests.inc(tags={"status": "500"})
            raise
        finally:
            if has_left and not is_answered:
                metrics.client_disconnected.inc()


class Door:
    """Lets a request in with a RequestContext in `state.context`, or answers why not. Public paths need no key."""

    def __init__(self, app: ASGIApp, config: ApiConfig, admission: Admission) -> None:
        self._app = app
        self._config = config
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            key = self._authenticate(scope, headers)
            num_bytes = self._declared_bytes(headers)
            deadline = self._deadline(headers)
            context = self._context(scope, key, deadline)
        except ServingError as exc:
            await error_response(scope, exc)(scope, receive, send)
            return
        with context:
            try:
                context.hold("bytes", num_bytes)
            except ServingError as exc:
                await error_response(scope, exc)(scope, receive, send)
                return
            scope.setdefault("state", {})["context"] = context
            body = _Body(receive, context, self._config, num_bytes)
            await self._app(scope, body.receive, send)

    def _context(self, scope: Scope, key: ApiKey | None, deadline: float | None) -> RequestContext:
        """Only what costs something is counted: an overloaded service still says how it is."""
        if scope["method"] == "POST":
            return self._admission.enter(key, deadline)
        return RequestContext("" if key is None else key.tenant, deadline, key=key)

    def _authenticate(self, scope: Scope, headers: Headers) -> ApiKey | None:
        """None where no keys are configured, or needed."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._config.keys or (path in _PUBLIC and scope["method"] in ("GET", "HEAD")):
            return None
        bearer = _CREDENTIAL.fullmatch(headers.get("authorization", ""))
        credential = bearer[1] if bearer else headers.get("x-api-key", "")
        digest = hashlib.sha256(credential.encode("utf-8", "surrogateescape")).hexdigest()
        # all of them are compared, so that the time does not say which was nearly right
        found = [key for key in self._config.keys if hmac.compare_digest(key.sha256, digest)]
        if not found:
            raise AuthenticationError(
                "an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY"
                if not credential
                else "this API key is not known",
                code="invalid_api_key",
            )
        if (path == _ADMIN or path.startswith(_ADMIN + "/")) and not found[0].admin:
            raise ForbiddenError(f"the key {found[0].name!r} is not an administrator's", code="not_an_admin")
        return found[0]

    def _declared_bytes(self, headers: Headers) -> int:
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedBodyError("the body must not be compressed (content-encoding)", code="content_encoding")
        declared = headers.get("content-length", "0")
        num_bytes = int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 20 else 0
        if num_bytes > self._config.max_body_bytes:
            raise PayloadTooLargeError(
                f"the request body has {num_bytes} bytes, the limit is {self._config.max_body_bytes} "
                "(api.max_body_bytes)",
                code="request_too_large",
            )
        return num_bytes

    def _deadline(self, headers: Mapping[str, str]) -> float | None:
        text = headers.get(TIMEOUT_HEADER)
        timeout_s = self._config.timeout_s
        if text is not None:
            timeout_s = float(text) if _SECONDS.fullmatch(text) else 0.0
            if not 0 < timeout_s <= _MAX_TIMEOUT_S:
                raise InvalidRequestError(
                    f"{TIMEOUT_HEADER} must be seconds above 0 and at most {_MAX_TIMEOUT_S:.0f}", param=TIMEOUT_HEADER
                )
        if timeout_s is None:
            return None
        return time.time() + timeout_s - min(_ANSWER_MARGIN_S, timeout_s / 10)


class _Body:
    """Reads one body within the limits on its size and its pace."""

    def __init__(self, receive: Receive, context: RequestContext, config: ApiConfig, num_held_bytes: int) -> None:
        self._receive = receive
        self._context = context
        self._config = config
        self._num_held_bytes = num_held_bytes
        self._num_bytes = 0
        self._started = time.monotonic()
        self._is_whole = False

    async def receive(self) -> Message:
        if self._is_whole:  # what follows is the end of the connection, which takes as long as the answer
            return await self._receive()
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                message = await self._receive()
        except TimeoutError as exc:
            raise self._too_slow() from exc
        self._num_bytes += len(message.get("body", b""))
        self._is_whole = message["type"] != "http.request" or not message.get("more_body", False)
        self._check()
        return message

    def _check(self) -> None:
        limit = self._config.max_body_bytes
        if self._num_bytes > limit:
            raise PayloadTooLargeError(
                f"the request body is larger than {limit} bytes (api.max_body_bytes)", code="request_too_large"
            )
        if self._num_bytes > self._num_held_bytes:  # sent in chunks, without its length
            self._context.hold("bytes", self._num_bytes - self._num_held_bytes)
            self._num_held_bytes = self._num_bytes
        allowed_s = self._config.body_timeout_s + self._num_bytes / _MIN_BODY_BYTES_PER_S
        if not self._is_whole and time.monotonic() - self._started > allowed_s:
            raise self._too_slow()

    def _too_slow(self) -> SlowRequestError:
        return SlowRequestError(
            f"the request body did not arrive within {self._config.body_timeout_s:g} s (api.body_timeout_s) and "
            f"{_MIN_BODY_BYTES_PER_S} bytes a second",
            code="body_timeout",
        )
