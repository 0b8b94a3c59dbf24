"""POST /v1/chat/completions: OpenAI's chat completions, with images as data URLs."""

import contextlib
import json
import re
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from common import metrics
from common.errors import InvalidRequestError
from llm_service.api.stream import HEADERS, Stream
from llm_service.chat import parse_messages
from llm_service.engine.engine import MAX_LOGPROBS
from llm_service.engine.request import FinishReason, RequestOutput
from llm_service.engine.structured_output import StructuredOutput
from llm_service.server import GenerationOptions, LLMServer, PreparedRequest

IGNORED_FIELDS_HEADER = "x-fovea-ignored-fields"
MAX_CHOICES = 16

_LEAST_LOGPROB = -9999.0  # JSON has no infinity

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
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")  # in a header value

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[
    list[StopString], Field(max_length=16), BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)
]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    include_usage: bool = False


class JsonSchemaFormat(BaseModel):
    """`name`, `description` and `strict` say nothing to a grammar: every schema is followed strictly."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def structured_output(self) -> StructuredOutput | None:
        match self.type:
            case "text":
                return None
            case "json_object":
                return StructuredOutput("json", {"type": "object"}, "response_format")
            case "json_schema":
                if self.json_schema is None:
                    raise InvalidRequestError("json_schema is required", param="response_format.json_schema")
                return StructuredOutput("json", self.json_schema.schema_, "response_format.json_schema.schema")


class StructuredOutputs(BaseModel):
    """vLLM's: one of the three."""

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)] | None = None

    def structured_output(self) -> StructuredOutput:
        values = {"json": self.json_, "regex": self.regex, "choice": self.choice}
        given = [(kind, value) for kind, value in values.items() if value is not None]
        if len(given) != 1:
            raise InvalidRequestError(
                f"structured_outputs must have one of json, regex and choice, not {len(given)} of them",
                param="structured_outputs",
            )
        kind, value = given[0]
        if kind == "json" and isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as exc:
                raise InvalidRequestError("the schema is not valid JSON", param="structured_outputs.json") from exc
        return StructuredOutput(cast(Any, kind), value, f"structured_outputs.{kind}")


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
    stop: StopStrings | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=128)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    logit_bias: Annotated[dict[int, Bias], Field(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def options(self) -> GenerationOptions:
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
            stop=tuple(self.stop or ()),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            logit_bias=tuple((self.logit_bias or {}).items()),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            n=self.n or 1,
            structured_output=self._structured_output(),
        )

    def _structured_output(self) -> StructuredOutput | None:
        wanted = self.response_format.structured_output() if self.response_format is not None else None
        if self.structured_outputs is not None:
            if wanted is not None:
                raise InvalidRequestError(
                    "response_format and structured_outputs exclude each other", param="structured_outputs"
                )
            wanted = self.structured_outputs.structured_output()
        if wanted is not None and self.min_tokens:
            raise InvalidRequestError(f"min_tokens cannot be combined with {wanted.param}", param="min_tokens")
        return wanted

    def check(self) -> list[str]:
        """Refuses what would be silently wrong; returns the names of unknown fields, which are ignored."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
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
        answers = [_Answer() for _ in range(1 + len(prepared.forks))]
        num_tokens = num_cached_tokens = 0
        async with contextlib.aclosing(self._server.generate(prepared)) as outputs:
            async for output in outputs:
                self._note_first_token(output)
                num_tokens += len(output.token_ids)
                num_cached_tokens = output.num_cached_tokens
                answer = answers[output.index]
                answer.text += output.text
                answer.logprobs += self._logprobs(output)
                answer.finish_reason = output.finish_reason
        return self._common | {
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": answer.text, "refusal": None},
                    "logprobs": self._logprobs_object(answer.logprobs),
                    "finish_reason": _openai_reason(answer.finish_reason),
                }
                for index, answer in enumerate(answers)
            ],
            "usage": usage(prepared, num_tokens, num_cached_tokens),
            "system_fingerprint": prepared.fingerprint,
        }

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Chunk objects of a stream: of each choice the role, the text, one finish; then the usage, if asked for."""
        prepared = await self._prepare()
        include_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        num_tokens = num_cached_tokens = 0
        seen: set[int] = set()
        async with contextlib.aclosing(self._server.generate(prepared)) as outputs:
            async for output in outputs:
                self._note_first_token(output)
                num_tokens += len(output.token_ids)
                num_cached_tokens = output.num_cached_tokens
                delta: dict[str, Any] = {} if output.index in seen else {"role": "assistant", "content": ""}
                seen.add(output.index)
                if output.text:
                    delta["content"] = output.text
                logprobs = self._logprobs(output)
                reason = None if output.finish_reason is None else _openai_reason(output.finish_reason)
                if delta or logprobs or reason:
                    choice = {
                        "index": output.index,
                        "delta": delta,
                        "logprobs": self._logprobs_object(logprobs),
                        "finish_reason": reason,
                    }
                    yield self._chunk(prepared, [choice], include_usage)
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

    def _logprobs(self, output: RequestOutput) -> list[dict[str, Any]]:
        """OpenAI's entries for the tokens of an output; the token that ends an answer is not one of its text."""
        pairs = list(zip(output.token_ids, output.logprobs, strict=False))
        if output.finish_reason is FinishReason.STOP and pairs and pairs[-1][0] in self._server.eos_token_ids:
            pairs.pop()
        return [
            self._token(token_id, found.logprob) | {"top_logprobs": [self._token(*top) for top in found.top]}
            for token_id, found in pairs
        ]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._server.token_texts(token_id)
        return {
            "token": data.decode(errors="replace"),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(data),
        }

    def _logprobs_object(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": entries, "refusal": None} if self._body.logprobs else None

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


@dataclass(slots=True)
class _Answer:
    """One choice of an answer that does not stream."""

    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: FinishReason | None = None


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
