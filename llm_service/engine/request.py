"""The engine's vocabulary: what goes in, what comes out, and what is known about a request in between."""

import secrets
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from common.embedding import VisionEmbedding
from llm_service.engine.structured_output import GrammarState


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class PlaceholderRange:
    """Where an image sits in the prompt, in tokens."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class MultiModalFeature:
    """One image of one request. `key` is its full embedding key: namespace, mm_hash and params."""

    key: str
    position: PlaceholderRange
    embedding: VisionEmbedding
    interval: float = 1.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. `temperature` 0 is greedy and exact; `top_k` 0 and `max_tokens` None mean no limit.

    `logit_bias` pairs token ids with what is added to their logits. `logprobs` is how many of the likeliest tokens are
    told with each token's own log probability; None tells neither. An answer begins with `forced_token_ids`, however
    unlikely they are: so they are scored. Stop *strings* belong to the server, which sees
    text; the engine knows tokens only.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    forced_token_ids: tuple[int, ...] = ()

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def end_token_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end the answer, given those that end it by default."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | eos_token_ids


@dataclass(eq=False, slots=True)
class Request:
    """One request on its way through the engine, which alone changes it after `add_request()`.

    `positions` is int64 `[3, num_prompt_tokens]`, `next_position` the position of the first generated token;
    `cache_salt` keeps tenants from sharing KV blocks. `num_computed_tokens` says how far it is. The KV cache manager
    keeps `block_table` and `block_hashes` here. `seed` is the one of the sampling parameters or, without one, random.

    `grammar` is what the answer must follow, a state of its own for each request.

    `forks` are requests with this very prompt, `followers` others that begin alike. Both wait for its prompt: then the
    forks go on from its KV blocks and its logits, and the followers are next in the queue.

    `first_scheduled_at` is of `time.perf_counter()`.

    `num_pending_tokens`, 0 or 1, are sampled and not yet read back; `pending_row` is their place on the device.
    """

    request_id: str
    prompt_token_ids: list[int]
    positions: Tensor
    next_position: int
    sampling_params: SamplingParams
    mm_features: list[MultiModalFeature] = field(default_factory=list)
    cache_salt: str = ""
    grammar: GrammarState | None = None

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    first_scheduled_at: float | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_pending_tokens: int = 0
    pending_row: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[str] = field(default_factory=list)
    forks: list["Request"] = field(default_factory=list)
    followers: list["Request"] = field(default_factory=list)
    seed: int = field(init=False)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        seed = self.sampling_params.seed
        self.seed = secrets.randbits(63) if seed is None else seed

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """With the pending ones."""
        return len(self.output_token_ids) + self.num_pending_tokens

    @property
    def must_see_tokens(self) -> bool:
        """No next step before the tokens of this one are known: they decide what may follow, or who goes on."""
        return self.sampling_params.has_penalties or self.grammar is not None or bool(self.forks or self.followers)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens `start` to `end` of prompt and answer as one sequence, copying no more than these."""
        answer = self.output_token_ids[max(0, start - self.num_prompt_tokens) : max(0, end - self.num_prompt_tokens)]
        return self.prompt_token_ids[start:end] + answer

    def has_prompt_of(self, other: "Request") -> bool:
        """The same tokens, images and tenant, so that one computation serves both."""
        return (
            self.prompt_token_ids == other.prompt_token_ids
            and [(one.key, one.position, one.interval) for one in self.mm_features]
            == [(one.key, one.position, one.interval) for one in other.mm_features]
            and self.cache_salt == other.cache_salt
        )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log probabilities under the model itself, before bias, penalties, temperature and grammar.

    `top` has the likeliest tokens, best first; the chosen one need not be among them.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What is new since the last output of a request.

    The engine fills `token_ids`, of which the last is the end token when the reason is `stop`. The server adds `text`,
    which may hold back bytes of an unfinished character, `index`, the choice it belongs to, and `stop_string`, the one
    that ended the text. `num_cached_tokens` counts prompt tokens whose KV blocks were reused. `logprobs` has one entry
    for each token, if they were asked for. `error` says what ended the request, if it was its grammar.
    """

    request_id: str
    token_ids: list[int]
    text: str = ""
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: str | None = None
    index: int = 0
    stop_string: str | None = None
