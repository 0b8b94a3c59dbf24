"""Who computes how many tokens in this step: continuous batching of prefill and decode in one forward."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llm_service.config import EngineConfig
from llm_service.engine.kv_cache import KVCacheManager
from llm_service.engine.request import FinishReason, Request, RequestOutput, RequestStatus, TokenLogprobs

logger = logging.getLogger(__name__)


class ScheduledRequest(NamedTuple):
    """Tokens `start` to `start + num_scheduled_tokens` of a request are computed in this step. It yields a token if the
    last of them is the request's last, so that its logits say the next one.
    """

    request: Request
    start: int
    num_scheduled_tokens: int
    yields_token: bool

    @property
    def num_context_tokens(self) -> int:
        """Tokens whose keys and values exist after the step."""
        return self.start + self.num_scheduled_tokens


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """`block_copies` are pairs of KV blocks, from and to, to copy before the forward: all are read before one is
    written.
    """

    scheduled: list[ScheduledRequest]
    block_copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def yielding_requests(self) -> list[Request]:
        """Those that get a token; forks stand behind the request whose prompt, and so whose logits, are theirs."""
        items = (item for item in self.scheduled if item.yields_token)
        return [request for item in items for request in (item.request, *item.request.forks)]

    @property
    def logits_rows(self) -> list[int]:
        """For each yielding request its row among the logits, which have one for each item that yields."""
        items = (item for item in self.scheduled if item.yields_token)
        return [row for row, item in enumerate(items) for _ in range(1 + len(item.request.forks))]


class Scheduler:
    """First come, first served; the only one to touch the queues.

    A step may be scheduled before the tokens of the last one are known: they are *pending*, and only what they are is
    unknown. Should one of them end its request, what the step computes behind it is thrown away.

    `running` is in order of arrival. A request gets the blocks of all its known tokens when it is admitted, so only
    growing answers run out of them; then the newest request is preempted: it loses its blocks and is computed anew.
    A request is admitted together with its forks, which start to run when its prompt is computed.

    `exact` keeps the bits of every row independent of company and interruption. A prompt is cut at multiples of
    `prefill_chunk_size`, each chunk whole or not at all; only whole prompt chunks are shared as prefixes; and tokens
    that were generated before a preemption are computed again one at a time, as decode wrote them.
    """

    def __init__(
        self,
        config: EngineConfig,
        kv_cache_manager: KVCacheManager,
        *,
        max_num_tokens: int,
        eos_token_ids: frozenset[int],
        exact: bool,
    ) -> None:
        self.config = config
        self.kv_cache_manager = kv_cache_manager
        self.max_num_tokens = max_num_tokens  # of one request, prompt and answer
        self.eos_token_ids = eos_token_ids
        self.exact = exact
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request, forks: Sequence[Request] = ()) -> None:
        """Queues a request. `forks` begin like it and wait until its prompt is computed: those with the very same
        prompt then share all of it, those with a longer one what they can reuse of it as a prefix.
        """
        for fork in forks:
            (request.forks if fork.has_prompt_of(request) else request.followers).append(fork)
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        if request.status is RequestStatus.RUNNING or request in self.waiting:
            self._leave_queue(request)
        else:  # it waits for another one's prompt
            for other in (*self.waiting, *self.running):
                other.forks = [fork for fork in other.forks if fork is not request]
                other.followers = [follower for follower in other.followers if follower is not request]
        self._finish(request, FinishReason.ABORT)
        self._hand_over(request)

    def schedule(self) -> SchedulerOutput:
        """Gives running requests their tokens and blocks, then admits waiting ones while both last."""
        num_preemptions = self.num_preemptions
        scheduled, budget = self._schedule_running(self.config.max_num_batched_tokens)
        if self.num_preemptions == num_preemptions:  # else the blocks are not even enough for those that run
            scheduled += self._schedule_waiting(budget)
        output = SchedulerOutput(scheduled, self.kv_cache_manager.take_copies())
        for item in scheduled:
            item.request.num_computed_tokens = item.num_context_tokens
        for request in output.yielding_requests:
            request.num_pending_tokens += 1
        return output

    def update(
        self,
        output: SchedulerOutput,
        token_ids: Sequence[int | None],
        logprobs: Sequence[TokenLogprobs | None] | None = None,
    ) -> list[RequestOutput]:
        """Books a computed step; `token_ids` belong to its yielding requests, None where no token could be chosen."""
        yielding = output.yielding_requests
        for item in output.scheduled:
            self._keep_prefix(item)
        for request in yielding:
            if request.forks or request.followers:
                self._start_forks(request)
        tokens = zip(yielding, token_ids, logprobs or [None] * len(yielding), strict=True)
        return [self._append(*token) for token in tokens if token[0].status is not RequestStatus.FINISHED]

    def _schedule_running(self, budget: int) -> tuple[list[ScheduledRequest], int]:
        """What the running requests compute, and how much of the budget is left."""
        scheduled: list[ScheduledRequest] = []
        for request in list(self.running):
            if request.status is not RequestStatus.RUNNING:  # preempted for an older one just now
                break
            num_tokens = self._num_next_tokens(request, budget)
            if num_tokens and self._make_room(request, request.num_computed_tokens + num_tokens):
                budget -= num_tokens
                scheduled.append(self._scheduled(request, num_tokens))
        return scheduled, budget

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Preempts from the tail until `request` has its blocks; False when that was the request itself."""
        while not self.kv_cache_manager.allocate(request, num_tokens):
            if self._preempt_newest() is request:
                return False
        return True

    def _schedule_waiting(self, budget: int) -> list[ScheduledRequest]:
        scheduled: list[ScheduledRequest] = []
        num_free_seats = self.config.max_num_seqs - sum(1 + len(request.forks) for request in self.running)
        while self.waiting:
            request = self.waiting[0]
            num_seats = min(1 + len(request.forks), self.config.max_num_seqs)
            num_tokens = self._try_admit(request, budget) if num_seats <= num_free_seats else 0
            if not num_tokens:
                break  # nobody overtakes
            budget -= num_tokens
            num_free_seats -= num_seats
            self.running.append(self.waiting.popleft())
            scheduled.append(self._scheduled(request, num_tokens))
        return scheduled

    def _scheduled(self, request: Request, num_tokens: int) -> ScheduledRequest:
        start, num_known = request.num_computed_tokens, request.num_tokens + request.num_pending_tokens
        return ScheduledRequest(request, start, num_tokens, yields_token=start + num_tokens == num_known)

    def _try_admit(self, request: Request, budget: int) -> int:
        """The tokens of its first step, or 0 with nothing changed when budget or blocks do not allow one."""
        if not budget or request.num_pending_tokens:
            return 0
        # The last token is always computed, so that there are logits to choose the next one from.
        if self.config.enable_prefix_caching:
            self.kv_cache_manager.share_prefix(request, self._num_reusable_tokens(request) - 1)
        prefix = request.num_computed_tokens
        num_tokens = self._num_next_tokens(request, budget)
        if not num_tokens or not self.kv_cache_manager.allocate(request, request.num_tokens):
            self._release(request)
            return 0
        if request.status is RequestStatus.WAITING:
            request.num_cached_tokens = prefix
            request.first_scheduled_at = time.perf_counter()
        request.status = RequestStatus.RUNNING
        return num_tokens

    def _num_next_tokens(self, request: Request, budget: int) -> int:
        computed = request.num_computed_tokens
        if request.num_pending_tokens and self._ends_at_length(request, request.num_pending_tokens):
            return 0
        if not self.exact:
            return min(request.num_tokens + request.num_pending_tokens - computed, budget)
        if computed >= request.num_prompt_tokens:
            return min(1, budget)
        num_tokens = min(request.num_prompt_tokens - computed, self.config.prefill_chunk_size)
        return num_tokens if num_tokens <= budget else 0

    def _num_reusable_tokens(self, request: Request) -> int:
        return request.num_prompt_tokens if self.exact else request.num_tokens

    def _keep_prefix(self, item: ScheduledRequest) -> None:
        request = item.request
        # A request that was stopped or preempted since the step was launched has no blocks any more.
        if self.config.enable_prefix_caching and item.num_context_tokens <= request.num_computed_tokens:
            limit = self._num_reusable_tokens(request)
            self.kv_cache_manager.keep_prefix(request, min(item.start, limit), min(item.num_context_tokens, limit))

    def _start_forks(self, request: Request) -> None:
        """Lets run, next to a request whose prompt has just been computed, those that waited for it."""
        forks, request.forks = request.forks, []
        place = self.running.index(request) + 1 if forks else 0
        num_free_seats = self.config.max_num_seqs - len(self.running)
        for fork in forks[:num_free_seats]:
            self.kv_cache_manager.fork(request, fork, request.num_prompt_tokens)
            fork.status = RequestStatus.RUNNING
        self.running[place:place] = forks[:num_free_seats]
        for fork in forks[num_free_seats:]:
            fork.status = (
                RequestStatus.PREEMPTED
            )  # it gets its first token now, and computes its prompt when it may run
        for fork in forks:
            fork.num_cached_tokens = request.num_cached_tokens
        self._queue_in_front([*forks[num_free_seats:], *request.followers])
        request.followers = []

    def _hand_over(self, request: Request) -> None:
        """Lets somebody else compute the prompt that the forks of an aborted request wait for."""
        waiting, request.forks = request.forks, []
        followers, request.followers = request.followers, []
        if waiting:
            waiting[0].forks, waiting[0].followers = waiting[1:], followers
        self._queue_in_front(waiting[:1] or followers)

    def _queue_in_front(self, requests: list[Request]) -> None:
        self.waiting.extendleft(reversed(requests))

    def _append(self, request: Request, token_id: int | None, logprobs: TokenLogprobs | None) -> RequestOutput:
        request.num_pending_tokens -= 1
        error = None
        if token_id is None:
            self.kv_cache_manager.forget(request)
        elif request.grammar is not None and not request.grammar.accept(token_id):
            token_id, error = None, "its grammar takes more work at this point of the answer than is allowed"
        else:
            request.output_token_ids.append(token_id)
        reason = FinishReason.ERROR if token_id is None else self._finish_reason(request, token_id)
        if reason is not None:
            self._leave_queue(request)
            self._finish(request, reason)
        return RequestOutput(
            request.request_id,
            [] if token_id is None else [token_id],
            finish_reason=reason,
            num_cached_tokens=request.num_cached_tokens,
            logprobs=[] if token_id is None or logprobs is None else [logprobs],
            error=error,
        )

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.sampling_params
        if token_id in params.end_token_ids(self.eos_token_ids):
            return FinishReason.STOP
        if request.grammar is not None and request.grammar.is_finished:
            return FinishReason.STOP
        return FinishReason.LENGTH if self._ends_at_length(request, 0) else None

    def _ends_at_length(self, request: Request, num_more_tokens: int) -> bool:
        max_tokens = request.sampling_params.max_tokens
        return (
            len(request.output_token_ids) + num_more_tokens == max_tokens
            or request.num_tokens + num_more_tokens == self.max_num_tokens
        )

    def _preempt_newest(self) -> Request:
        request = self.running.pop()
        logger.info("request %s is preempted after %d tokens", request.request_id, request.num_computed_tokens)
        self._release(request)
        request.status = RequestStatus.PREEMPTED
        self.waiting.appendleft(request)
        self.num_preemptions += 1
        return request

    def _leave_queue(self, request: Request) -> None:
        (self.running if request.status is RequestStatus.RUNNING else self.waiting).remove(request)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._release(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason

    def _release(self, request: Request) -> None:
        self.kv_cache_manager.free(request)
        request.num_computed_tokens = 0
