"""The input items of OpenAI's newer APIs (responses, decisions) -> messages."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.config import ImageLimits
from common.errors import InvalidRequestError
from llm_service.chat import (
    ROLES,
    ChatMessage,
    ToolCall,
    VisualPart,
    parse_arguments,
    parse_content,
    parse_text,
    unsupported_part,
)
from llm_service.image_parts import image_of_url, parse_detail, parse_reference
from llm_service.video_parts import parse_video_part

_PARTS = ("input_text", "output_text", "refusal", "input_image", "input_json", "image_ref", "video_url", "video")


def parse_input(source: str | Sequence[Mapping[str, Any]], limits: ImageLimits) -> list[ChatMessage]:
    """A text is one user message. Calls of tools that follow each other are one message of the assistant."""
    if isinstance(source, str):
        return [ChatMessage("user", [source])]
    messages: list[ChatMessage] = []
    for index, item in enumerate(source):
        message = _parse_item(item, f"input[{index}]", limits)
        if message.tool_calls and messages and messages[-1].role == "assistant":
            last = messages.pop()
            message = ChatMessage("assistant", last.content, last.tool_calls + message.tool_calls)
        messages.append(message)
    return messages


def parse_part(part: Mapping[str, Any], field: str, limits: ImageLimits) -> str | VisualPart:
    match part.get("type"):
        case "input_text" | "output_text" | "text":
            return parse_text(part, field)
        case "refusal":
            return parse_text(part, field, "refusal")
        case "input_image":
            url = part.get("image_url")
            if not isinstance(url, str):
                raise InvalidRequestError(
                    "input_image needs a string image_url; file_id is not supported", param=f"{field}.image_url"
                )
            return image_of_url(url, f"{field}.image_url", limits, detail=parse_detail(part, field))
        case "input_json" | "json":
            return json.dumps(part.get("json", part.get("data")), ensure_ascii=False)
        case "image_ref":
            return parse_reference(part, field)
        case "video_url" | "video":
            return parse_video_part(part, field, limits)
        case other:
            raise unsupported_part(other, field, _PARTS)


def _parse_item(item: Mapping[str, Any], field: str, limits: ImageLimits) -> ChatMessage:
    match item.get("type", "message"):
        case "message":
            role = item.get("role")
            if not isinstance(role, str) or role not in ("user", "system", "developer", "assistant"):
                raise InvalidRequestError(
                    f"role must be user, system, developer or assistant, not {str(role)[:64]!r}", param=f"{field}.role"
                )
            return ChatMessage(ROLES[role], _parse_parts(item.get("content"), f"{field}.content", limits))
        case "function_call":
            arguments = parse_arguments(item.get("arguments"), f"{field}.arguments")
            return ChatMessage("assistant", [], (_call(item, field, arguments),))
        case "custom_tool_call":
            return ChatMessage("assistant", [], (_call(item, field, {"input": parse_text(item, field, "input")}),))
        case "function_call_output" | "custom_tool_call_output":
            return ChatMessage("tool", _parse_parts(item.get("output"), f"{field}.output", limits))
        case other:
            raise InvalidRequestError(
                f"input items of type {str(other)[:64]!r} are not supported", param=f"{field}.type"
            )


def _parse_parts(content: object, field: str, limits: ImageLimits) -> list[str | VisualPart]:
    return parse_content(content, field, lambda part, where: parse_part(part, where, limits))


def _call(item: Mapping[str, Any], field: str, arguments: dict[str, Any]) -> ToolCall:
    return ToolCall(parse_text(item, field, "call_id"), parse_text(item, field, "name"), arguments)
