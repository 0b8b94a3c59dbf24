"""Server-sent events: every stream ends in a finish or an error, so that a cut one never looks complete."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from common import metrics
from common.errors import ServingError
from llm_service.api.errors import anthropic_error_body, error_body

logger = logging.getLogger(__name__)

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
KEEP_ALIVE_S = 5.0
KEEP_ALIVE = b": keep-alive\n\n"

_MAX_UNSENT = 64  # events for a slow client; what the engine makes after them is merged until there is room


def event(payload: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % to_json(payload)


def typed_event(payload: dict[str, Any]) -> bytes:
    """With its `type` as the name of the event."""
    return b"event: %b\n%b" % (payload["type"].encode(), event(payload))


@dataclass(frozen=True, slots=True)
class Framing:
    """How an API frames its chunks, ends a stream and says that it cannot go on."""

    event: Callable[[dict[str, Any]], bytes]
    error: Callable[[ServingError], dict[str, Any]]
    end: bytes = b""


OPENAI = Framing(event, error_body, b"data: [DONE]\n\n")
ANTHROPIC = Framing(typed_event, anthropic_error_body)


class Stream:
    """Events of one answer, with comments while there is none and an error event if they end in an exception.

    It reads its chunks from now on; those that are there at once go out in one write.
    """

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], framing: Framing = OPENAI) -> None:
        self._chunks = chunks
        self._framing = framing
        self._unsent: list[bytes] = []
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._is_quiet = True
        self._timer = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._keep_alive)
        # one task and one timer for the whole answer: for each chunk they would cost more than the chunk
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(lambda _: self._has_news.set())

    async def wait_for_first(self, timeout_s: float = KEEP_ALIVE_S) -> None:
        """Returns when the first chunk is there or the time is up; raises what came before it.

        So an early failure still has a status code.
        """
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._has_news.wait()
            if self._reader.done() and not self._unsent:
                self._reader.result()
        except BaseException:
            await self.aclose()
            raise

    async def events(self) -> AsyncIterator[bytes]:
        is_whole = False
        try:
            while self._unsent or not self._reader.done():
                if self._unsent:
                    events, self._unsent = self._unsent, []
                    self._has_room.set()
                    yield b"".join(events)
                else:
                    self._has_news.clear()
                    await self._has_news.wait()
            self._reader.result()
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
        self._timer.cancel()
        self._reader.cancel()
        await asyncio.wait([self._reader])
        await self._chunks.aclose()

    async def _read(self) -> None:
        async for chunk in self._chunks:
            self._send(self._framing.event(chunk))
            while len(self._unsent) >= _MAX_UNSENT:
                self._has_room.clear()
                await self._has_room.wait()

    def _send(self, event: bytes) -> None:
        self._unsent.append(event)
        self._has_news.set()
        self._is_quiet = False

    def _keep_alive(self) -> None:
        if self._is_quiet and not self._unsent:
            self._send(KEEP_ALIVE)
        self._is_quiet = True
        self._timer = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._keep_alive)

    def _error(self, error: ServingError) -> bytes:
        return self._framing.event(self._framing.error(error)) + self._framing.end


class StreamResponse(StreamingResponse):
    """Stops the answer when the client leaves, even before the first event."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream.events(), media_type="text/event-stream", headers=HEADERS)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stream.aclose()
