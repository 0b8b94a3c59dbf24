"""Text from tokens a few at a time is the text of all of them, and never ends inside a character."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm_service.detokenizer import IncrementalDetokenizer

TEXTS = [
    "plain words, one after another",
    "图中有几个图形？两个。",
    "mixed 🙂👩‍👩‍👧 and ünïcödé",
    "def f(x):\n    return x  # 注释",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_whole(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text).input_ids
    rng = random.Random(0)
    for _ in range(20):
        detokenizer = IncrementalDetokenizer(tokenizer)
        pieces, start = [], 0
        while start < len(ids):
            end = start + rng.randint(1, 4)
            pieces.append(detokenizer.add(ids[start:end]))
            start = end
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + detokenizer.flush() == text


def test_unfinished_character_at_the_end_is_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("ok 图").input_ids
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.add(ids[:-1]) + detokenizer.flush() == "ok "


@pytest.mark.parametrize("stop", ["after", "r an", "图形", "one"])
def test_text_ends_before_a_stop_string_that_spans_tokens(tokenizer: PreTrainedTokenizerBase, stop: str) -> None:
    text = "words, one after another 图形 end"
    detokenizer = IncrementalDetokenizer(tokenizer, ["never", stop])
    got = "".join(detokenizer.add([token]) for token in tokenizer(text).input_ids) + detokenizer.flush()
    assert got == text[: text.index(stop)]
    assert detokenizer.stopped


def test_beginning_of_a_stop_string_is_held_back_and_then_given(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, ["abcdef"])
    first = detokenizer.add(tokenizer("xx abcd").input_ids)
    assert first == "xx "
    assert detokenizer.add(tokenizer("xyz").input_ids) == "abcdxyz"
    assert detokenizer.add(tokenizer(" abc").input_ids) + detokenizer.flush() == " abc"


def test_special_tokens_are_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = tokenizer("hi<|im_end|>").input_ids
    assert detokenizer.add(ids) + detokenizer.flush() == "hi"
