"""Server-sent events: every stream ends in a finish or an error, so that a cut one never looks complete."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from common import metrics
from common.errors import ServingError
from llm_service.api.errors import anthropic_error_body, error_body

logger = logging.getLogger(__name__)

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
KEEP_ALIVE_S = 5.0
KEEP_ALIVE = ": keep-alive\n\n"


def event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


def typed_event(payload: dict[str, Any]) -> str:
    """With its `type` as the name of the event."""
    return f"event: {payload['type']}\n{event(payload)}"


@dataclass(frozen=True, slots=True)
class Framing:
    """How an API frames its chunks, ends a stream and says that it cannot go on."""

    event: Callable[[dict[str, Any]], str]
    error: Callable[[ServingError], dict[str, Any]]
    end: str = ""


OPENAI = Framing(event, error_body, "data: [DONE]\n\n")
ANTHROPIC = Framing(typed_event, anthropic_error_body)


class Stream:
    """Events of one answer, with comments while there is none and an error event if they end in an exception."""

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], framing: Framing = OPENAI) -> None:
        self._chunks = chunks
        self._framing = framing
        self._next: asyncio.Task[dict[str, Any]] | None = None

    async def wait_for_first(self, timeout_s: float = KEEP_ALIVE_S) -> None:
        """Returns when the first chunk is there or the time is up; raises what came before it.

        So an early failure still has a status code.
        """
        self._next = asyncio.ensure_future(anext(self._chunks))
        try:
            done, _ = await asyncio.wait([self._next], timeout=timeout_s)
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if done and (exc := self._next.exception()) is not None:
            raise exc

    async def events(self) -> AsyncIterator[str]:
        is_whole = False
        try:
            while True:
                if self._next is None:
                    self._next = asyncio.ensure_future(anext(self._chunks))
                done, _ = await asyncio.wait([self._next], timeout=KEEP_ALIVE_S)
                if not done:
                    yield KEEP_ALIVE
                    continue
                chunk, self._next = self._next.result(), None
                yield self._framing.event(chunk)
        except StopAsyncIteration:
            is_whole = True
            if self._framing.end:
                yield self._framing.end
        except ServingError as exc:
            yield self._error(exc)
        except Exception:  # the headers are gone; without an event the answer would look complete
            logger.exception("a stream ended in an unexpected error")
            yield self._error(ServingError("internal error"))
        finally:
            if not is_whole:
                metrics.streams_cut.inc()
            await self.aclose()

    async def aclose(self) -> None:
        """Stops the answer, wherever it is; its generator's `finally` aborts the request in the engine."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait([self._next])
        await self._chunks.aclose()

    def _error(self, error: ServingError) -> str:
        return self._framing.event(self._framing.error(error)) + self._framing.end
