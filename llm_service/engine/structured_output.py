"""Grammars that an answer must follow: compiled by llguidance within limits, then a mask of tokens in every step."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import llguidance.hf
import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.errors import InvalidRequestError

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_REGEX_BYTES = 4 * 1024  # compiling one takes time that grows with the square of its length
# Fuel is llguidance's measure of work: about 50,000 a millisecond to compile a grammar, 14,000 for a step.
LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=50_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)
# One way to write a value, json.dumps()'s: a model cannot lose itself in white space.
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_KEPT_GRAMMARS = 128


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What an answer must be: JSON of a schema, a match of a regex, one of some strings, or calls of tools.

    `source` is the schema as parsed JSON, the regex, the list of strings, or the `calls` that are allowed (`name`,
    `parameters`) and whether there may be several (`parallel`); `param` is the field of the request that it comes from.
    """

    kind: Literal["json", "regex", "choice", "tool_calls"]
    source: Any
    param: str


class GrammarState:
    """Where one answer stands in its grammar. The engine thread's, from the first mask on."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def accept(self, token_id: int) -> bool:
        """Goes on by a token. False when the grammar has failed: its next step would cost more than the limits."""
        return self.matcher.consume_token(token_id) and not self.matcher.is_error()

    @property
    def is_finished(self) -> bool:
        """Nothing may follow any more."""
        return self.matcher.is_stopped()


class Grammar:
    """A compiled grammar, for any number of answers."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> GrammarState:
        return GrammarState(self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles for one tokenizer, and keeps the last grammars. It may be called on any one thread at a time, and lets
    others run meanwhile.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        """`vocab_size` is the model's, which may be more than the tokenizer has."""
        eos = sorted(eos_token_ids) or None
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos)
        self._kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()

    def compile(self, wanted: StructuredOutput) -> Grammar:
        """Raises InvalidRequestError for what is no grammar, what nothing matches, and what is above the limits."""
        text = _text_of(wanted)
        key = wanted.kind, text
        grammar = self._kept.pop(key, None) or self._compile(wanted, text)
        self._kept[key] = grammar
        if len(self._kept) > _MAX_KEPT_GRAMMARS:
            self._kept.popitem(last=False)
        return grammar

    def _compile(self, wanted: StructuredOutput, text: str) -> Grammar:
        match wanted.kind:
            case "json":
                try:
                    source = LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
                except ValueError as exc:  # no object, or too deep
                    raise _refusal(wanted, "it is not valid") from exc
            case "regex":
                source = LLMatcher.grammar_from_regex(text)
            case "choice":
                choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
                source = LLMatcher.grammar_from_lark(f"start: {' | '.join(choices)}")
            case "tool_calls":
                source = LLMatcher.grammar_from_lark(_calls_grammar(json.loads(text)))
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise _refusal(wanted, _reason(matcher.get_error()))
        trial = matcher.deep_copy()
        trial.compute_bitmask()  # some grammars show only here that they cannot be followed
        if trial.is_error():
            raise _refusal(wanted, "it allows no answer, or its first token takes more work than is allowed")
        return Grammar(matcher)


def _calls_grammar(source: dict[str, Any]) -> str:
    """Qwen's format of calls, each with arguments of its tool's schema."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": call["name"]}, "arguments": {"type": "object", **call["parameters"]}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for call in source["calls"]
    ]
    schema = json.dumps({"anyOf": calls, "x-guidance": _JSON_OPTIONS}, ensure_ascii=False)
    several = ' ("\\n" call)*' if source["parallel"] else ""
    return f'start: call{several}\ncall: "<tool_call>\\n" body "\\n</tool_call>"\nbody: %json {schema}'


class TokenMasks:
    """The allowed tokens of many answers, computed at once by llguidance's own threads."""

    @cached_property
    def _executor(self) -> LLExecutor:
        """Made when it is needed, because it starts threads."""
        return LLExecutor()

    def compute(self, states: Sequence[GrammarState], vocab_size: int) -> Tensor:
        """int32 `[len(states), ceil(vocab_size / 32)]`, bit by bit."""
        shape = len(states), -(-vocab_size // 32)
        masks = np.zeros(shape, np.int32)
        matchers = [(state.matcher, row) for row, state in enumerate(states)]
        self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, shape[1] * 4, shape[0])
        return torch.from_numpy(masks)


def forbidden(masks: Tensor, vocab_size: int) -> Tensor:
    """bool `[R, V]` from bit masks `[R, ceil(V / 32)]`: what must not be chosen."""
    bits = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device) & 1
    return bits.flatten(1)[:, :vocab_size] == 0


def _text_of(wanted: StructuredOutput) -> str:
    try:
        text = wanted.source if wanted.kind == "regex" else json.dumps(wanted.source, ensure_ascii=False)
    except RecursionError as exc:
        raise _refusal(wanted, "it is too deep") from exc
    num_bytes = _num_bytes(text)
    limit = MAX_REGEX_BYTES if wanted.kind == "regex" else MAX_GRAMMAR_BYTES
    if num_bytes > limit:
        raise _refusal(wanted, f"it has {num_bytes} bytes, the limit is {limit}")
    if wanted.kind == "json" and (longest := _longest_pattern(wanted.source)) > MAX_REGEX_BYTES:
        raise _refusal(wanted, f"it has a pattern of {longest} bytes, the limit is {MAX_REGEX_BYTES}")
    return text


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _longest_pattern(schema: Any) -> int:
    """Bytes of the longest regex in a schema; also looks where a pattern is a mere name, which harms nobody."""
    longest = 0
    remaining = [schema]
    while remaining:
        match remaining.pop():
            case dict() as fields:
                patterns = [fields.get("pattern"), *(fields.get("patternProperties") or ())]
                longest = max([longest, *(_num_bytes(one) for one in patterns if isinstance(one, str))])
                remaining += fields.values()
            case list() as items:
                remaining += items
    return longest


def _refusal(wanted: StructuredOutput, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{wanted.param} cannot be followed: {reason}", param=wanted.param, code="invalid_grammar"
    )


def _reason(error: str) -> str:
    """llguidance's text says too much, and quotes the caller."""
    if "nsatisfiable" in error:
        return "nothing satisfies it"
    if "too big" in error or "limit" in error or "too complex" in error or "too large" in error:
        return "it is above the limits on size and work of a grammar"
    if "nimplemented" in error or "not supported" in error:
        return "it uses something that is not supported"
    return "it is not valid"
