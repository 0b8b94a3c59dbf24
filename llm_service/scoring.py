"""How likely a model says each of some answers to each of some questions about one input: one prefill, many forks.

The probability of an answer is that of its tokens and of the end after them. All answers to a question are forks of
its prompt, which share its KV blocks and logits; all prompts begin with the input, whose blocks the first one leaves.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llm_service.admission import ANYONE, RequestContext
from llm_service.chat import ChatMessage, VisualPart, visuals_of
from llm_service.engine.request import Request, SamplingParams
from llm_service.prompt import PLAIN
from llm_service.server import GenerationOptions, ImageReceipt, LLMServer, PreparedRequest


@dataclass(frozen=True, slots=True)
class Question:
    """`content` is asked after the input; `answers` are what the model may say."""

    content: list[str | VisualPart]
    answers: tuple[str, ...]


@dataclass(slots=True)
class Scores:
    """`logprobs` has, for each question, the natural logarithm of each answer's probability."""

    logprobs: list[list[float]]
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_answer_tokens: int = 0
    receipts: list[ImageReceipt] = field(default_factory=list)


async def score(
    server: LLMServer,
    messages: Sequence[ChatMessage],
    questions: Sequence[Question],
    request_id: str,
    context: RequestContext = ANYONE,
) -> Scores:
    """Raises InvalidRequestError, as any request with one of the questions would."""
    answers = [[_tokens(server, answer) for answer in question.answers] for question in questions]
    prepared = await _prepared(server, messages, questions, answers, request_id, context)
    scores = Scores([[] for _ in questions])
    input_images = len(visuals_of(messages))
    scores.receipts = prepared[0].receipts[:input_images]
    for one in prepared:
        scores.receipts += one.receipts[input_images:]
    first = asyncio.Event()

    async def ask(index: int) -> None:
        if index:
            await first.wait()  # the input is computed by then
        group = _forks(prepared[index].request, answers[index])
        scores.num_prompt_tokens += group[0].num_prompt_tokens
        scores.num_answer_tokens += sum(len(one.sampling_params.forced_token_ids) for one in group)
        logprobs = {one.request_id: 0.0 for one in group}
        try:
            async with context.limit(), contextlib.aclosing(server.engine.generate(group[0], group[1:])) as outputs:
                async for output in outputs:
                    context.release("prompt_tokens")
                    first.set()
                    logprobs[output.request_id] += sum(token.logprob for token in output.logprobs)
                    if output.request_id == group[0].request_id and output.finish_reason is not None:
                        scores.num_cached_tokens += output.num_cached_tokens
        finally:
            first.set()
        scores.logprobs[index] = list(logprobs.values())

    tasks = [asyncio.create_task(ask(index)) for index in range(len(questions))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    return scores


async def _prepared(
    server: LLMServer,
    messages: Sequence[ChatMessage],
    questions: Sequence[Question],
    answers: Sequence[Sequence[tuple[int, ...]]],
    request_id: str,
    context: RequestContext,
) -> list[PreparedRequest]:
    """One request for each question. What the input names is fetched, and its clips are decoded, once for all."""
    async with context.limit():
        messages = await _fetched(server, messages)
    prepared = []
    for index, question in enumerate(questions):
        options = GenerationOptions(temperature=0.0, max_tokens=max(map(len, answers[index])), logprobs=0)
        asked = _asked(messages, question)
        prepared.append(await server.prepare(asked, options, f"{request_id}-{index}", PLAIN, context))
    for question in questions:
        server.media.forget_clips(visuals_of(_asked(messages, question)), context)
    return prepared


async def _fetched(server: LLMServer, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """With the bytes of the images behind URLs."""
    parts = iter(await server.media.fetched(visuals_of(messages)))
    return [
        replace(message, content=[part if isinstance(part, str) else next(parts) for part in message.content])
        for message in messages
    ]


def _asked(messages: Sequence[ChatMessage], question: Question) -> list[ChatMessage]:
    """The question stands in the last message, if that is the user's."""
    *earlier, last = messages
    if last.role != "user":
        return [*messages, ChatMessage("user", question.content)]
    gap: list[str | VisualPart] = ["\n\n"] if last.content and isinstance(last.content[-1], str) else []
    return [*earlier, ChatMessage("user", [*last.content, *gap, *question.content])]


def _tokens(server: LLMServer, answer: str) -> tuple[int, ...]:
    """With the end; control tokens in it are text."""
    return (*server.prompt.tokenize_as_text(answer), server.prompt.end_token_id)


def _forks(request: Request, answers: Sequence[tuple[int, ...]]) -> list[Request]:
    """One request for each answer, which it has to give."""
    return [
        Request(
            request_id=f"{request.request_id}-{index}",
            prompt_token_ids=request.prompt_token_ids,
            positions=request.positions,
            next_position=request.next_position,
            sampling_params=SamplingParams(max_tokens=len(token_ids), logprobs=0, forced_token_ids=token_ids),
            mm_features=request.mm_features,
            cache_salt=request.cache_salt,
        )
        for index, token_ids in enumerate(answers)
    ]
