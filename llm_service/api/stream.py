"""Server-sent events: every stream ends in a finish or an error, so that a cut one never looks complete."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from common.errors import ServingError

logger = logging.getLogger(__name__)

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
KEEP_ALIVE_S = 5.0

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"


def event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error_body(error: ServingError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


class Stream:
    """Events of one answer, with comments while there is none and an error event if they end in an exception."""

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        self._chunks = chunks
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
        try:
            while True:
                if self._next is None:
                    self._next = asyncio.ensure_future(anext(self._chunks))
                done, _ = await asyncio.wait([self._next], timeout=KEEP_ALIVE_S)
                if not done:
                    yield KEEP_ALIVE
                    continue
                chunk, self._next = self._next.result(), None
                yield event(chunk)
        except StopAsyncIteration:
            yield DONE
        except ServingError as exc:
            yield event(error_body(exc)) + DONE
        except Exception:  # the headers are gone; without an event the answer would look complete
            logger.exception("a stream ended in an unexpected error")
            yield event(error_body(ServingError("internal error"))) + DONE
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Stops the answer, wherever it is; its generator's `finally` aborts the request in the engine."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait([self._next])
        await self._chunks.aclose()
