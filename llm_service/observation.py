"""What dashboards are told of one request on its way through the engine."""

import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from common import metrics
from common.tracing import Stages
from llm_service.engine.request import Request, RequestOutput
from llm_service.features import ImageRequest


@dataclass(slots=True)
class _Answer:
    """One of the answers to a prompt: its tokens so far, and when the first and the last of them came."""

    num_tokens: int = 0
    first_at: float = 0.0
    last_at: float = 0.0


async def observed(
    outputs: AsyncGenerator[RequestOutput, None], request: Request, *, arrived_at: float | None, num_answers: int
) -> AsyncGenerator[RequestOutput, None]:
    """The same outputs, counted and timed; they may be those of several answers to the request's prompt.

    One that holds several tokens shares its time among them. `arrived_at` is of `time.perf_counter()`, by default now.
    """
    queued_at = time.perf_counter()
    arrived_at = queued_at if arrived_at is None else arrived_at
    stages = Stages("prefill", request_id=request.request_id, prompt_tokens=request.num_prompt_tokens)
    answers: defaultdict[str, _Answer] = defaultdict(_Answer)
    metrics.prompt_tokens.inc(request.num_prompt_tokens)
    metrics.request_prompt_tokens.observe(request.num_prompt_tokens)
    metrics.request_params_n.observe(num_answers)
    if request.sampling_params.max_tokens is not None:
        metrics.request_params_max_tokens.observe(request.sampling_params.max_tokens)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(stages.end)
        await stack.enter_async_context(contextlib.aclosing(outputs))
        async for output in outputs:
            now = time.perf_counter()
            begun_at = request.first_scheduled_at or queued_at
            if output.token_ids and not answers:
                metrics.time_to_first_token_seconds.observe(now - arrived_at)
                metrics.request_queue_time_seconds.observe(begun_at - queued_at)
                metrics.request_prefill_time_seconds.observe(now - begun_at)
                metrics.prefix_cache_queries.inc(request.num_prompt_tokens)
                metrics.prefix_cache_hits.inc(output.num_cached_tokens)
                stages.next("decode")
            answer = answers[output.request_id]
            _count(answer, output, now)
            if output.finish_reason is not None:
                metrics.request_success.inc(tags={"finished_reason": str(output.finish_reason)})
                metrics.request_generation_tokens.observe(answer.num_tokens)
                metrics.request_decode_time_seconds.observe(now - answer.first_at)
                metrics.request_inference_time_seconds.observe(now - begun_at)
                metrics.e2e_request_latency_seconds.observe(now - arrived_at)
            yield output


def _count(answer: _Answer, output: RequestOutput, now: float) -> None:
    num_tokens = len(output.token_ids)
    if not answer.num_tokens:
        answer.first_at = now
    elif num_tokens:
        metrics.inter_token_latency_seconds.observe((now - answer.last_at) / num_tokens)
    metrics.generation_tokens.inc(num_tokens)
    answer.num_tokens += num_tokens
    answer.last_at = now


def count_known_answer(images: Sequence[ImageRequest]) -> None:
    """Images whose embeddings were not needed are found ones, as receipts and the page have it."""
    for image in images:
        metrics.images.inc(tags={"source": "answer", "tenant": image.item.tenant})
        metrics.mm_cache_queries.inc()
        metrics.mm_cache_hits.inc()
