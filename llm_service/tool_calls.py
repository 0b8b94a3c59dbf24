"""Calls of tools in the text of an answer, in Qwen's format, found while the text arrives.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

import json
import re
from dataclasses import dataclass
from typing import Any

OPEN = "<tool_call>"
CLOSE = "</tool_call>"

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')
_BRACKETS = {"{": 1, "[": 1, "}": -1, "]": -1}


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the call `index` of an answer. The first one has its name."""

    index: int
    name: str | None = None
    arguments: str = ""


class ToolCallParser:
    """Splits arriving text into content and calls. What only looks like a call stays content.

    A call is streamed as soon as its name is known and its arguments begin with a brace; `num_calls` counts those
    begun. After `max_calls`, `is_full` is set and what follows is not wanted.
    """

    def __init__(self, max_calls: int | None = None) -> None:
        self.num_calls = 0
        self.is_full = False
        self._max_calls = max_calls
        self._held = ""
        self._is_inside = False
        self._arguments: _JsonObjectScanner | None = None  # of a call whose name is out

    def add(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Content and pieces of calls that are certain now."""
        self._held += text
        content = ""
        deltas: list[ToolCallDelta] = []
        while not self.is_full:
            if not self._is_inside:
                content += self._outside()
                if not self._is_inside:
                    break
            more, found = self._inside()
            content += more
            deltas += found
            if self._is_inside:
                break
        return content, deltas

    def flush(self) -> str:
        """What was held back, once no more text follows; a call that is not whole is content, unless it is out."""
        if self.is_full or self._arguments is not None:
            return ""
        text, self._held = (OPEN if self._is_inside else "") + self._held, ""
        self._is_inside = False
        return text

    def _outside(self) -> str:
        if self.num_calls:
            self._held = self._held.lstrip()  # between calls it is layout
        start = self._held.find(OPEN)
        if start < 0:
            start = len(self._held) - _num_begun(self._held, OPEN)
            content, self._held = self._held[:start], self._held[start:]
            return content
        content, self._held = self._held[:start], self._held[start + len(OPEN) :]
        self._is_inside = True
        return content

    def _inside(self) -> tuple[str, list[ToolCallDelta]]:
        deltas: list[ToolCallDelta] = []
        if self._arguments is None and (head := _HEAD.match(self._held)) and self._held[head.end() :].startswith("{"):
            name = _string(head[1])
            if name is not None:
                deltas.append(ToolCallDelta(self.num_calls, name))
                self.num_calls += 1
                self._held = self._held[head.end() :]
                self._arguments = _JsonObjectScanner()
        if self._arguments is not None:
            return "", deltas + self._stream_arguments(self._arguments)
        end = self._held.find(CLOSE)
        if end < 0:
            return "", deltas
        block, self._held = self._held[:end], self._held[end + len(CLOSE) :]
        self._is_inside = False
        call = _whole_call(block)
        if call is None:
            return OPEN + block + CLOSE, deltas
        deltas.append(ToolCallDelta(self.num_calls, call[0], call[1]))
        self.num_calls += 1
        self._note_end()
        return "", deltas

    def _stream_arguments(self, scanner: "_JsonObjectScanner") -> list[ToolCallDelta]:
        """The rest of the object as it arrives; after it, everything up to the closing tag is skipped."""
        fragment = scanner.scan(self._held)
        rest = self._held[len(fragment) :]
        deltas = [ToolCallDelta(self.num_calls - 1, arguments=fragment)] if fragment else []
        self._held = rest
        if scanner.is_whole and (end := rest.find(CLOSE)) >= 0:
            self._held = rest[end + len(CLOSE) :]
            self._arguments = None
            self._is_inside = False
            self._note_end()
        return deltas

    def _note_end(self) -> None:
        self.is_full = self.num_calls == self._max_calls


class _JsonObjectScanner:
    """Finds where a JSON object ends whose text arrives in pieces."""

    def __init__(self) -> None:
        self.is_whole = False
        self._depth = 0
        self._is_string = False
        self._is_escaped = False

    def scan(self, text: str) -> str:
        """The beginning of the text that belongs to the object."""
        for index, character in enumerate(text):
            if self.is_whole:
                return text[:index]
            if self._is_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._is_string = False
            elif character == '"':
                self._is_string = True
            else:
                self._depth += _BRACKETS.get(character, 0)
                self.is_whole = self._depth == 0
        return text


def _whole_call(block: str) -> tuple[str, str] | None:
    """Name and arguments of a call whose fields came in another order, or whose arguments are in a string."""
    try:
        call: Any = json.loads(block)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _string(literal: str) -> str | None:
    try:
        return str(json.loads(literal))
    except ValueError:
        return None


def _num_begun(text: str, tag: str) -> int:
    """Length of the longest end of the text that begins the tag."""
    return next((length for length in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-length:])), 0)
