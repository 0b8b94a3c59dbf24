"""The engine's vocabulary: what goes in, what comes out, and what is known about a request in between."""

from dataclasses import dataclass, field
from enum import StrEnum

from torch import Generator, Tensor

from common.embedding import VisionEmbedding


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

    Stop *strings* belong to the server, which sees text; the engine knows tokens only.
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

    def end_token_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end the answer, given those that end it by default."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | eos_token_ids


@dataclass(eq=False, slots=True)
class Request:
    """One request on its way through the engine, which alone changes it after `add_request()`.

    `positions` is int64 `[3, num_prompt_tokens]`, `next_position` the position of the first generated token;
    `cache_salt` keeps tenants from sharing KV blocks. `num_computed_tokens` says how far it is. The KV cache manager
    keeps `block_table` and `block_hashes` here, the sampler its `generator`.
    """

    request_id: str
    prompt_token_ids: list[int]
    positions: Tensor
    next_position: int
    sampling_params: SamplingParams
    mm_features: list[MultiModalFeature] = field(default_factory=list)
    cache_salt: str = ""

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[str] = field(default_factory=list)
    generator: Generator | None = None
    finish_reason: FinishReason | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens `start` to `end` of prompt and answer as one sequence, copying no more than these."""
        answer = self.output_token_ids[max(0, start - self.num_prompt_tokens) : max(0, end - self.num_prompt_tokens)]
        return self.prompt_token_ids[start:end] + answer


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What is new since the last output of a request.

    The engine fills `token_ids`, of which the last is the end token when the reason is `stop`; `text` is added by the
    server, which may hold back bytes of an unfinished character. `num_cached_tokens` counts prompt tokens whose KV
    blocks were reused.
    """

    request_id: str
    token_ids: list[int]
    text: str = ""
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
