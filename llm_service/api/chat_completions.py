"""POST /v1/chat/completions: OpenAI's chat completions, with images as data URLs."""

import contextlib
import re
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from common import metrics
from common.errors import InvalidRequestError
from llm_service.api.stream import HEADERS, Stream
from llm_service.chat import parse_messages
from llm_service.engine.request import FinishReason, RequestOutput
from llm_service.server import GenerationOptions, LLMServer, PreparedRequest

IGNORED_FIELDS_HEADER = "x-fovea-ignored-fields"

# OpenAI's fields that change nothing here, and may be sent.
_HARMLESS = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip

# OpenAI's and vLLM's fields that are not honoured, with the values that ask for nothing.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "logit_bias": ({},),
    "logprobs": (False,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")  # in a header value

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    include_usage: bool = False


class ChatCompletionRequest(BaseModel):
    """The fields that are honoured. Others are refused by name, harmless, or ignored and named in a header."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    messages: list[dict[str, Any]]
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: Probability | None = None
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=128)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def options(self) -> GenerationOptions:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return GenerationOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(0, self.top_k),  # vLLM's -1 is no limit
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop=tuple(stop),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
        )

    def check(self) -> list[str]:
        """Refuses what would be silently wrong; returns the names of unknown fields, which are ignored."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
        extra = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        for name in extra.keys() & _NOT_HONOURED.keys():
            if extra[name] not in _NOT_HONOURED[name]:
                raise InvalidRequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
        return sorted(extra.keys() - _NOT_HONOURED.keys() - _HARMLESS)


def create_router(server: LLMServer) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        ignored = body.check()
        server.check_model(body.model)
        completion = ChatCompletion(server, body)
        headers = {"x-request-id": request_id_of(http) or completion.id}
        if ignored:
            metrics.ignored_fields.inc(len(ignored))
            headers[IGNORED_FIELDS_HEADER] = ", ".join(_UNSAFE.sub("?", name[:64]) for name in ignored[:32])
        if not body.stream:
            answer = await completion.whole()
            return JSONResponse(answer, headers=headers | completion.server_timing())
        stream = Stream(completion.chunks())
        await stream.wait_for_first()
        headers |= HEADERS | completion.server_timing()  # what is known by now
        return StreamingResponse(stream.events(), media_type="text/event-stream", headers=headers)

    return router


def request_id_of(http: Request) -> str | None:
    """The caller's own request id, if it is one that can be echoed."""
    request_id = http.headers.get("x-request-id", "")
    return request_id if _REQUEST_ID.fullmatch(request_id) else None


class ChatCompletion:
    """One answer, whole or in chunks."""

    def __init__(self, server: LLMServer, body: ChatCompletionRequest) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"  # never the caller's, who may use one twice
        self._server = server
        self._body = body
        self._common = {"id": self.id, "created": int(time.time()), "model": body.model}
        self._started = time.perf_counter()
        self._durations_ms: dict[str, float] = {}

    async def whole(self) -> dict[str, Any]:
        """The response body of a request that does not stream."""
        prepared = await self._prepare()
        text: list[str] = []
        num_tokens = num_cached_tokens = 0
        finish_reason = None
        async with contextlib.aclosing(self._server.generate(prepared)) as outputs:
            async for output in outputs:
                self._note_first_token(output)
                text.append(output.text)
                num_tokens += len(output.token_ids)
                num_cached_tokens = output.num_cached_tokens
                finish_reason = output.finish_reason
        message = {"role": "assistant", "content": "".join(text), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _openai_reason(finish_reason)}
        return self._common | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(prepared, num_tokens, num_cached_tokens),
            "system_fingerprint": prepared.fingerprint,
        }

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Chunk objects of a stream: the role, the text, one finish, and the usage if it was asked for."""
        prepared = await self._prepare()
        include_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        num_tokens = num_cached_tokens = 0
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        async with contextlib.aclosing(self._server.generate(prepared)) as outputs:
            async for output in outputs:
                self._note_first_token(output)
                num_tokens += len(output.token_ids)
                num_cached_tokens = output.num_cached_tokens
                delta["content"] = delta.get("content", "") + output.text
                reason = None if output.finish_reason is None else _openai_reason(output.finish_reason)
                if delta["content"] or "role" in delta or reason:
                    yield self._chunk(prepared, [{"index": 0, "delta": delta, "finish_reason": reason}], include_usage)
                delta = {}
        if include_usage:
            last = self._chunk(prepared, [], include_usage)
            yield last | {"usage": usage(prepared, num_tokens, num_cached_tokens)}

    def server_timing(self) -> dict[str, str]:
        """The header of that name: the longest waits for the cache and for the encoder, queue and prefill, and all."""
        durations = self._durations_ms | {"total": (time.perf_counter() - self._started) * 1000}
        return {"server-timing": ", ".join(f"{name};dur={ms:.1f}" for name, ms in durations.items())}

    async def _prepare(self) -> PreparedRequest:
        messages = parse_messages(self._body.messages, self._server.limits)
        prepared = await self._server.prepare(messages, self._body.options(), self.id)
        for image in prepared.receipts:
            name = "encode" if image.source == "encoder" else "cache"
            self._durations_ms[name] = max(image.wait_ms, self._durations_ms.get(name, 0.0))
        self._prepared_at = time.perf_counter()
        return prepared

    def _note_first_token(self, output: RequestOutput) -> None:
        """From the prepared request to its first token: the queue and the prefill."""
        if output.token_ids:
            self._durations_ms.setdefault("prefill", (time.perf_counter() - self._prepared_at) * 1000)

    def _chunk(self, prepared: PreparedRequest, choices: list[dict[str, Any]], with_usage: bool) -> dict[str, Any]:
        chunk = self._common | {
            "object": "chat.completion.chunk",
            "choices": choices,
            "system_fingerprint": prepared.fingerprint,
        }
        return chunk | {"usage": None} if with_usage else chunk


def usage(prepared: PreparedRequest, num_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
    """OpenAI's usage; in `images`, where each embedding came from, what it cost and how long the request waited for it;
    and `answer_source` if the answer itself is one that was given before.
    """
    answer_source = {"answer_source": "cache"} if prepared.known_answer is not None else {}
    return answer_source | {
        "prompt_tokens": prepared.num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": prepared.num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {
            "cached_tokens": num_cached_tokens,
            "image_tokens": prepared.num_image_tokens,
            "text_tokens": prepared.num_prompt_tokens - prepared.num_image_tokens,
        },
        "images": [
            {
                "id": image.id,
                "tokens": image.tokens,
                "source": image.source,
                "bytes": image.num_bytes,
                "encode_ms": round(image.encode_ms, 3),
                "wait_ms": round(image.wait_ms, 3),
            }
            for image in prepared.receipts
        ],
    }


def _openai_reason(reason: FinishReason | None) -> str:
    """Only `stop` and `length` are answers; anything else must not look like one."""
    assert reason in (FinishReason.STOP, FinishReason.LENGTH), reason
    return reason.value
