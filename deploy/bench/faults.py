"""Redis servers in trouble: what the fault drills and `fovea bench cache --faults` put behind the cache."""

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import unquote, urlsplit

from common.config import MIB
from common.local_redis import LocalRedis, RedisRole

Faulty = Callable[[Path], AbstractContextManager[str]]

_ANYTHING = "+@all"
_CHUNK_BYTES = 64 * 1024


@contextmanager
def healthy(directory: Path) -> Iterator[str]:
    with _server(directory) as server:
        yield server.url


@contextmanager
def refused(directory: Path) -> Iterator[str]:
    """Nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield f"redis://127.0.0.1:{port}"


@contextmanager
def hung(directory: Path) -> Iterator[str]:
    """Accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def paused(directory: Path) -> Iterator[str]:
    """A server that was stopped."""
    with _server(directory) as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            yield server.url
        finally:
            os.kill(server.pid, signal.SIGCONT)


@contextmanager
def full(directory: Path) -> Iterator[str]:
    """Out of memory: every write is refused."""
    with _server(directory, max_bytes=MIB, policy="noeviction") as server:
        yield server.url


@contextmanager
def flushed(directory: Path) -> Iterator[str]:
    """Loses everything a hundred times a second."""
    with _server(directory) as server:
        ended = threading.Event()
        thread = threading.Thread(target=_flush_until, args=(server, ended), name="flush")
        thread.start()
        try:
            yield server.url
        finally:
            ended.set()
            thread.join()


@contextmanager
def slow(directory: Path, *, latency_s: float = 0.0, bytes_per_s: float = 0.0) -> Iterator[str]:
    """Behind a proxy that keeps every request for a while, and lets replies through at a rate."""
    with _server(directory) as server:
        # In a process of its own: as a thread it would take the interpreter's lock from those who are measured.
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_proxy, args=(_socket_of(server), latency_s, bytes_per_s, theirs))
        process.start()
        try:
            parts = urlsplit(server.url)
            yield f"redis://{parts.username}:{parts.password}@127.0.0.1:{ours.recv()}"
        finally:
            ours.send("end")
            process.join()
            for end in (ours, theirs):
                end.close()


FAULTS: dict[str, Faulty] = {
    "refused": refused,
    "hung": hung,
    "paused": paused,
    "full": full,
    "flushed": flushed,
    "1 ms": partial(slow, latency_s=0.001),
    "10 ms": partial(slow, latency_s=0.01),
    "100 ms": partial(slow, latency_s=0.1),
    "1 MB/s": partial(slow, bytes_per_s=1e6),
}


class FaultProxy:
    """A TCP proxy on loopback in front of a Unix socket, in a thread of its own. `latency_s` may be changed."""

    def __init__(self, upstream: Path, latency_s: float, bytes_per_s: float) -> None:
        self._upstream = upstream
        self.latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _close(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        up_reader, up_writer = await asyncio.open_unix_connection(str(self._upstream))
        forward = asyncio.ensure_future(self._forward(reader, up_writer, lambda: self.latency_s))
        try:
            with suppress(OSError, asyncio.CancelledError):
                await self._forward(up_reader, writer, lambda: 0.0)
        finally:
            forward.cancel()
            await asyncio.gather(forward, return_exceptions=True)
            for end in (writer, up_writer):
                end.close()
            self._connections.discard(task)

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, latency_s: Callable[[], float]
    ) -> None:
        """Every chunk leaves its time after it came, however many are under way."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sender = asyncio.ensure_future(self._send(under_way, writer))
        try:
            while chunk := await reader.read(_CHUNK_BYTES):
                under_way.put_nowait((time.monotonic() + latency_s(), chunk))
        finally:
            sender.cancel()

    async def _send(self, under_way: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        while True:
            due, chunk = await under_way.get()
            await asyncio.sleep(max(due - time.monotonic(), 0))
            writer.write(chunk)
            await writer.drain()
            if self._bytes_per_s:
                await asyncio.sleep(len(chunk) / self._bytes_per_s)


def _proxy(upstream: Path, latency_s: float, bytes_per_s: float, parent: Connection) -> None:
    with FaultProxy(upstream, latency_s, bytes_per_s) as proxy:
        parent.send(proxy.port)
        parent.recv()


@contextmanager
def _server(directory: Path, max_bytes: int = 256 * MIB, policy: str = "volatile-lfu") -> Iterator[LocalRedis]:
    server = LocalRedis(directory, max_bytes, RedisRole(policy, _ANYTHING))
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _flush_until(server: LocalRedis, ended: threading.Event) -> None:
    parts = urlsplit(server.url)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(_socket_of(server)))
        client.sendall(f"AUTH {parts.username} {parts.password}\r\n".encode())
        client.recv(100)
        while not ended.wait(0.01):
            client.sendall(b"FLUSHALL\r\n")
            client.recv(100)


def _socket_of(server: LocalRedis) -> Path:
    return Path(unquote(urlsplit(server.url).path))
