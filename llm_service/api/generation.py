"""One answer of any endpoint: prepared, generated piece by piece, counted. Endpoints only put it into their words."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from llm_service.api.door import context_of
from llm_service.api.fields import name_ignored
from llm_service.api.stream import OPENAI, Framing, Stream, StreamResponse
from llm_service.chat import ChatMessage, Tool, visuals_of
from llm_service.engine.request import FinishReason, RequestOutput, TokenLogprobs
from llm_service.prompt import PLAIN, TemplateOptions
from llm_service.server import GenerationOptions, ImageReceipt, LLMServer, PreparedRequest
from llm_service.tool_calls import ToolCallDelta, ToolCallParser

LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in answer `index`. Its last one has the finish reason: `stop`, `length` or `tool_calls`.

    `stop_string` is the one that ended it, if one did. `logprobs` has the tokens of the text, if they were asked for.
    """

    index: int = 0
    text: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.tool_calls or self.token_ids or self.finish_reason)


@dataclass(slots=True)
class MadeCall:
    """A call of a tool; `arguments` is JSON, as the model wrote it."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """The whole of one."""

    text: str = ""
    tool_calls: list[MadeCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    finish_reason: str = ""
    stop_string: str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        for call in delta.tool_calls:
            if call.name is not None:
                self.tool_calls.append(MadeCall(call.name))
            self.tool_calls[call.index].arguments += call.arguments
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_string = delta.finish_reason, delta.stop_string


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools an answer may call; `max_calls` None is any number."""

    tools: tuple[Tool, ...] = ()
    max_calls: int | None = None


class Generation:
    """One request on its way through the server. `id` is never the caller's, who may use one twice."""

    def __init__(self, server: LLMServer, http: Request, prefix: str) -> None:
        self.server = server
        self.http = http
        self.id = f"{prefix}{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._context = context_of(http)
        self._started = time.perf_counter()
        self._durations_ms: dict[str, float] = {}
        self._prepared: PreparedRequest | None = None
        self._tools = ToolUse()

    @property
    def prepared(self) -> PreparedRequest:
        assert self._prepared is not None
        return self._prepared

    async def prepare(
        self,
        messages: Sequence[ChatMessage],
        options: GenerationOptions,
        template: TemplateOptions = PLAIN,
        max_calls: int | None = None,
    ) -> None:
        """The answer may call the template's tools."""
        prepared = await self.server.prepare(messages, options, self.id, template, self._context)
        self.server.media.forget_clips(visuals_of(messages), self._context)
        self._tools = ToolUse(template.tools, max_calls)
        self._note_prepared(prepared)

    async def prepare_text(self, token_ids: Sequence[int], options: GenerationOptions) -> None:
        self._note_prepared(await self.server.prepare_text(token_ids, options, self.id, self._context))

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Each answer ends with a finish reason, or this raises."""
        unfinished = set(range(self.prepared.num_choices))
        parsers = [ToolCallParser(self._tools.max_calls) for _ in unfinished] if self._tools.tools else None
        async with contextlib.aclosing(self.server.generate(self.prepared)) as outputs:
            async for output in outputs:
                if output.index not in unfinished:  # it has made all the calls that were wanted
                    continue
                self._note(output)
                delta = self._delta(output, None if parsers is None else parsers[output.index])
                if not delta.is_empty:
                    yield delta
                if delta.finish_reason is not None:
                    unfinished.remove(output.index)
                if not unfinished:
                    return

    async def answers(self) -> list[Answer]:
        answers = [Answer() for _ in range(self.prepared.num_choices)]
        async with contextlib.aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                answers[delta.index].add(delta)
        return answers

    def call_id(self, place: int, index: int = 0, prefix: str = "call_") -> str:
        """Of the call of a tool at a place in answer `index`."""
        return f"{prefix}{self.id[-24:]}{index:x}{place}"

    def usage(self) -> dict[str, Any]:
        """OpenAI's, for what there is so far. `images`: where each embedding came from, what it cost and how long this
        request waited for it; `answer_source` if the answer itself is one that was given before.
        """
        prepared = self.prepared
        answer_source = {"answer_source": "cache"} if prepared.known_answer is not None else {}
        return answer_source | {
            "prompt_tokens": prepared.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": prepared.num_prompt_tokens + self.num_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.num_cached_tokens,
                "cache_write_tokens": self.num_cache_write_tokens,
                "image_tokens": prepared.num_image_tokens,
                "video_tokens": prepared.num_video_tokens,
                "text_tokens": prepared.num_prompt_tokens - prepared.num_image_tokens - prepared.num_video_tokens,
            },
            "images": image_receipts(prepared.receipts),
        }

    @property
    def num_cache_write_tokens(self) -> int:
        """Prompt tokens whose KV blocks another prompt may find from now on."""
        if self.prepared.known_answer is not None:
            return 0
        return max(0, self.server.num_kept_tokens(self.prepared.num_prompt_tokens) - self.num_cached_tokens)

    def server_timing(self) -> dict[str, str]:
        """The header of that name: the longest waits for the cache and for the encoder, queue and prefill, and all."""
        durations = self._durations_ms | {"total": (time.perf_counter() - self._started) * 1000}
        return {"server-timing": ", ".join(f"{name};dur={ms:.1f}" for name, ms in durations.items())}

    def _delta(self, output: RequestOutput, parser: ToolCallParser | None) -> Delta:
        text, calls = (output.text, []) if parser is None else parser.add(output.text)
        reason = _openai_reason(output.finish_reason)
        if parser is not None:
            text += parser.flush() if reason is not None else ""
            if parser.is_full or (reason == "stop" and parser.num_calls):
                reason = "tool_calls"
        logprobs = list(zip(output.token_ids, output.logprobs, strict=False))
        if reason == "stop" and logprobs and logprobs[-1][0] in self.server.eos_token_ids:
            logprobs.pop()  # it ends the text and is not one of its tokens
        return Delta(output.index, text, calls, output.token_ids, logprobs, reason, output.stop_string)

    def _note_prepared(self, prepared: PreparedRequest) -> None:
        for image in prepared.receipts:
            name = "encode" if image.source == "encoder" else "cache"
            self._durations_ms[name] = max(image.wait_ms, self._durations_ms.get(name, 0.0))
        self._prepared = prepared
        self._prepared_at = time.perf_counter()

    def _note(self, output: RequestOutput) -> None:
        self.num_tokens += len(output.token_ids)
        self.num_cached_tokens = output.num_cached_tokens
        if output.token_ids:  # the queue and the prefill, at the first one
            self._durations_ms.setdefault("prefill", (time.perf_counter() - self._prepared_at) * 1000)


def image_receipts(receipts: Sequence[ImageReceipt]) -> list[dict[str, Any]]:
    """Of each image and clip where its embedding came from, what that cost, and of how many tokens it kept these."""
    return [
        {
            "id": image.id,
            "tokens": image.tokens,
            "source": image.source,
            "bytes": image.num_bytes,
            "encode_ms": round(image.encode_ms, 3),
            "wait_ms": round(image.wait_ms, 3),
            **_clip_fields(image),
            **({"whole_tokens": image.whole_tokens, "reduction": image.reduction} if image.reduction else {}),
        }
        for image in receipts
    ]


def _clip_fields(image: ImageReceipt) -> dict[str, int]:
    if not image.grids:
        return {}
    return {"frames": image.frames, "grids": image.grids, "cached_grids": image.cached_grids}


async def respond(
    generation: Generation,
    ignored: list[str],
    *,
    stream: bool,
    whole: Callable[[], Awaitable[dict[str, Any]]],
    chunks: Callable[[], AsyncGenerator[dict[str, Any], None]],
    framing: Framing = OPENAI,
) -> Response:
    """The answer as one body or as a stream of chunks. An early failure of a stream still has a status code."""
    response: Response
    if stream:
        events = Stream(chunks(), framing)
        await events.wait_for_first()
        response = StreamResponse(events)
    else:
        response = JSONResponse(await whole())
    response.headers.update(generation.server_timing())
    name_ignored(response, ignored)
    return response


def _openai_reason(reason: FinishReason | None) -> str | None:
    """Only `stop` and `length` are answers; anything else must not look like one."""
    if reason is None:
        return None
    assert reason in (FinishReason.STOP, FinishReason.LENGTH), reason
    return reason.value


@dataclass(slots=True)
class Block:
    """A piece of an answer that APIs with typed content open, fill and close: its text, or one call of a tool."""

    index: int
    call_index: int | None = None
    name: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """`fragment` is what a `delta` adds to the block. At the `finish` there is no block, but the last delta."""

    kind: Literal["start", "delta", "stop", "finish"]
    block: Block
    fragment: str = ""
    delta: Delta = Delta()


async def blocks(deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[BlockEvent, None]:
    """The deltas of an answer as blocks one after another, then one finish."""
    block: Block | None = None
    num_blocks = 0
    async with contextlib.aclosing(deltas):
        async for delta in deltas:
            for piece in (ToolCallDelta(-1, None, delta.text), *delta.tool_calls):
                is_text = piece.index < 0
                if is_text and not piece.arguments:
                    continue
                if block is None or piece.name is not None or (is_text and block.call_index is not None):
                    if block is not None:
                        yield BlockEvent("stop", block)
                    block = Block(num_blocks, None if is_text else piece.index, piece.name or "")
                    num_blocks += 1
                    yield BlockEvent("start", block)
                if piece.arguments:
                    block.text += piece.arguments
                    yield BlockEvent("delta", block, piece.arguments)
            if delta.finish_reason is not None:
                if block is not None:
                    yield BlockEvent("stop", block)
                yield BlockEvent("finish", Block(num_blocks), delta=delta)
