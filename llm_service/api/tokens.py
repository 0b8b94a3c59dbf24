"""What a request would be, without doing it: /tokenize, /detokenize, and /v1/plan for images and time."""

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from common.errors import InvalidRequestError
from llm_service.api.chat_completions import ChatCompletionRequest, PromptRequest
from llm_service.api.door import context_of, parse
from llm_service.api.fields import ApiRequest, TokenId, name_ignored
from llm_service.chat import parse_messages
from llm_service.server import LLMServer


class TokenizeRequest(PromptRequest):
    """A `prompt`, or `messages` and what else lays them out."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] = Field(default_factory=list)
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(ApiRequest):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]


def create_router(server: LLMServer) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, http: Request, response: Response) -> dict[str, Any]:
        name_ignored(response, body.check())
        server.check_model(body.model or server.model_name)
        if (body.prompt is None) == (not body.messages):
            raise InvalidRequestError("send either prompt or messages", param="prompt")
        if body.prompt is not None:
            token_ids = await server.tokenize(body.prompt, add_special_tokens=body.add_special_tokens)
        else:
            messages = await parse(http, parse_messages, body.messages, server.limits)
            prompt, _ = await server.count(messages, body.template(), context_of(http))
            token_ids = prompt.token_ids
        strings = {"token_strs": server.token_strings(token_ids)} if body.return_token_strs else {}
        return {"count": len(token_ids), "max_model_len": server.max_model_len, "tokens": token_ids, **strings}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, response: Response) -> dict[str, Any]:
        name_ignored(response, body.check())
        server.check_model(body.model or server.model_name)
        return {"prompt": server.prompt.detokenize(body.tokens)}

    @router.post("/v1/plan")
    async def plan(body: ChatCompletionRequest, http: Request, response: Response) -> dict[str, Any]:
        name_ignored(response, body.check())
        server.check_model(body.model)
        messages = await parse(http, parse_messages, body.messages, server.limits)
        found = await server.plan(messages, body.options(), body.template(), context_of(http))
        images = [
            {
                "id": image.id,
                "tokens": image.tokens,
                "grid": list(image.grid_thw),
                "tiers": image.tiers,
                "source": image.source,
                "predicted_ms": _rounded(image.predicted_ms),
                **({"frames": image.frames, "cached_grids": image.cached_grids} if image.frames else {}),
            }
            for image in found.images
        ]
        num_image_tokens = sum(image.tokens for image in found.images if not image.frames)
        num_video_tokens = sum(image.tokens for image in found.images if image.frames)
        return {
            "object": "plan",
            "model": body.model,
            "prompt_tokens": found.num_prompt_tokens,
            "image_tokens": num_image_tokens,
            "video_tokens": num_video_tokens,
            "text_tokens": found.num_prompt_tokens - num_image_tokens - num_video_tokens,
            "max_tokens": found.max_tokens,
            "images": images,
            "predicted_time_to_first_token_ms": _rounded(found.predicted_ms),
        }

    return router


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 3)
