"""Messages of chat completions -> text, image parts and tool calls, in the order in which the model sees them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.config import ImageLimits
from common.errors import InvalidRequestError
from llm_service.image_parts import ImagePart, MediaPart, UrlPart, parse_image_part, parse_reference
from llm_service.video_parts import ClipPart, VisualPart, parse_video_part

__all__ = ["ChatMessage", "ImagePart", "MediaPart", "Tool", "ToolCall", "UrlPart", "VisualPart", "parse_messages"]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

_MAX_MESSAGES = 1024
_MAX_TOOLS = 128
_MAX_SCHEMA_BYTES = 64 * 1024
_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made in an earlier turn."""

    id: str
    name: str
    arguments: dict[str, Any]

    def for_template(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def for_template(self) -> dict[str, Any]:
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": self.parameters}}


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: list[str | VisualPart]
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))

    def for_template(self, *, string_content: bool = True) -> dict[str, Any]:
        """What chat templates expect: parts in which an image or clip is a bare marker, or the text as a string."""
        calls = {"tool_calls": [call.for_template() for call in self.tool_calls]} if self.tool_calls else {}
        if string_content and all(isinstance(part, str) for part in self.content):
            return {"role": self.role, "content": self.text, **calls}
        return {"role": self.role, "content": [_part_for_template(part) for part in self.content], **calls}


def _part_for_template(part: str | VisualPart) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "video" if isinstance(part, ClipPart) else "image"}


def parse_messages(messages: Sequence[Mapping[str, Any]], limits: ImageLimits) -> list[ChatMessage]:
    """Raises InvalidRequestError with the path of the first field that is wrong."""
    return checked(
        [_parse_message(message, f"messages[{index}]", limits) for index, message in enumerate(messages)], limits
    )


def checked(messages: list[ChatMessage], limits: ImageLimits, param: str = "messages") -> list[ChatMessage]:
    """Messages of any API, within the limits on their numbers."""
    if not messages:
        raise InvalidRequestError(f"{param} must not be empty", param=param)
    if len(messages) > _MAX_MESSAGES:
        raise InvalidRequestError(f"{len(messages)} messages were sent, the limit is {_MAX_MESSAGES}", param=param)
    visuals = visuals_of(messages)
    num_clips = sum(isinstance(part, ClipPart) for part in visuals)
    num_images = len(visuals) - num_clips
    if num_images > limits.max_images:
        raise InvalidRequestError(
            f"{num_images} images were sent, the limit is {limits.max_images} (limits.max_images)",
            param=param,
            code="too_many_images",
        )
    if num_clips > limits.video.max_clips:
        raise InvalidRequestError(
            f"{num_clips} clips were sent, the limit is {limits.video.max_clips} (limits.video.max_clips)",
            param=param,
            code="too_many_videos",
        )
    return messages


def visuals_of(messages: Sequence[ChatMessage]) -> list[VisualPart]:
    """Images and clips."""
    return [part for message in messages for part in message.content if not isinstance(part, str)]


def checked_tools(tools: Sequence[Tool], param: str = "tools") -> tuple[Tool, ...]:
    """Tools of any API, within the limits. Raises InvalidRequestError with the path of the first that is wrong."""
    if len(tools) > _MAX_TOOLS:
        raise InvalidRequestError(f"{len(tools)} tools were sent, the limit is {_MAX_TOOLS}", param=param)
    for index, tool in enumerate(tools):
        if not _FUNCTION_NAME.fullmatch(tool.name):
            raise InvalidRequestError(
                "a function's name has 1 to 128 of the characters A-Z a-z 0-9 . _ -", param=f"{param}[{index}].name"
            )
        num_bytes = len(json.dumps(tool.parameters))
        if num_bytes > _MAX_SCHEMA_BYTES:
            raise InvalidRequestError(
                f"the schema has {num_bytes} bytes, the limit is {_MAX_SCHEMA_BYTES}", param=f"{param}[{index}]"
            )
    if len({tool.name for tool in tools}) < len(tools):
        raise InvalidRequestError("two tools have the same name", param=param)
    return tuple(tools)


def parse_arguments(text: object, field: str) -> dict[str, Any]:
    """The arguments of a call as OpenAI's APIs carry them: an object, in JSON, in a string."""
    try:
        arguments = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequestError("arguments must be a string with a JSON object", param=field)
    return arguments


def parse_content(
    content: object, field: str, parse_part: Callable[[Mapping[str, Any], str], str | VisualPart]
) -> list[str | VisualPart]:
    """The content of a message of any API: a string, or parts."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise InvalidRequestError("content must be a string or a list of parts", param=field)
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, Mapping):
            raise InvalidRequestError("a content part must be an object", param=f"{field}[{index}]")
        parts.append(parse_part(part, f"{field}[{index}]"))
    return parts


def parse_text(part: Mapping[str, Any], field: str, name: str = "text") -> str:
    text = part.get(name)
    if not isinstance(text, str):
        raise InvalidRequestError(f"{name} must be a string", param=f"{field}.{name}")
    return text


def unsupported_part(kind: object, field: str, supported: Sequence[str]) -> InvalidRequestError:
    names = ", ".join(repr(name) for name in supported)
    return InvalidRequestError(
        f"content parts of type {str(kind)[:64]!r} are not supported; supported are {names}",
        param=f"{field}.type",
        code="unsupported_content_part",
    )


def _parse_message(message: Mapping[str, Any], field: str, limits: ImageLimits) -> ChatMessage:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequestError(f"role must be one of {sorted(ROLES)}, not {str(role)[:64]!r}", param=f"{field}.role")
    calls = _parse_tool_calls(message.get("tool_calls"), f"{field}.tool_calls") if role == "assistant" else ()
    content = message.get("content")
    if content is None and role == "assistant":
        return ChatMessage(role, [], calls)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise InvalidRequestError("a tool's message needs a tool_call_id", param=f"{field}.tool_call_id")
    parts = parse_content(content, f"{field}.content", lambda part, where: _parse_part(part, where, limits))
    return ChatMessage(ROLES[role], parts, calls)


def _parse_part(part: Mapping[str, Any], field: str, limits: ImageLimits) -> str | VisualPart:
    kind = part.get("type") if "type" in part or "image_url" not in part else "image_url"
    match kind:
        case "text":
            return parse_text(part, field)
        case "refusal":
            return parse_text(part, field, "refusal")
        case "image_url":
            return parse_image_part(part, field, limits)
        case "image_ref":
            return parse_reference(part, field)
        case "video_url" | "video":
            return parse_video_part(part, field, limits)
        case other:
            raise unsupported_part(other, field, ("text", "image_url", "image_ref", "video_url", "video"))


def _parse_tool_calls(calls: object, field: str) -> tuple[ToolCall, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise InvalidRequestError("tool_calls must be a list", param=field)
    return tuple(_parse_tool_call(call, f"{field}[{index}]") for index, call in enumerate(calls))


def _parse_tool_call(call: object, field: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError("a tool call must be an object with a function that has a name", param=field)
    arguments = parse_arguments(function.get("arguments"), f"{field}.function.arguments")
    return ToolCall(str(call.get("id", "")), function["name"], arguments)
