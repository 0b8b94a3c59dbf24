"""Answers under a grammar always parse; grammars that cannot be followed are refused before anything is scheduled."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import InvalidRequestError
from llm_service.engine.request import FinishReason, Request, SamplingParams
from llm_service.engine.sampler import Sampler
from llm_service.engine.structured_output import GrammarCompiler, GrammarState, StructuredOutput
from tests.llm_service.test_scheduler import add, scheduler_of

SHAPES = Path(__file__).parents[2] / "deploy" / "shapes" / "checkpoint"
EOS = frozenset([884, 882])
VOCAB = 896

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "blue", "绿色"]}, "maxItems": 3},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHAPES)


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerBase) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size=VOCAB, eos_token_ids=EOS)


def start(compiler: GrammarCompiler, kind: Any, source: Any) -> GrammarState:
    return compiler.compile(StructuredOutput(kind, source, "response_format")).start()


def answers(tokenizer: Any, grammars: list[GrammarState], seed: int, **sampling: Any) -> list[str | None]:
    """What random logits say under grammars, all in one batch; None where 400 tokens were not enough."""
    sampler = Sampler(EOS)
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(**{"temperature": 1.0, "seed": seed, **sampling})
    requests = [Request(str(i), [1], torch.zeros(3, 1), 1, params, grammar=state) for i, state in enumerate(grammars)]
    texts: list[str | None] = [None] * len(grammars)
    for _ in range(400):
        running = [request for request in requests if texts[int(request.request_id)] is None]
        if not running:
            break
        logits = torch.randn(len(running), VOCAB, generator=generator) * 3
        for request, token in zip(running, sampler.sample(logits, running).token_ids(), strict=True):
            assert token is not None
            assert request.grammar is not None
            assert request.grammar.accept(token)
            request.output_token_ids.append(token)
            if token in EOS or request.grammar.is_finished:
                texts[int(request.request_id)] = tokenizer.decode(request.output_token_ids, skip_special_tokens=True)
    return texts


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.0}, {"top_p": 0.5, "top_k": 20}, {"repetition_penalty": 1.3}]
)
def test_random_answers_in_one_batch_follow_their_own_grammars(
    tokenizer: PreTrainedTokenizerBase, compiler: GrammarCompiler, sampling: dict[str, Any]
) -> None:
    choices = ["red", "blue\n", 'a "quoted" one', "图中", "🙂", "red hot"]
    for seed in range(5):
        grammars = [start(compiler, "json", SCHEMA) for _ in range(3)]
        grammars += [start(compiler, "regex", r"(yes|no), [0-9]{2,4}!"), start(compiler, "choice", choices)]
        *objects, matched, chosen = answers(tokenizer, grammars, seed, **sampling)
        for text in objects:
            assert text is not None
            value = json.loads(text)
            assert value.keys() == {"name", "count", "tags"}
            assert 0 <= value["count"] <= 99
            assert set(value["tags"]) <= {"red", "blue", "绿色"}
        assert matched is not None
        assert re.fullmatch(r"(yes|no), [0-9]{2,4}!", matched)
        assert chosen in choices


def test_every_choice_can_be_chosen(tokenizer: PreTrainedTokenizerBase, compiler: GrammarCompiler) -> None:
    choices = ["yes", "no"]
    grammars = [start(compiler, "choice", choices) for _ in range(40)]
    assert set(answers(tokenizer, grammars, 1)) == {"yes", "no"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


REFUSED: dict[str, tuple[str, Any, str]] = {
    "nothing is long and short": ("json", {"type": "string", "minLength": 5, "maxLength": 2}, "nothing satisfies"),
    "a number that is a string": ("json", {"allOf": [{"type": "string"}, {"type": "integer"}]}, "nothing satisfies"),
    "false": ("json", False, "not valid"),
    "a schema that holds only itself": ("json", {"$ref": "#"}, "allows no answer"),
    "a schema of another kind": ("json", {"type": "wizard"}, "not valid"),
    "a keyword nobody implements": ("json", {"not": {"type": "string"}}, "not supported"),
    "a schema elsewhere": ("json", {"$ref": "http://127.0.0.1/x.json"}, "not valid"),
    "a schema that is too deep": ("json", nested(500), "not valid"),
    "a schema that is deeper still": ("json", nested(50_000), "too deep"),
    "too many bytes": ("json", {"enum": ["x" * 70_000]}, "70014 bytes, the limit is 65536"),
    "too much fuel": ("json", {"enum": [f"{index:x}" for index in range(8400)]}, "limits on size and work"),
    "a regex that is too long": ("regex", "a?" * 2049, "4098 bytes, the limit is 4096"),
    "a pattern that is too long": ("json", {"items": [{"pattern": "a?" * 2049}]}, "a pattern of 4098 bytes"),
    "a name's pattern that is too long": ("json", {"patternProperties": {"a?" * 2049: {}}}, "a pattern of 4098 bytes"),
    "no regex": ("regex", "[a-z", "not valid"),
    "a regex that looks around": ("regex", r"a\b", "not supported"),
    "a regex of nothing": ("regex", r"[^\s\S]", "allows no answer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_grammar_that_cannot_be_followed_is_refused(compiler: GrammarCompiler, name: str) -> None:
    kind, source, words = REFUSED[name]
    with pytest.raises(InvalidRequestError, match=words) as caught:
        start(compiler, kind, source)
    assert caught.value.param == "response_format"


class Exhausted(GrammarState):
    def __init__(self) -> None:
        pass

    def accept(self, token_id: int) -> bool:
        return False


def test_a_grammar_that_runs_out_of_fuel_ends_its_own_request_only() -> None:
    scheduler = scheduler_of()
    bad, good = add(scheduler, "bad", 4), add(scheduler, "good", 4)
    bad.grammar = Exhausted()
    scheduled = scheduler.schedule()
    failed, going_on = scheduler.update(scheduled, [1, 1])
    assert (failed.finish_reason, failed.token_ids) == (FinishReason.ERROR, [])
    assert failed.error is not None and "grammar" in failed.error
    assert (going_on.finish_reason, going_on.token_ids, going_on.error) == (None, [1], None)
    scheduler.abort(good)
    scheduler.kv_cache_manager.check_integrity()
