"""`fovea config`: what it prints is what is in force, and can be used."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deploy import configuration
from deploy.app import AppConfig
from deploy.cli import app
from deploy.service import ServiceError, application_of


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["config", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def written(directory: Path, **args: Any) -> str:
    file = directory / "serve.yaml"
    file.write_text(yaml.safe_dump({"applications": [{"name": "fovea", "args": args}]}))
    return str(file)


def test_example_has_every_field_at_its_default() -> None:
    example = yaml.safe_load(printed("example"))
    assert AppConfig.model_validate(application_of(example)["args"]) == AppConfig()
    assert [deployment["name"] for deployment in application_of(example)["deployments"]] == ["encoder", "llm"]


def test_example_says_what_every_field_means() -> None:
    text = printed("example")
    for section in AppConfig().model_dump().values():
        assert all(f"{name}:" in text for name in section)
    assert "# tokens in one KV block; at least 1\n" in text


def test_shown_configuration_deploys_the_same(tmp_path: Path) -> None:
    file = written(tmp_path, engine={"max_num_seqs": 7})
    shown = application_of(yaml.safe_load(printed("show", "--config", file)))
    assert AppConfig.model_validate(shown["args"]).engine.max_num_seqs == 7
    assert shown["args"]["engine"]["block_size"] == AppConfig().engine.block_size


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    secret, password = "0123456789abcdef-secret", "the-password"
    cache = {"secret": secret, "redis_url": f"redis://user:{password}@host:6379/0"}
    shown = printed("show", "--config", written(tmp_path, cache=cache))
    assert secret not in shown and password not in shown and "redis://user:**********@host:6379/0" in shown


def test_schema_is_that_of_the_arguments() -> None:
    assert json.loads(printed("schema"))["properties"].keys() == AppConfig.model_fields.keys()


def test_wrong_field_is_named_with_its_limit() -> None:
    config = {"applications": [{"name": "fovea", "args": {"engine": {"block_size": 0}, "cash": {}}}]}
    with pytest.raises(ServiceError, match=r"args\.engine\.block_size: .* greater than or equal to 1; args\.cash: "):
        configuration.checked(config)
