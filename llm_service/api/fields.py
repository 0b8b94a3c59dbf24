"""What the requests of all endpoints have in common: limits on their form, and which fields are honoured.

A field of a request is honoured, because its model declares it; refused by name, unless its value asks for nothing;
harmless, because it changes nothing here; or unknown, and then ignored and named in a header.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from fastapi import Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from common import metrics
from common.errors import InvalidRequestError
from llm_service.api.formats import ResponseFormat, StructuredOutputs
from llm_service.engine.structured_output import StructuredOutput
from llm_service.server import GenerationOptions

IGNORED_FIELDS_HEADER = "x-fovea-ignored-fields"

MAX_CHOICES = 16

_MAX_DEPTH = 64
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")  # in a header value

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[
    list[StopString], Field(max_length=16), BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)
]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


# Of OpenAI's clients: hints for its own caches, storage and abuse detection. Prefixes and embeddings are found again
# here without being named.
CLIENT_FIELDS = frozenset({
    "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "request_id", "safety_identifier",
    "service_tier", "store", "user",
})  # fmt: skip


class ApiRequest(BaseModel):
    """Fields that a subclass declares are honoured; `check()` deals with the others."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    harmless: ClassVar[frozenset[str]] = frozenset()
    not_honoured: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # with the values that ask for nothing

    @model_validator(mode="before")
    @classmethod
    def _check_form(cls, body: Any) -> Any:
        check_tree(body)
        return body

    def check(self) -> list[str]:
        """Refuses what would be silently wrong; returns the names of unknown fields, which are ignored."""
        extra = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        for name in sorted(extra.keys() & self.not_honoured.keys()):
            if not any(_is_same(extra[name], value) for value in self.not_honoured[name]):
                raise InvalidRequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
        return sorted(extra.keys() - self.not_honoured.keys() - self.harmless)


class SamplingRequest(ApiRequest):
    """The fields of chat completions and completions that say how an answer is chosen, vLLM's extensions included."""

    harmless: ClassVar[frozenset[str]] = CLIENT_FIELDS
    not_honoured: ClassVar[dict[str, tuple[Any, ...]]] = {
        "bad_words": ([],),
        "best_of": (1,),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_json": (),
        "guided_regex": (),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1, 1.0),
        "priority": (0,),
        "prompt_logprobs": (0,),
        "truncate_prompt_tokens": (-1,),
        "use_beam_search": (False,),
    }

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: Probability | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stop: StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    cache_salt: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]{1,128}$")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logit_bias: Annotated[dict[int, Bias], Field(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def options(self) -> GenerationOptions:
        return GenerationOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(0, self.top_k),  # vLLM's -1 is no limit
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop=tuple(self.stop or ()),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            skip_special_tokens=self.skip_special_tokens,
            cache_salt=self.cache_salt or "",
            n=self.n or 1,
            logit_bias=tuple((self.logit_bias or {}).items()),
            structured_output=self._structured_output(),
        )

    def _structured_output(self) -> StructuredOutput | None:
        wanted = self.response_format.structured_output() if self.response_format is not None else None
        if self.structured_outputs is not None:
            if wanted is not None:
                raise InvalidRequestError(
                    "response_format and structured_outputs exclude each other", param="structured_outputs"
                )
            wanted = self.structured_outputs.structured_output()
        if wanted is not None and self.min_tokens:
            raise InvalidRequestError(f"min_tokens cannot be combined with {wanted.param}", param="min_tokens")
        return wanted


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class StreamingRequest(SamplingRequest):
    """OpenAI's way of asking for a stream."""

    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
        return self

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def with_continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


def check_tree(value: Any, path: str = "", depth: int = 0) -> None:
    """Refuses JSON that is nested too deeply, and strings that are no text, which nothing could print."""
    if depth > _MAX_DEPTH:
        raise InvalidRequestError(f"the body is nested more than {_MAX_DEPTH} deep", code="too_deep")
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, dict):
        for key, child in value.items():
            _check_text(key, path)
            if isinstance(child, (str, dict, list)):
                check_tree(child, f"{path}.{key[:64]}" if path else key[:64], depth + 1)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            if isinstance(child, (str, dict, list)):
                check_tree(child, f"{path}[{index}]", depth + 1)


def name_ignored(response: Response, ignored: list[str]) -> None:
    """Counts unknown fields and names them in a header."""
    if ignored:
        metrics.ignored_fields.inc(len(ignored))
        names = ", ".join(_UNSAFE.sub("?", name[:64]) for name in ignored[:32])
        response.headers[IGNORED_FIELDS_HEADER] = names


def _check_text(text: str, path: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidRequestError("text must be valid Unicode, without lone surrogates", param=path or None) from exc


def _is_same(value: Any, other: Any) -> bool:
    """Equal, and of one type: JSON's true is not its 1."""
    return type(value) is type(other) and bool(value == other)
