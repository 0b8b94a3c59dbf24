"""Calls of tools in arriving text: the same calls however the text is cut, and nothing of it lost."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_service.tool_calls import ToolCallParser

WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris {", "days": [1, 2]}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


def parse(pieces: list[str], max_calls: int | None = None) -> tuple[str, list[tuple[str, str]], ToolCallParser]:
    parser = ToolCallParser(max_calls)
    content, calls = "", []
    for piece in pieces:
        text, deltas = parser.add(piece)
        content += text
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append((delta.name, ""))
            calls[delta.index] = (calls[delta.index][0], calls[delta.index][1] + delta.arguments)
    return content + parser.flush(), calls, parser


@given(st.lists(st.integers(1, 200), max_size=12))
def test_cutting_the_text_anywhere_changes_nothing(cuts: list[int]) -> None:
    text = f"Let me look.\n{WEATHER}\n{OTHER}"
    edges = [0, *sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    content, calls, _ = parse([text[start:end] for start, end in itertools.pairwise(edges)])
    assert content == "Let me look.\n"
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("get_weather", {"city": "Paris {", "days": [1, 2]}),
        ("look", {}),
    ]


def test_arguments_arrive_before_the_call_is_whole() -> None:
    parser = ToolCallParser()
    _, deltas = parser.add('<tool_call>{"name": "f", "arguments": {"text": "a long')
    assert [delta.name for delta in deltas] == ["f", None]
    assert deltas[1].arguments == '{"text": "a long'


@pytest.mark.parametrize(
    "text",
    [
        "a < b and <tool_ is no tag",
        "<tool_call>not JSON</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        '<tool_call>{"name": "f"',
    ],
    ids=["no tag", "no JSON", "no name", "deep", "cut"],
)
def test_what_only_looks_like_a_call_stays_text(text: str) -> None:
    assert parse([text])[:2] == (text, [])
    assert parse(list(text))[:2] == (text, []) if len(text) < 1000 else True


@pytest.mark.parametrize(
    "block", ['{"arguments": {"a": 1}, "name": "f"}', '{"name": "f", "arguments": "{\\"a\\": 1}"}']
)
def test_another_order_and_arguments_in_a_string_are_understood(block: str) -> None:
    content, calls, _ = parse(list(f"<tool_call>{block}</tool_call>"))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", {"a": 1})]


def test_after_as_many_calls_as_are_wanted_the_rest_is_dropped() -> None:
    content, calls, parser = parse([WEATHER + OTHER + "more"], max_calls=1)
    assert parser.is_full
    assert (content, [name for name, _ in calls]) == ("", ["get_weather"])
