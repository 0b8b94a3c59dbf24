"""LLMEngine: requests in, tokens out, one step at a time. One thread calls it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from common import metrics
from common.checkpoint import LoadedHalf, text_model_and_head
from common.errors import InvalidRequestError
from common.families import MropeRule
from llm_service.config import EngineConfig
from llm_service.engine.kv_cache import KVCacheManager
from llm_service.engine.model_runner import ModelRunner, TransformersRunner
from llm_service.engine.request import Request, RequestOutput, SamplingParams
from llm_service.engine.sampler import SampledTokens, Sampler
from llm_service.engine.scheduler import Scheduler, SchedulerOutput

if torch.cuda.is_available():  # Triton comes with the CUDA builds of torch only
    from llm_service.engine.cuda_runner import CudaModelRunner
    from llm_service.engine.fused_decoder import is_supported

FAST_PREFIX_MULTIPLE = 16  # tokens; in `fast` numerics prefixes are reused in parts of a block, however large it is
MAX_LOGPROBS = 20
ARITHMETIC_VERSION = 2  # of what the runners compute and in which shapes; part of the fingerprint


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that is being computed. `must_be_seen`: before the next one is scheduled."""

    scheduled: SchedulerOutput
    sampled: SampledTokens
    must_be_seen: bool


class LLMEngine:
    """`mrope_rule` is the rule behind the positions of all requests; KV blocks of another rule are never shared.

    `max_model_len` is what one request, prompt and answer, may really have: the configured number, the model's own
    (its sliding window, if it has one) or the KV memory, whichever is least.
    """

    def __init__(
        self,
        loaded: LoadedHalf,
        config: EngineConfig,
        *,
        numerics: Literal["exact", "fast"],
        eos_token_ids: frozenset[int],
        mrope_rule: MropeRule,
    ) -> None:
        exact = numerics == "exact"
        text_config = loaded.config.get_text_config()
        self.config = config
        self.vocab_size: int = text_config.vocab_size
        self.hidden_size: int = text_config.hidden_size
        self.model_max_len = model_max_len(text_config)
        self.model_runner = make_model_runner(loaded, config, exact=exact)
        num_kv_blocks = self.model_runner.num_kv_blocks
        self.num_kv_tokens = num_kv_blocks * config.block_size
        self.max_model_len = min(config.max_model_len, self.model_max_len, self.num_kv_tokens)
        self.kv_cache_manager = KVCacheManager(
            num_kv_blocks,
            config.block_size,
            prefix_multiple=prefix_multiple(config, exact=exact),
            position_rule=mrope_rule,
        )
        self.scheduler = Scheduler(
            config,
            self.kv_cache_manager,
            max_num_tokens=self.max_model_len,
            eos_token_ids=eos_token_ids,
            exact=exact,
        )
        self.sampler = Sampler(eos_token_ids)
        self.eos_token_ids = eos_token_ids
        self._requests: dict[str, Request] = {}  # the unfinished ones
        self._in_flight: _Launched | None = None

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def add_request(self, request: Request, forks: Sequence[Request] = ()) -> None:
        """Queues a request, and others that begin like it and wait until its prompt is computed: see `Scheduler.add()`.
        Raises InvalidRequestError if one of them can never be served as it is; then none is queued.
        """
        group = (request, *forks)
        for one in group:
            self._check(one)
            check_sampling_params(one.sampling_params, self.eos_token_ids, self.vocab_size)
        by_id = {one.request_id: one for one in group}
        if len(by_id) < len(group):
            raise ValueError(f"request {request.request_id} and its forks must have different ids")
        self._requests |= by_id
        self.scheduler.add(request, forks)

    def abort_request(self, request_id: str) -> None:
        """Forgets a request and frees its blocks; an unknown or finished one is no error."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.scheduler.abort(request)
            self._check_when_idle()

    def step(self) -> list[RequestOutput]:
        """Launches one batch and returns what is new of the one before, so that a GPU need not wait for the host."""
        scheduled = self.scheduler.schedule()
        # There is nothing to compute when all wait for their last token.
        launched = self._launch(scheduled) if scheduled.scheduled else None
        previous, self._in_flight = self._in_flight, launched
        outputs = self._collect(previous) if previous is not None else []
        if launched is not None and launched.must_be_seen:
            self._in_flight = None
            outputs += self._collect(launched)
        self._check_when_idle()
        return outputs

    def _launch(self, scheduled: SchedulerOutput) -> "_Launched":
        metrics.iteration_tokens.observe(sum(item.num_scheduled_tokens for item in scheduled.scheduled))
        logits_BV = self.model_runner.execute(scheduled)
        requests = scheduled.yielding_requests
        if len(requests) > len(logits_BV):
            logits_BV = logits_BV[scheduled.logits_rows]
        sampled = self.sampler.sample(logits_BV, requests)
        must_be_seen = not self.model_runner.is_asynchronous or any(request.must_see_tokens for request in requests)
        if not must_be_seen:
            self.model_runner.remember_tokens(sampled.token_ids_B, requests)
        return _Launched(scheduled, sampled, must_be_seen)

    def _collect(self, launched: "_Launched") -> list[RequestOutput]:
        token_ids = launched.sampled.token_ids()
        outputs = self.scheduler.update(launched.scheduled, token_ids, launched.sampled.logprobs())
        for output in outputs:
            if output.finish_reason is not None:
                del self._requests[output.request_id]
        return outputs

    def _check_when_idle(self) -> None:
        if not self._requests:
            self.kv_cache_manager.check_no_leak()

    def _check(self, request: Request) -> None:
        """Keeps from the batch what would fail, or spoil, the step of everybody."""
        num_tokens = request.num_prompt_tokens
        if num_tokens + 1 > self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens; with at least 1 token of answer it exceeds {self.max_model_len}, "
                f"the least of max_model_len {self.config.max_model_len}, the model's own {self.model_max_len}, and "
                f"num_kv_blocks {self.model_runner.num_kv_blocks} x block_size {self.config.block_size}",
                param="messages",
                code="context_length_exceeded",
            )
        name = f"request {request.request_id}"
        if request.request_id in self._requests:
            raise ValueError(f"{name} is already being served")
        if not num_tokens or not all(0 <= token < self.vocab_size for token in request.prompt_token_ids):
            raise ValueError(f"{name} must have tokens, all below {self.vocab_size}")
        if request.positions.shape != (3, num_tokens):
            raise ValueError(f"{name} has {num_tokens} tokens but positions of shape {tuple(request.positions.shape)}")
        end = 0
        for feature in request.mm_features:
            offset, length = feature.position.offset, feature.position.length
            if not end <= offset <= offset + length <= num_tokens:
                raise ValueError(f"{name} has an image at {offset} of length {length}, out of order or of its prompt")
            for rows_ND in (feature.embedding.features, *feature.embedding.deepstack):
                if rows_ND.shape != (length, self.hidden_size):
                    raise ValueError(
                        f"{name} has features of shape {tuple(rows_ND.shape)} for {length} placeholders of hidden size "
                        f"{self.hidden_size}"
                    )
            end = offset + length


def make_model_runner(loaded: LoadedHalf, config: EngineConfig, *, exact: bool) -> ModelRunner:
    """Of own kernels where there is a GPU and they know the layers, else of transformers' modules."""
    if loaded.device.type == "cuda" and is_supported(text_model_and_head(loaded.model)[0]):
        return CudaModelRunner(loaded, config, exact=exact)
    return TransformersRunner(loaded, config, exact=exact)


def prefix_multiple(config: EngineConfig, *, exact: bool) -> int:
    """Prompts share their beginnings in whole multiples of so many tokens: chunks in `exact`, else what divides a block
    and is no finer than a hash is worth."""
    return config.prefill_chunk_size if exact else math.gcd(config.block_size, FAST_PREFIX_MULTIPLE)


def model_max_len(text_config: Any) -> int:
    """Positions that the model knows, or its sliding window: up to there it is full attention."""
    num_positions: int = text_config.max_position_embeddings
    return min(num_positions, getattr(text_config, "sliding_window", None) or num_positions)


def check_sampling_params(params: SamplingParams, eos_token_ids: frozenset[int], vocab_size: int) -> None:
    """Raises InvalidRequestError for numbers that have no meaning, or that would leave no token to choose."""
    end_token_ids = params.end_token_ids(eos_token_ids)
    rules = {
        "temperature": (0 <= params.temperature < math.inf, "at least 0"),
        "top_p": (0 < params.top_p <= 1, "above 0 and at most 1"),
        "top_k": (params.top_k >= 0, "at least 0"),
        "min_p": (0 <= params.min_p <= 1, "from 0 to 1"),
        "repetition_penalty": (0.01 <= params.repetition_penalty <= 100, "from 0.01 to 100"),
        "presence_penalty": (-2 <= params.presence_penalty <= 2, "from -2 to 2"),
        "frequency_penalty": (-2 <= params.frequency_penalty <= 2, "from -2 to 2"),
        "seed": (params.seed is None or -(2**63) <= params.seed < 2**63, "a signed 64-bit integer"),
        "max_tokens": (params.max_tokens is None or params.max_tokens >= 1, "at least 1"),
        "min_tokens": (params.min_tokens >= 0, "at least 0"),
        "forced_token_ids": (
            all(0 <= token < vocab_size for token in params.forced_token_ids),
            f"some of the vocabulary of {vocab_size} tokens",
        ),
        "stop_token_ids": (
            all(0 <= token < vocab_size for token in params.stop_token_ids) and len(end_token_ids) < vocab_size,
            f"some of the vocabulary of {vocab_size} tokens",
        ),
        "logit_bias": (
            all(0 <= token < vocab_size and -100 <= bias <= 100 for token, bias in params.logit_bias),
            f"from -100 to 100 for ids below {vocab_size}",
        ),
        "logprobs": (params.logprobs is None or 0 <= params.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
    }
    for name, (holds, wanted) in rules.items():
        if not holds:
            raise InvalidRequestError(f"{name} must be {wanted}, not {getattr(params, name)!r}", param=name)
