"""POST /v1/responses: OpenAI's responses without state: nothing is stored, so nothing can be referred to later."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from common.errors import InvalidRequestError, ServingError
from llm_service.api.door import parse
from llm_service.api.fields import CLIENT_FIELDS, ApiRequest
from llm_service.api.formats import called_tools
from llm_service.api.generation import Block, BlockEvent, Generation, blocks, respond
from llm_service.api.items import parse_input
from llm_service.api.stream import Framing, typed_event
from llm_service.chat import ChatMessage, Tool, checked, checked_tools
from llm_service.engine.structured_output import StructuredOutput
from llm_service.prompt import TemplateOptions
from llm_service.server import GenerationOptions, LLMServer


class ResponsesTool(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class NamedTool(BaseModel):
    type: Literal["function"]
    name: str


class TextOptions(BaseModel):
    class Format(BaseModel):
        model_config = ConfigDict(extra="forbid")

        type: Literal["text", "json_object", "json_schema"]
        name: str | None = None
        description: str | None = None
        schema_: dict[str, Any] | None = Field(None, alias="schema")
        strict: bool | None = None

        def structured_output(self) -> StructuredOutput | None:
            if self.type == "text":
                return None
            if self.type == "json_schema" and self.schema_ is None:
                raise InvalidRequestError("schema is required", param="text.format.schema")
            return StructuredOutput("json", self.schema_ or {"type": "object"}, "text.format")

    model_config = ConfigDict(extra="forbid")

    format: Format = Format(type="text")
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(ApiRequest):
    """The fields that are honoured. Others are refused by name, harmless, or ignored and named in a header."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool = False
    text: TextOptions | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None

    harmless: ClassVar[frozenset[str]] = CLIENT_FIELDS | {"stream_options"}
    not_honoured: ClassVar = {
        "access_programs": ([],),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "include": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    def options(self) -> GenerationOptions:
        _, call = self.called_tools()
        wanted = None if self.text is None else self.text.format.structured_output()
        if call is not None and wanted is not None:
            raise InvalidRequestError("tool_choice excludes text.format", param="tool_choice")
        return GenerationOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_output_tokens,
            structured_output=call or wanted,
        )

    def template(self) -> TemplateOptions:
        tools, _ = self.called_tools()
        return TemplateOptions(tools)

    def called_tools(self) -> tuple[tuple[Tool, ...], StructuredOutput | None]:
        tools = checked_tools([Tool(tool.name, tool.description, tool.parameters or {}) for tool in self.tools or []])
        if isinstance(self.tool_choice, NamedTool):
            return called_tools(tools, "named", name=self.tool_choice.name)
        return called_tools(tools, self.tool_choice or "auto", parallel=self.parallel_tool_calls is not False)


def create_router(server: LLMServer) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(body: ResponsesRequest, http: Request) -> Response:
        ignored = body.check()
        server.check_model(body.model)
        found = ResponseObject(server, body, http)
        return await respond(
            found.generation,
            ignored,
            stream=body.stream,
            whole=found.whole,
            chunks=found.chunks,
            framing=Framing(typed_event, found.error),
        )

    return router


class ResponseObject:
    """One answer in the words of this API, whole or in numbered events."""

    def __init__(self, server: LLMServer, body: ResponsesRequest, http: Request) -> None:
        self.generation = Generation(server, http, "resp_")
        self._body = body
        self._limits = server.limits
        self._num_events = 0
        self._output: list[dict[str, Any]] = []

    async def whole(self) -> dict[str, Any]:
        await self._prepare()
        finish_reason = ""
        async with contextlib.aclosing(blocks(self.generation.deltas())) as events:
            async for event in events:
                if event.kind == "stop":
                    self._output.append(self._item(event.block, "completed"))
                finish_reason = event.delta.finish_reason or ""
        return self._finished(finish_reason)

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        await self._prepare()
        yield self._event("created", response=self._object("in_progress"))
        yield self._event("in_progress", response=self._object("in_progress"))
        async with contextlib.aclosing(blocks(self.generation.deltas())) as events:
            async for event in events:
                for chunk in self._events(event):
                    yield chunk

    def error(self, error: ServingError) -> dict[str, Any]:
        """The event that ends a stream which cannot go on."""
        return self._numbered("error", code=error.code or error.type, message=error.message, param=error.param)

    async def _prepare(self) -> None:
        body = self._body
        messages = await parse(self.generation.http, parse_input, body.input, self._limits)
        if body.instructions:
            messages.insert(0, ChatMessage("system", [body.instructions]))
        max_calls = 1 if body.parallel_tool_calls is False else None
        await self.generation.prepare(
            checked(messages, self._limits, "input"), body.options(), body.template(), max_calls
        )

    def _events(self, event: BlockEvent) -> list[dict[str, Any]]:
        block = event.block
        place = {"item_id": self._item_id(block), "output_index": block.index}
        content = place | {"content_index": 0}
        is_text = block.call_index is None
        match event.kind:
            case "start":
                begun = [self._event("output_item.added", output_index=block.index, item=self._item(block))]
                if is_text:
                    begun.append(self._event("content_part.added", **content, part=_text_part("")))
                return begun
            case "delta" if is_text:
                return [self._event("output_text.delta", **content, delta=event.fragment, logprobs=[])]
            case "delta":
                return [self._event("function_call_arguments.delta", **place, delta=event.fragment)]
            case "stop":
                item = self._item(block, "completed")
                self._output.append(item)
                if is_text:
                    ended = [
                        self._event("output_text.done", **content, text=block.text, logprobs=[]),
                        self._event("content_part.done", **content, part=_text_part(block.text)),
                    ]
                else:
                    ended = [
                        self._event("function_call_arguments.done", **place, name=block.name, arguments=block.text)
                    ]
                return [*ended, self._event("output_item.done", output_index=block.index, item=item)]
            case "finish":
                response = self._finished(event.delta.finish_reason or "")
                return [self._event(response["status"], response=response)]

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        return self._numbered(f"response.{name}", **fields)

    def _numbered(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def _finished(self, finish_reason: str) -> dict[str, Any]:
        is_cut = finish_reason == "length"
        usage = self.generation.usage()
        details = usage["prompt_tokens_details"]
        return self._object("incomplete" if is_cut else "completed") | {
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": details,
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
                "images": usage["images"],
            },
        }

    def _object(self, status: str) -> dict[str, Any]:
        body = self._body
        return {
            "id": self.generation.id,
            "object": "response",
            "created_at": self.generation.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": (body.text or TextOptions()).model_dump(by_alias=True, exclude_none=True),
            "tool_choice": body.tool_choice.model_dump()
            if isinstance(body.tool_choice, NamedTool)
            else body.tool_choice or "auto",
            "tools": [tool.model_dump() | {"strict": False} for tool in body.tools or []],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _item(self, block: Block, status: str = "in_progress") -> dict[str, Any]:
        item = {"id": self._item_id(block), "status": status}
        if block.call_index is None:
            content = [_text_part(block.text)] if status == "completed" else []
            return item | {"type": "message", "role": "assistant", "content": content}
        call = {"call_id": self.generation.call_id(block.call_index), "name": block.name, "arguments": block.text}
        return item | {"type": "function_call", **call}

    def _item_id(self, block: Block) -> str:
        prefix = "msg_" if block.call_index is None else "fc_"
        return f"{prefix}{self.generation.id[-24:]}{block.index}"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
