"""POST /v1/chat/completions: OpenAI's chat completions, with images and tools."""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any, ClassVar, Literal, Self

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.errors import InvalidRequestError
from llm_service.api.door import parse
from llm_service.api.fields import ApiRequest, StreamingRequest
from llm_service.api.formats import called_tools
from llm_service.api.generation import LEAST_LOGPROB, Answer, Delta, Generation, respond
from llm_service.chat import Tool, checked_tools, parse_messages
from llm_service.engine.engine import MAX_LOGPROBS
from llm_service.engine.request import TokenLogprobs
from llm_service.engine.structured_output import StructuredOutput
from llm_service.prompt import TemplateOptions
from llm_service.server import GenerationOptions, LLMServer


class FunctionTool(BaseModel):
    """One of `tools`, as chat completions have them."""

    class Function(BaseModel):
        model_config = ConfigDict(extra="ignore")

        name: str
        description: str | None = None
        parameters: dict[str, Any] | None = None

    type: Literal["function"]
    function: Function

    def tool(self) -> Tool:
        return Tool(self.function.name, self.function.description, self.function.parameters or {})


class NamedTool(BaseModel):
    class Function(BaseModel):
        name: str

    type: Literal["function"]
    function: Function


class TemplateVariables(BaseModel):
    """The variables of chat templates that a request may set; each changes what the model is told and nothing else."""

    model_config = ConfigDict(extra="forbid")

    enable_thinking: bool | None = None
    add_vision_id: bool | None = None


class PromptRequest(ApiRequest):
    """What lays out a prompt, for every endpoint that takes messages as chat completions do."""

    messages: list[dict[str, Any]]
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _prompt_has_one_end(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt: false", param="continue_final_message"
            )
        return self

    def template(self) -> TemplateOptions:
        variables = self.chat_template_kwargs.model_dump(exclude_none=True) if self.chat_template_kwargs else {}
        tools, _ = self.called_tools()
        return TemplateOptions(tools, self.add_generation_prompt, self.continue_final_message, variables)

    def called_tools(self) -> tuple[tuple[Tool, ...], StructuredOutput | None]:
        tools = checked_tools([tool.tool() for tool in self.tools or []])
        if isinstance(self.tool_choice, NamedTool):
            return called_tools(tools, "named", name=self.tool_choice.function.name)
        return called_tools(tools, self.tool_choice or "auto", parallel=self.parallel_tool_calls is not False)


class ChatCompletionRequest(PromptRequest, StreamingRequest):
    """The fields that are honoured. Others are refused by name, harmless, or ignored and named in a header."""

    model: str
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    modalities: list[Literal["text"]] | Literal["text", "image", "multi-images", "video"] | None = None  # SGLang's, too

    harmless: ClassVar[frozenset[str]] = StreamingRequest.harmless | {"prediction"}
    not_honoured: ClassVar = StreamingRequest.not_honoured | {
        "audio": (),
        "chat_template": (),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "moderation": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    def options(self) -> GenerationOptions:
        options = super().options()
        _, call = self.called_tools()
        if call is not None and options.structured_output is not None:
            raise InvalidRequestError(f"tool_choice excludes {options.structured_output.param}", param="tool_choice")
        return dataclasses.replace(
            options,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            structured_output=call or options.structured_output,
        )

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return self


def create_router(server: LLMServer) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        ignored = body.check()
        server.check_model(body.model)
        completion = ChatCompletion(server, body, http)
        return await respond(
            completion.generation, ignored, stream=body.stream, whole=completion.whole, chunks=completion.chunks
        )

    return router


class ChatCompletion:
    """One answer in OpenAI's words, whole or in chunks."""

    def __init__(self, server: LLMServer, body: ChatCompletionRequest, http: Request) -> None:
        self.generation = Generation(server, http, "chatcmpl-")
        self._body = body
        self._limits = server.limits
        self._token_texts = server.token_texts

    async def whole(self) -> dict[str, Any]:
        await self._prepare()
        choices = []
        for index, answer in enumerate(await self.generation.answers()):
            choice: dict[str, Any] = {
                "index": index,
                "message": self._message(index, answer),
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
            }
            choices.append(choice | ({"token_ids": answer.token_ids} if self._body.return_token_ids else {}))
        return self._object("chat.completion", choices) | self._prompt_ids() | {"usage": self.generation.usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Of each choice the role, the text and calls, one finish; then the usage, if it was asked for."""
        await self._prepare()
        extra = self._prompt_ids()
        begun: set[int] = set()
        async with contextlib.aclosing(self.generation.deltas()) as found:
            async for piece in found:
                delta: dict[str, Any] = {} if piece.index in begun else {"role": "assistant", "content": ""}
                begun.add(piece.index)
                delta |= self._delta(piece)
                if not (delta or piece.finish_reason or piece.logprobs or self._body.return_token_ids):
                    continue
                choice: dict[str, Any] = {
                    "index": piece.index,
                    "delta": delta,
                    "logprobs": self._logprobs(piece.logprobs),
                    "finish_reason": piece.finish_reason,
                }
                if self._body.return_token_ids:
                    choice["token_ids"] = piece.token_ids
                yield self._object("chat.completion.chunk", [choice]) | self._usage_so_far() | extra
                extra = {}
        if self._body.with_usage:
            yield self._object("chat.completion.chunk", []) | {"usage": self.generation.usage()}

    async def _prepare(self) -> None:
        body = self._body
        messages = await parse(self.generation.http, parse_messages, body.messages, self._limits)
        max_calls = 1 if body.parallel_tool_calls is False else None
        await self.generation.prepare(messages, body.options(), body.template(), max_calls)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.generation.id,
            "object": kind,
            "created": self.generation.created,
            "model": self._body.model,
            "choices": choices,
            "system_fingerprint": self.generation.prepared.fingerprint,
        }

    def _usage_so_far(self) -> dict[str, Any]:
        if self._body.with_continuous_usage:
            return {"usage": self.generation.usage()}
        return {"usage": None} if self._body.with_usage else {}

    def _prompt_ids(self) -> dict[str, Any]:
        if not self._body.return_token_ids:
            return {}
        return {"prompt_token_ids": self.generation.prepared.request.prompt_token_ids}

    def _delta(self, piece: Delta) -> dict[str, Any]:
        content = {"content": piece.text} if piece.text else {}
        calls = [
            {"index": call.index, "function": {"arguments": call.arguments}}
            if call.name is None
            else {"index": call.index} | self._call(piece.index, call.index, call.name, call.arguments)
            for call in piece.tool_calls
        ]
        return content | ({"tool_calls": calls} if calls else {})

    def _message(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.tool_calls:
            message["content"] = answer.text.strip() or None
            message["tool_calls"] = [
                self._call(index, place, call.name, call.arguments) for place, call in enumerate(answer.tool_calls)
            ]
        return message

    def _call(self, index: int, place: int, name: str, arguments: str) -> dict[str, Any]:
        """The call at a place in choice `index`."""
        function = {"name": name, "arguments": arguments}
        return {"id": self.generation.call_id(place, index), "type": "function", "function": function}

    def _logprobs(self, found: list[tuple[int, TokenLogprobs]]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        entries = [
            self._token(token_id, one.logprob) | {"top_logprobs": [self._token(*top) for top in one.top]}
            for token_id, one in found
        ]
        return {"content": entries, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._token_texts(token_id)
        return {
            "token": data.decode(errors="replace"),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(data),
        }
