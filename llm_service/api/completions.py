"""POST /v1/completions: OpenAI's completions of plain text or token ids, without images."""

import asyncio
import codecs
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, ClassVar, Self

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from common.errors import InvalidRequestError
from llm_service.api.fields import StreamingRequest, TokenId
from llm_service.api.generation import LEAST_LOGPROB, Answer, Delta, Generation, respond
from llm_service.detokenizer import TokenTexts
from llm_service.engine.engine import MAX_LOGPROBS
from llm_service.engine.request import TokenLogprobs
from llm_service.server import GenerationOptions, LLMServer

_MAX_PROMPTS = 16
_DEFAULT_MAX_TOKENS = 16  # OpenAI's

TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(StreamingRequest):
    """The fields that are honoured. Others are refused by name, harmless, or ignored and named in a header."""

    model: str
    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=_MAX_PROMPTS)]
    max_tokens: int | None = Field(_DEFAULT_MAX_TOKENS, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True

    not_honoured: ClassVar = StreamingRequest.not_honoured | {"suffix": ("",)}

    def options(self) -> GenerationOptions:
        return dataclasses.replace(super().options(), logprobs=self.logprobs)

    @model_validator(mode="after")
    def _prompt_has_no_logprobs(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise InvalidRequestError("logprobs are those of the answer, they exclude echo", param="logprobs")
        return self

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


def create_router(server: LLMServer) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        ignored = body.check()
        server.check_model(body.model)
        completion = Completion(server, body, http)
        return await respond(
            completion.generations[0], ignored, stream=body.stream, whole=completion.whole, chunks=completion.chunks
        )

    return router


class Completion:
    """The answers to each prompt, in OpenAI's words, whole or in chunks."""

    def __init__(self, server: LLMServer, body: CompletionRequest, http: Request) -> None:
        self._server = server
        self._body = body
        self._prompts = body.prompts()
        self.generations = [Generation(server, http, "cmpl-") for _ in self._prompts]

    async def whole(self) -> dict[str, Any]:
        echoes = await self._prepare()
        answers = [Answer(text=echo) for echo in echoes]
        async with contextlib.aclosing(self._deltas()) as deltas:
            async for index, delta in deltas:
                answers[index].add(delta)
        choices = []
        for index, answer in enumerate(answers):
            choice = _choice(index, answer.text, answer.finish_reason)
            choices.append(choice | self._tokens(_Offsets(self._server.token_texts), answer))
        return self._object(choices) | {"usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The text of all prompts as it comes, one finish of each, and the usage if it was asked for."""
        echoes = await self._prepare()
        for index, echo in enumerate(echoes):
            if echo:
                yield self._object([_choice(index, echo, None)]) | self._usage_so_far()
        offsets = [_Offsets(self._server.token_texts) for _ in echoes]
        async with contextlib.aclosing(self._deltas()) as deltas:
            async for index, delta in deltas:
                if not (delta.text or delta.finish_reason or delta.logprobs or self._body.return_token_ids):
                    continue
                choice = _choice(index, delta.text, delta.finish_reason) | self._tokens(offsets[index], delta)
                yield self._object([choice]) | self._usage_so_far()
        if self._body.with_usage:
            yield self._object([]) | {"usage": self._usage()}

    async def _deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """With the number of its choice: those of the first prompt come first."""
        num_choices = self.generations[0].prepared.num_choices
        async with contextlib.aclosing(interleaved([one.deltas() for one in self.generations])) as deltas:
            async for prompt, delta in deltas:
                yield prompt * num_choices + delta.index, delta

    async def _prepare(self) -> list[str]:
        """What is to be said before each choice."""
        options = self._body.options()
        echoes = []
        for prompt, generation in zip(self._prompts, self.generations, strict=True):
            if isinstance(prompt, str):
                token_ids = await self._server.tokenize(prompt, add_special_tokens=self._body.add_special_tokens)
                text = prompt
            else:
                token_ids, text = prompt, self._server.prompt.detokenize(prompt) if self._body.echo else ""
            await generation.prepare_text(token_ids, options)
            echoes += [text if self._body.echo else ""] * options.n
        return echoes

    def _tokens(self, offsets: "_Offsets", new: Answer | Delta) -> dict[str, Any]:
        """What was asked for of the tokens themselves."""
        logprobs = {"logprobs": offsets.logprobs(new.logprobs)} if self._body.logprobs is not None else {}
        return logprobs | ({"token_ids": new.token_ids} if self._body.return_token_ids else {})

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        first = self.generations[0]
        return {
            "id": first.id,
            "object": "text_completion",
            "created": first.created,
            "model": self._body.model,
            "choices": choices,
            "system_fingerprint": first.prepared.fingerprint,
        }

    def _usage_so_far(self) -> dict[str, Any]:
        if self._body.with_continuous_usage:
            return {"usage": self._usage()}
        return {"usage": None} if self._body.with_usage else {}

    def _usage(self) -> dict[str, Any]:
        """Of all answers together."""
        usages = [generation.usage() for generation in self.generations]
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        details = {
            name: sum(usage["prompt_tokens_details"][name] for usage in usages)
            for name in usages[0]["prompt_tokens_details"]
        }
        return {name: sum(usage[name] for usage in usages) for name in names} | {"prompt_tokens_details": details}


class _Offsets:
    """Where the tokens of one choice begin in its text; one that ends inside a character adds nothing to it yet."""

    def __init__(self, token_texts: TokenTexts) -> None:
        self._token_texts = token_texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def logprobs(self, tokens: Sequence[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        """The next tokens in the form of completions. `top_logprobs` has the chosen token, too, likely or not."""
        return {
            "tokens": [self._text(token_id) for token_id, _ in tokens],
            "token_logprobs": [max(one.logprob, LEAST_LOGPROB) for _, one in tokens],
            "top_logprobs": [
                {
                    self._text(token): max(logprob, LEAST_LOGPROB)
                    for token, logprob in ((token_id, one.logprob), *one.top)
                }
                for token_id, one in tokens
            ],
            "text_offset": [self._pass(token_id) for token_id, _ in tokens],
        }

    def _pass(self, token_id: int) -> int:
        offset = self._offset
        self._offset += len(self._decoder.decode(self._token_texts(token_id)))
        return offset

    def _text(self, token_id: int) -> str:
        return self._token_texts(token_id).decode(errors="replace")


async def interleaved(sources: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """What each source yields, with its number, as it comes. Leaving closes them all."""
    waiting = {asyncio.ensure_future(anext(source)): index for index, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                with contextlib.suppress(StopAsyncIteration):
                    delta = task.result()
                    waiting[asyncio.ensure_future(anext(sources[index]))] = index
                    yield index, delta
    finally:
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting)
        for source in sources:
            await source.aclose()


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
