"""What dashboards are told of one request on its way through the engine."""

import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from common import metrics
from common.tracing import Stages
from llm_service.engine.request import Request, RequestOutput


@dataclass(slots=True)
class _Answer:
    """One of the answers to a prompt: its tokens so far, and when the last of them came."""

    num_tokens: int = 0
    last_at: float = 0.0


async def observed(
    outputs: AsyncGenerator[RequestOutput, None], request: Request
) -> AsyncGenerator[RequestOutput, None]:
    """The same outputs, counted and timed; they may be those of several answers to the request's prompt.

    One that holds several tokens shares its time among them.
    """
    started = time.perf_counter()
    stages = Stages("prefill", request_id=request.request_id, prompt_tokens=request.num_prompt_tokens)
    answers: defaultdict[str, _Answer] = defaultdict(_Answer)
    metrics.prompt_tokens.inc(request.num_prompt_tokens)
    metrics.request_prompt_tokens.observe(request.num_prompt_tokens)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(stages.end)
        await stack.enter_async_context(contextlib.aclosing(outputs))
        async for output in outputs:
            now = time.perf_counter()
            if output.token_ids and not answers:
                metrics.time_to_first_token_seconds.observe(now - started)
                metrics.prefix_cache_queries.inc(request.num_prompt_tokens)
                metrics.prefix_cache_hits.inc(output.num_cached_tokens)
                stages.next("decode")
            _count(answers[output.request_id], output, started, now)
            yield output


def _count(answer: _Answer, output: RequestOutput, started: float, now: float) -> None:
    num_tokens = len(output.token_ids)
    if num_tokens and answer.num_tokens:
        metrics.inter_token_latency_seconds.observe((now - answer.last_at) / num_tokens)
    metrics.generation_tokens.inc(num_tokens)
    answer.num_tokens += num_tokens
    answer.last_at = now
    if output.finish_reason is not None:
        metrics.request_success.inc(tags={"finished_reason": str(output.finish_reason)})
        metrics.request_generation_tokens.observe(answer.num_tokens)
        metrics.e2e_request_latency_seconds.observe(now - started)
