"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's messages, with images and tools."""

import contextlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from common.config import ImageLimits
from common.errors import InvalidRequestError
from llm_service.api.door import context_of, parse
from llm_service.api.fields import ApiRequest, Probability, StopString
from llm_service.api.formats import called_tools
from llm_service.api.generation import BlockEvent, Generation, blocks, respond
from llm_service.api.stream import ANTHROPIC
from llm_service.chat import (
    ChatMessage,
    Tool,
    ToolCall,
    VisualPart,
    checked,
    checked_tools,
    parse_content,
    parse_text,
    unsupported_part,
)
from llm_service.engine.structured_output import StructuredOutput
from llm_service.image_parts import AnyImagePart, ImagePart, decode_base64, image_of_url
from llm_service.prompt import TemplateOptions
from llm_service.server import GenerationOptions, LLMServer

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class AnthropicTool(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class CountTokensRequest(ApiRequest):
    """What lays out the prompt."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None

    harmless: ClassVar[frozenset[str]] = frozenset({"cache_control", "metadata", "service_tier"})
    not_honoured: ClassVar = {
        "container": (),
        "context_management": (),
        "mcp_servers": ([],),
        "output_config": (),
        "output_format": (),
        "thinking": ({"type": "disabled"},),
    }

    def prompt(self, limits: ImageLimits) -> list[ChatMessage]:
        return checked([*_system(self.system), *_conversation(self.messages, limits)], limits)

    def template(self) -> TemplateOptions:
        tools, _ = self.called_tools()
        return TemplateOptions(tools)

    def called_tools(self) -> tuple[tuple[Tool, ...], StructuredOutput | None]:
        tools = checked_tools([Tool(tool.name, tool.description, tool.input_schema) for tool in self.tools or []])
        choice = self.tool_choice or ToolChoice(type="auto")
        words = {"any": "required", "tool": "named"}
        return called_tools(
            tools, words.get(choice.type, choice.type), name=choice.name, parallel=not choice.disable_parallel_tool_use
        )


class MessagesRequest(CountTokensRequest):
    """The fields that are honoured. Others are refused by name, harmless, or ignored and named in a header."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Annotated[list[StopString], Field(max_length=16)] = Field(default_factory=list)
    temperature: Probability | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = Field(None, ge=0, lt=2**31)
    stream: bool = False

    def options(self) -> GenerationOptions:
        return GenerationOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            stop=tuple(self.stop_sequences),
            structured_output=self.called_tools()[1],
        )


def create_router(server: LLMServer) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/messages")
    async def messages(body: MessagesRequest, http: Request) -> Response:
        ignored = body.check()
        server.check_model(body.model)
        message = Message(server, body, http)
        return await respond(
            message.generation,
            ignored,
            stream=body.stream,
            whole=message.whole,
            chunks=message.chunks,
            framing=ANTHROPIC,
        )

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest, http: Request) -> dict[str, Any]:
        body.check()
        server.check_model(body.model)
        messages = await parse(http, body.prompt, server.limits)
        prompt, _ = await server.count(messages, body.template(), context_of(http))
        return {"input_tokens": len(prompt.token_ids)}

    return router


class Message:
    """One answer in Anthropic's words, whole or in events."""

    def __init__(self, server: LLMServer, body: MessagesRequest, http: Request) -> None:
        self.generation = Generation(server, http, "msg_")
        self._body = body
        self._limits = server.limits

    async def whole(self) -> dict[str, Any]:
        await self._prepare()
        [answer] = await self.generation.answers()
        content: list[dict[str, Any]] = [{"type": "text", "text": answer.text}] if answer.text.strip() else []
        content += [
            {"type": "tool_use", "id": self._call_id(index), "name": call.name, "input": _input(call.arguments)}
            for index, call in enumerate(answer.tool_calls)
        ]
        return self._message(content, answer.finish_reason, answer.stop_string)

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        await self._prepare()
        is_begun = False
        async with contextlib.aclosing(blocks(self.generation.deltas())) as events:
            async for event in events:
                if not is_begun:  # not before the first token, when the cached ones are known
                    is_begun = True
                    yield {"type": "message_start", "message": self._message([])}
                for chunk in self._events(event):
                    yield chunk

    async def _prepare(self) -> None:
        choice = self._body.tool_choice
        max_calls = 1 if choice is not None and choice.disable_parallel_tool_use else None
        messages = await parse(self.generation.http, self._body.prompt, self._limits)
        await self.generation.prepare(messages, self._body.options(), self._body.template(), max_calls)

    def _events(self, event: BlockEvent) -> list[dict[str, Any]]:
        block = event.block
        is_text = block.call_index is None
        match event.kind:
            case "start":
                content: dict[str, Any] = {"type": "text", "text": ""}
                if block.call_index is not None:
                    identity = {"id": self._call_id(block.call_index), "name": block.name}
                    content = {"type": "tool_use", **identity, "input": {}}
                return [{"type": "content_block_start", "index": block.index, "content_block": content}]
            case "delta":
                delta = (
                    {"type": "text_delta", "text": event.fragment}
                    if is_text
                    else {"type": "input_json_delta", "partial_json": event.fragment}
                )
                return [{"type": "content_block_delta", "index": block.index, "delta": delta}]
            case "stop":
                return [{"type": "content_block_stop", "index": block.index}]
            case "finish":
                reason = _stop_reason(event.delta.finish_reason, event.delta.stop_string)
                stop = {"stop_reason": reason, "stop_sequence": event.delta.stop_string}
                return [
                    {"type": "message_delta", "delta": stop, "usage": self._usage()},
                    {"type": "message_stop"},
                ]

    def _message(
        self, content: list[dict[str, Any]], finish_reason: str | None = None, stop_string: str | None = None
    ) -> dict[str, Any]:
        return {
            "id": self.generation.id,
            "type": "message",
            "role": "assistant",
            "model": self._body.model,
            "content": content,
            "stop_reason": _stop_reason(finish_reason, stop_string),
            "stop_sequence": stop_string,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        """Every prompt token counts once: read from the cache, written to it, or neither."""
        generation = self.generation
        cached, written = generation.num_cached_tokens, generation.num_cache_write_tokens
        return {
            "input_tokens": generation.prepared.num_prompt_tokens - cached - written,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": written,
            "output_tokens": generation.num_tokens,
        }

    def _call_id(self, index: int) -> str:
        return self.generation.call_id(index, prefix="toolu_")


def _stop_reason(finish_reason: str | None, stop_string: str | None) -> str | None:
    if finish_reason is None:
        return None
    return "stop_sequence" if stop_string is not None else _STOP_REASONS[finish_reason]


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call; what is no JSON object, because the answer was cut, is told as it is."""
    try:
        found = json.loads(arguments)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"invalid_json": arguments}


def _system(system: str | list[dict[str, Any]] | None) -> list[ChatMessage]:
    if system is None:
        return []
    return [ChatMessage("system", parse_content(system, "system", _parse_text_block))]


def _conversation(messages: Sequence[Mapping[str, Any]], limits: ImageLimits) -> list[ChatMessage]:
    found: list[ChatMessage] = []
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        match message.get("role"):
            case "user":
                found += _user_messages(message.get("content"), f"{field}.content", limits)
            case "assistant":
                found.append(_assistant_message(message.get("content"), f"{field}.content"))
            case other:
                raise InvalidRequestError(
                    f"role must be 'user' or 'assistant', not {str(other)[:64]!r}", param=f"{field}.role"
                )
    return found


def _user_messages(content: object, field: str, limits: ImageLimits) -> list[ChatMessage]:
    """Results of tools are messages of their own for chat templates."""
    found: list[ChatMessage] = []

    def parse(block: Mapping[str, Any], where: str) -> str | VisualPart:
        if block.get("type") == "tool_result":
            result = block.get("content")
            parts = [] if result is None else parse_content(result, f"{where}.content", parse_plain)
            found.append(ChatMessage("tool", parts))
            return ""
        return parse_plain(block, where)

    def parse_plain(block: Mapping[str, Any], where: str) -> str | VisualPart:
        return _parse_image(block, where, limits) if block.get("type") == "image" else _parse_text_block(block, where)

    parts = [part for part in parse_content(content, field, parse) if part != ""]
    return [*found, ChatMessage("user", parts)] if parts or not found else found


def _assistant_message(content: object, field: str) -> ChatMessage:
    calls: list[ToolCall] = []

    def parse(block: Mapping[str, Any], where: str) -> str:
        if block.get("type") != "tool_use":
            return _parse_text_block(block, where)
        name, arguments = block.get("name"), block.get("input")
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise InvalidRequestError("a tool_use block needs a name and an input that is an object", param=where)
        calls.append(ToolCall(str(block.get("id", "")), name, arguments))
        return ""

    return ChatMessage("assistant", parse_content(content, field, parse), tuple(calls))


def _parse_text_block(block: Mapping[str, Any], field: str) -> str:
    if block.get("type") != "text":
        raise unsupported_part(block.get("type"), field, ("text", "image", "tool_use", "tool_result"))
    return parse_text(block, field)


def _parse_image(block: Mapping[str, Any], field: str, limits: ImageLimits) -> AnyImagePart:
    source = block.get("source")
    match source:
        case {"type": "base64", "media_type": str(media_type), "data": str(data)}:
            if not media_type.lower().startswith("image/"):
                raise InvalidRequestError("media_type must be an image's", param=f"{field}.source.media_type")
            where = f"{field}.source.data"
            return ImagePart(decode_base64(data, where, limits), "auto", where)
        case {"type": "url", "url": str(url)}:
            return image_of_url(url, f"{field}.source.url", limits)
    raise InvalidRequestError(
        "an image's source must be {type: base64, media_type, data} or {type: url, url}", param=f"{field}.source"
    )
