"""One connection to a Redis server for values of megabytes: blocking, in RESP2, and without copies.

A value is received by `recv_into` straight into an object of its exact size, and sent from where it lies. Every call
ends within the time it is given, whatever the server does. Not thread-safe; after any error but RedisReplyError close
the connection.
"""

import io
import select
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

Argument = bytes | memoryview
Reply = bytes | int | None | list["Reply"]

_MAX_COPIED_BYTES = 16 * 1024  # larger arguments are sent from where they are
_BUFFER_BYTES = 16 * 1024  # of each connection; larger values are not received through it
_MAX_LINE_BYTES = 64 * 1024
_MAX_ITEMS = 1_000_000
_MAX_DEPTH = 4


class RedisReplyError(Exception):
    """The server understood and refused: it is there, and the connection may be used again."""


class RedisProtocolError(Exception):
    """What was received is not what a Redis server answers to what was asked."""


@dataclass(frozen=True, slots=True)
class RedisEndpoint:
    """Where a server listens, and as whom to speak to it. `path` is that of a Unix socket."""

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    tls: ssl.SSLContext | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0

    def connect(self, timeout_s: float) -> socket.socket:
        if self.path is not None:
            connected = socket.socket(socket.AF_UNIX)
            connected.settimeout(timeout_s)
            try:
                connected.connect(self.path)
            except BaseException:
                connected.close()
                raise
            return connected
        connected = socket.create_connection((self.host, self.port), timeout_s)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connected if self.tls is None else self.tls.wrap_socket(connected, server_hostname=self.host)

    def greeting(self) -> list[Sequence[Argument]]:
        """The commands that a new connection begins with."""
        commands: list[Sequence[Argument]] = []
        if self.password is not None:
            user = [self.username.encode()] if self.username is not None else []
            commands.append([b"AUTH", *user, self.password.encode()])
        if self.db:
            commands.append([b"SELECT", b"%d" % self.db])
        return commands


class RedisConnection:
    """Raises OSError when the server cannot be reached, hangs or does not let us in."""

    def __init__(self, endpoint: RedisEndpoint, *, connect_timeout_s: float, silence_s: float) -> None:
        """`silence_s` is how long nothing at all may arrive while a reply is awaited."""
        self.endpoint = endpoint
        self._socket = endpoint.connect(connect_timeout_s)
        self._incoming = _Incoming(self._socket, silence_s, time.monotonic() + silence_s)
        # A large read leaves out the buffer and goes into a bytes object of the right size: not one byte is copied.
        self._replies = io.BufferedReader(self._incoming, _BUFFER_BYTES)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        try:
            self._greet(endpoint)
        except BaseException:
            self.close()
            raise

    def call(self, *command: Argument, limit_s: float, max_bytes: int = 0) -> Reply:
        """Sends a command and returns the reply, in which a longer string than `max_bytes` is an error."""
        self._incoming.deadline = time.monotonic() + limit_s
        self._send([command], limit_s)
        return self._receive(max_bytes)

    def is_stale(self) -> bool:
        """Whether the server has hung up since the last call, or has said something that nobody asked for."""
        return bool(self._poll.poll(0))

    def close(self) -> None:
        self._replies.close()
        self._socket.close()

    def _greet(self, endpoint: RedisEndpoint) -> None:
        commands = endpoint.greeting()
        if not commands:
            return
        self._send(commands, self._incoming.silence_s)
        for _ in commands:
            try:
                self._receive(0)
            except RedisReplyError as exc:
                raise ConnectionRefusedError(f"the server does not let us in: {exc}") from exc

    def _send(self, commands: Sequence[Sequence[Argument]], limit_s: float) -> None:
        self._socket.settimeout(limit_s)  # of each sendall() as a whole
        copied = bytearray()
        for command in commands:
            copied += b"*%d\r\n" % len(command)
            for argument in command:
                copied += b"$%d\r\n" % len(argument)
                if len(argument) > _MAX_COPIED_BYTES:
                    self._socket.sendall(copied)
                    self._socket.sendall(argument)
                    copied.clear()
                else:
                    copied += argument
                copied += b"\r\n"
        self._socket.sendall(copied)

    def _receive(self, max_bytes: int, depth: int = 0) -> Reply:
        line = self._replies.readline(_MAX_LINE_BYTES)
        kind, rest = line[:1], line[1:-2]
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("the server hung up") if not line else RedisProtocolError("not a line of RESP")
        if kind == b"+":
            return rest
        if kind == b"-":
            raise RedisReplyError(rest.decode(errors="replace"))
        number = _number(rest)
        if kind == b":":
            return number
        if kind == b"$":
            return self._receive_string(number, max_bytes) if number >= 0 else None
        if kind == b"*" and number <= _MAX_ITEMS and depth < _MAX_DEPTH:
            return [self._receive(max_bytes, depth + 1) for _ in range(number)] if number >= 0 else None
        raise RedisProtocolError(f"{line[:20]!r} is not the reply of a Redis server")

    def _receive_string(self, num_bytes: int, max_bytes: int) -> bytes:
        # The length is checked before it is believed: the next line allocates as much.
        if num_bytes > max_bytes:
            raise RedisProtocolError(f"a string of {num_bytes} bytes where at most {max_bytes} were asked for")
        value = self._replies.read(num_bytes)
        if len(value) < num_bytes or self._replies.read(2) != b"\r\n":
            raise ConnectionResetError("the server hung up inside a string")
        return value


class _Incoming(io.RawIOBase):
    """What arrives on a socket, until the deadline, and at no time with a longer silence than `silence_s`."""

    def __init__(self, connected: socket.socket, silence_s: float, deadline: float) -> None:
        self._socket = connected
        self.silence_s = silence_s
        self.deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # BufferedReader passes memoryviews
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the reply took too long")
        self._socket.settimeout(min(left, self.silence_s))
        return self._socket.recv_into(buffer)


def _number(digits: bytes) -> int:
    if not digits.removeprefix(b"-").isdigit() or len(digits) > 20:
        raise RedisProtocolError(f"{digits[:20]!r} is not a number")
    return int(digits)
