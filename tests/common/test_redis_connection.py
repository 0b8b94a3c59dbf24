import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from common.config import MIB
from common.local_redis import LocalRedis
from common.redis_connection import RedisConnection, RedisEndpoint, RedisProtocolError, RedisReplyError


@contextmanager
def connected(endpoint: RedisEndpoint, silence_s: float = 1.0) -> Iterator[RedisConnection]:
    connection = RedisConnection(endpoint, connect_timeout_s=1.0, silence_s=silence_s)
    try:
        yield connection
    finally:
        connection.close()


@pytest.fixture
def server(local_redis: LocalRedis) -> RedisEndpoint:
    parts = urlsplit(local_redis.url)
    return RedisEndpoint(path=unquote(parts.path), username=parts.username, password=parts.password)


@contextmanager
def peer(*chunks: bytes, pause_s: float = 0.0, tls: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[bytes]]]:
    """The port of a server that answers whatever arrives with `chunks`, and what arrived."""
    received: list[bytes] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                self.request.settimeout(5.0)
                stream = self.request if tls is None else tls.wrap_socket(self.request, server_side=True)
                with stream:
                    while data := stream.recv(65536):
                        received.append(data)
                        for chunk in chunks:
                            stream.sendall(chunk)
                            time.sleep(pause_s)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield listening.server_address[1], received
        finally:
            listening.shutdown()
            thread.join()


def ask(port: int, *, limit_s: float = 1.0, max_bytes: int = 100, **endpoint: object) -> object:
    with connected(RedisEndpoint(host="127.0.0.1", port=port, **endpoint)) as connection:  # type: ignore[arg-type]
        return connection.call(b"GETRANGE", b"k", b"0", b"99", limit_s=limit_s, max_bytes=max_bytes)


@pytest.mark.redis
def test_a_value_is_written_and_read_without_a_copy(server: RedisEndpoint) -> None:
    value = bytes(8 * MIB)
    with connected(server) as connection:
        connection.call(b"PING", limit_s=1.0)
        tracemalloc.start()
        assert connection.call(b"SET", b"fovea:k", value, b"PX", b"60000", limit_s=5.0) == b"OK"
        _, sending = tracemalloc.get_traced_memory()
        read = connection.call(b"GETRANGE", b"fovea:k", b"0", b"-1", limit_s=5.0, max_bytes=len(value))
        _, receiving = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert read == value
    assert sending < 64 * 1024
    assert receiving < len(value) + 64 * 1024


@pytest.mark.redis
def test_a_refusal_leaves_the_connection_usable(server: RedisEndpoint) -> None:
    with connected(server) as connection:
        with pytest.raises(RedisReplyError, match="NOPERM"):
            connection.call(b"FLUSHALL", limit_s=1.0)
        assert connection.call(b"PING", limit_s=1.0) == b"PONG"
        assert not connection.is_stale()


@pytest.mark.redis
def test_a_server_that_hung_up_is_noticed_before_the_next_call(local_redis: LocalRedis, server: RedisEndpoint) -> None:
    with connected(server) as connection:
        local_redis.stop()
        assert connection.is_stale()
    local_redis.start()


def test_user_password_and_database_are_sent_before_anything_else() -> None:
    with peer(b"+OK\r\n+OK\r\n$1\r\nx\r\n") as (port, received):
        assert ask(port, username="fovea", password="secret", db=3) == b"x"
    greeting = b"*3\r\n$4\r\nAUTH\r\n$5\r\nfovea\r\n$6\r\nsecret\r\n*2\r\n$6\r\nSELECT\r\n$1\r\n3\r\n"
    assert received[0].startswith(greeting)


def test_a_password_is_not_shown() -> None:
    assert "secret" not in repr(RedisEndpoint(password="secret"))


def test_a_server_that_does_not_let_us_in_is_a_connection_error() -> None:
    with peer(b"-WRONGPASS invalid\r\n") as (port, _), pytest.raises(ConnectionRefusedError, match="WRONGPASS"):
        ask(port, password="wrong")


def test_a_tcp_connection_does_not_wait_to_send() -> None:
    with peer() as (port, _), RedisEndpoint(host="127.0.0.1", port=port).connect(1.0) as connected_socket:
        assert connected_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("length", [101, 10**9, 2**40, 2**63, 10**19])
def test_an_announced_length_is_refused_before_it_is_allocated(length: int) -> None:
    with peer(b"$%d\r\n" % length) as (port, _):
        tracemalloc.start()
        with pytest.raises(RedisProtocolError, match="at most 100 were asked for"):
            ask(port)
        assert tracemalloc.get_traced_memory()[1] < MIB
        tracemalloc.stop()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$x\r\n", b"$\r\n", b"$1_0\r\n", b"$ 1\r\n", b"*9999999999\r\n",
        b"*1\r\n" * 10, b"~1\r\n:1\r\n", b"x" * 100_000, b"$" + b"9" * 50 + b"\r\n",
    ],
)  # fmt: skip
def test_what_is_not_resp_is_an_error(answer: bytes) -> None:
    with peer(answer) as (port, _), pytest.raises(RedisProtocolError):
        ask(port)


@pytest.mark.parametrize("limit_s", [0.1, 0.3])
def test_a_reply_that_drips_ends_with_the_call(limit_s: float) -> None:
    with peer(b"$100\r\n", *[b"x"] * 100, pause_s=0.02) as (port, _):
        started = time.perf_counter()
        with pytest.raises(TimeoutError):
            ask(port, limit_s=limit_s)
        assert time.perf_counter() - started < limit_s + 0.2


def test_a_reply_in_pieces_is_put_together() -> None:
    with peer(*(b"%c" % byte for byte in b"*3\r\n$5\r\nhello\r\n:-7\r\n$-1\r\n"), pause_s=0.001) as (port, _):
        assert ask(port) == [b"hello", -7, None]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    directory = tmp_path_factory.mktemp("tls")
    made, key = directory / "cert.pem", directory / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, *names, "-out", made, "-keyout", key], check=True, capture_output=True)
    return made, key


def test_tls_is_spoken_and_the_certificate_is_checked(certificate: tuple[Path, Path]) -> None:
    made, key = certificate
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(made, key)
    value = bytes(300_000)
    with peer(b"$300000\r\n" + value + b"\r\n", tls=theirs) as (port, received):
        assert ask(port, max_bytes=300_000, tls=ssl.create_default_context(cafile=made)) == value
        assert received[0].startswith(b"*4\r\n")
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(port, tls=ssl.create_default_context())
