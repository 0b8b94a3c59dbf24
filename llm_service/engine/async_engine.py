"""The engine's thread, and `generate()` for the event loop. They meet at a queue and at `call_soon_threadsafe`."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from common import metrics
from common.errors import InvalidRequestError, ServingError, UnavailableError
from llm_service.engine.engine import LLMEngine
from llm_service.engine.request import FinishReason, Request, RequestOutput

logger = logging.getLogger(__name__)

T = TypeVar("T")


class AsyncLLMEngine:
    """Runs `engine.step()` on a thread of its own while there is work.

    Between `start()` and `shutdown()` only that thread touches the engine, but for the two gauges.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[_Add | _Abort | None] = queue.SimpleQueue()  # None: shut down
        self._streams: dict[str, _Stream] = {}  # the engine thread's, by request id
        self._thread = threading.Thread(target=self._run, name="llm-engine", daemon=True)
        self._failure: UnavailableError | None = UnavailableError("the engine is not started")
        self._load = LoadReport()

    @property
    def num_running(self) -> int:
        return len(self._engine.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._engine.scheduler.waiting) + self._commands.qsize()

    def start(self) -> None:
        self._failure = None
        self._thread.start()

    def shutdown(self) -> None:
        """Ends the thread after its current step; requests in flight end with UnavailableError."""
        if self._thread.is_alive():
            self._commands.put(None)
            self._thread.join()

    def check_health(self) -> None:
        """Raises UnavailableError, from its cause, when the engine's thread is not there to answer."""
        if self._failure is not None:
            raise UnavailableError(self._failure.message) from self._failure.__cause__

    async def generate(self, request: Request, forks: Sequence[Request] = ()) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of a request, and of others that begin like it (see `Scheduler.add()`), until all have finished.
        Those of one request that were not read yet come merged into one.

        Whatever `add_request()` raises is raised before the first output. Leaving early aborts the request; leave
        through `contextlib.aclosing()`, so that this happens at once.
        """
        stream = _Stream()
        self._commands.put(_Add(request, forks, stream))
        self.check_health()  # after put(): a thread that ends either sees the command or is seen here
        unfinished = {one.request_id for one in (request, *forks)}
        try:
            while unfinished:
                output = await stream.next()
                if output.finish_reason is not None:
                    unfinished.discard(output.request_id)
                if output.finish_reason is FinishReason.ERROR:
                    raise _error_of(output)
                yield output
        finally:
            for request_id in unfinished:
                self._commands.put(_Abort(request_id, stream))

    def abort(self, request_id: str) -> None:
        """Ends one request of a group early: `generate()` then yields its end without a token."""
        self._commands.put(_Abort(request_id, None))

    def _run(self) -> None:
        failure = UnavailableError("the engine is shut down")
        try:
            while self._apply_commands():
                self._deliver(self._engine.step())
                self._load.report(self._engine)
        except BaseException as exc:  # the thread would end in silence
            logger.exception("the engine thread failed with %d requests", len(self._streams))
            failure = UnavailableError("the engine has failed")
            failure.__cause__ = exc
        self._fail_all(failure)

    def _apply_commands(self) -> bool:
        """Takes what has arrived, and waits for more while there is nothing to compute. False: shut down."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_unfinished_requests())
            except queue.Empty:
                return True
            match command:
                case _Add():
                    self._add(command)
                case _Abort():
                    self._abort(command)
                case None:
                    return False

    def _add(self, command: "_Add") -> None:
        try:
            self._engine.add_request(command.request, command.forks)
        except (ServingError, ValueError) as exc:
            command.stream.send(exc)
        else:
            for request in (command.request, *command.forks):
                self._streams[request.request_id] = command.stream

    def _abort(self, command: "_Abort") -> None:
        stream = self._streams.get(command.request_id)
        # A request that was refused for its id must not abort the one that has it.
        if stream is None or command.stream not in (None, stream):
            return
        del self._streams[command.request_id]
        self._engine.abort_request(command.request_id)
        if command.stream is None:
            stream.send(RequestOutput(command.request_id, [], finish_reason=FinishReason.ABORT))

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """An event loop is woken once for all that is new: each time it takes the interpreter from this thread."""
        news: defaultdict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput]]] = defaultdict(list)
        for output in outputs:
            stream = self._streams[output.request_id]
            news[stream.loop].append((stream, output))
            if output.finish_reason is not None:
                del self._streams[output.request_id]
        for loop, found in news.items():
            _call(loop, _receive_all, found)

    def _fail_all(self, failure: UnavailableError) -> None:
        """Ends every request in flight, and refuses those to come."""
        self._failure = failure
        streams = list(self._streams.values())
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get(block=False)
                if isinstance(command, _Add):
                    streams.append(command.stream)
        for stream in streams:
            error = UnavailableError(failure.message)  # one each: a raised exception collects its raiser's frames
            error.__cause__ = failure.__cause__
            stream.send(error)


class LoadReport:
    """Tells dashboards how full the engine is: now and then, and whenever it becomes idle."""

    INTERVAL_S = 0.5

    def __init__(self) -> None:
        self._reported_at = -self.INTERVAL_S
        self._num_preemptions = 0

    def report(self, engine: LLMEngine) -> None:
        now = time.monotonic()
        if now - self._reported_at < self.INTERVAL_S and engine.has_unfinished_requests():
            return
        self._reported_at = now
        blocks = engine.kv_cache_manager
        metrics.num_requests_running.set(len(engine.scheduler.running))
        metrics.num_requests_waiting.set(len(engine.scheduler.waiting))
        metrics.kv_cache_usage.set(1 - blocks.num_available_blocks / blocks.num_blocks)
        metrics.num_preemptions.inc(engine.scheduler.num_preemptions - self._num_preemptions)
        self._num_preemptions = engine.scheduler.num_preemptions


class _Stream:
    """One request's outputs on their way from the engine thread to the event loop that made it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._outputs: dict[str, RequestOutput] = {}  # by request, in order of arrival
        self._error: Exception | None = None

    def send(self, item: RequestOutput | Exception) -> None:
        """Called by the engine thread."""
        _call(self.loop, self.receive, item)

    async def next(self) -> RequestOutput:
        """All that is new of one request, as one output; what arrived before an error comes before it."""
        await self._arrived.wait()
        if not self._outputs:
            assert self._error is not None
            raise self._error
        output = self._outputs.pop(next(iter(self._outputs)))
        if not self._outputs and self._error is None:
            self._arrived.clear()
        return output

    def receive(self, item: RequestOutput | Exception) -> None:
        if isinstance(item, Exception):
            self._error = item
        elif (unread := self._outputs.get(item.request_id)) is None:
            self._outputs[item.request_id] = item
        else:
            token_ids, logprobs = unread.token_ids + item.token_ids, unread.logprobs + item.logprobs
            self._outputs[item.request_id] = replace(item, token_ids=token_ids, logprobs=logprobs)
        self._arrived.set()


@dataclass(frozen=True, slots=True)
class _Add:
    request: Request
    forks: Sequence[Request]
    stream: _Stream


@dataclass(frozen=True, slots=True)
class _Abort:
    """`stream` is that of a reader who has left; None when the reader wants to see the end."""

    request_id: str
    stream: _Stream | None


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[T], None], argument: T) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
        loop.call_soon_threadsafe(function, argument)


def _receive_all(news: "list[tuple[_Stream, RequestOutput]]") -> None:
    for stream, output in news:
        stream.receive(output)


def _error_of(output: RequestOutput) -> ServingError:
    if output.error is not None:
        return InvalidRequestError(f"the answer cannot be finished: {output.error}", code="grammar_limit")
    return ServingError("the model's logits are not finite", code="non_finite_logits")
