"""create_app(): the routes together, behind one door, with one mapping from errors to answers."""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from common.errors import ServingError
from llm_service.api import (
    chat_completions,
    completions,
    decisions,
    errors,
    media,
    messages,
    page,
    responses,
    status,
    tokens,
)
from llm_service.api.door import Door, RequestLog
from llm_service.api.status import MetricsText, own_metrics
from llm_service.server import LLMServer


def create_app(
    server: LLMServer,
    *,
    admin_api: bool = False,
    metrics_text: MetricsText = own_metrics,
    echo_request_id: bool = True,
) -> FastAPI:
    """The whole HTTP surface in front of a server; anything with LLMServer's methods will do in tests.

    `admin_api` adds /v1/cache, which is for callers who may purge and import embeddings. `metrics_text` is what
    /metrics says; by default, of this process alone. `echo_request_id` is off behind a proxy that does so itself.
    """
    app = FastAPI(title="Fovea", summary="Vision-language models, served in two halves")
    for endpoint in (chat_completions, completions, decisions, messages, responses, tokens):
        app.include_router(endpoint.create_router(server))
    app.include_router(media.create_router(server.media))
    if admin_api:
        app.include_router(media.create_admin_router(server))
    app.include_router(status.create_router(server, metrics_text))
    app.include_router(page.create_router())
    app.add_exception_handler(ServingError, errors.on_serving_error)
    app.add_exception_handler(RequestValidationError, errors.on_validation_error)
    app.add_exception_handler(HTTPException, errors.on_http_exception)
    app.add_exception_handler(Exception, errors.on_bug)
    app.add_middleware(Door, config=server.api, admission=server.admission)
    app.add_middleware(RequestLog, echo_request_id=echo_request_id)  # the last one is the outermost
    return app
