"""`fovea media` and `fovea cache` against a service on a socket, without Ray."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deploy.cli import app
from deploy.client import ClientError
from deploy.service import free_port
from tests.conftest import picture

Fovea = Callable[..., Result]


@pytest.fixture
def fovea(url: str) -> Fovea:
    """Runs a command; an error that would be one line on stderr is the result's exception."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [*map(str, arguments), "--url", url])

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    for seed in range(4):
        (tmp_path / ("inner" if seed % 2 else "") / f"{seed}.png").write_bytes(picture(60, 60, 100 + seed))
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_pictures_are_added_shown_listed_and_removed(fovea: Fovea, folder: Path) -> None:
    lines = fovea("media", "add", folder / "0.png", folder / "2.png", "--prewarm").stdout.splitlines()
    ids = [line.split()[0] for line in lines]
    assert len(set(ids)) == 2 and lines[0].endswith("4 tokens  " + str(folder / "0.png"))
    assert fovea("media", "add", folder / "0.png").stdout.split()[0] == ids[0]
    shown = fovea("media", "show", ids[0]).stdout
    assert 'tiers    ["local"]' in shown and "tokens   4" in shown
    assert sorted(one["id"] for one in json.loads(fovea("media", "list", "--json").stdout)) == sorted(ids)
    assert "60 x 60 png, 4 tokens, local, until" in fovea("media", "list").stdout
    assert fovea("media", "rm", *ids).stdout.count("is gone") == 2
    assert fovea("media", "list").stdout == "0 media, 0 bytes\n"


def test_warming_skips_what_is_there(fovea: Fovea, folder: Path) -> None:
    fovea("cache", "purge")
    fovea("media", "add", folder / "0.png", "--prewarm")
    assert "4 pictures in" in (first := fovea("cache", "warm", folder)).stdout
    assert "1 cached, 3 encoder" in first.stdout
    assert "4 cached" in fovea("cache", "warm", folder).stdout


def test_warming_goes_on_after_a_bad_picture_and_says_which(fovea: Fovea, folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"no picture")
    result = fovea("cache", "warm", folder)
    assert result.exit_code == 1
    assert "1 failed" in result.stdout
    assert f"{folder / 'bad.png'}: the data is not an image" in result.stderr


def test_what_was_exported_and_purged_is_there_again_after_the_import(
    fovea: Fovea, folder: Path, tmp_path: Path
) -> None:
    fovea("cache", "purge")
    fovea("cache", "warm", folder)
    file = tmp_path / "embeddings.fvex"
    assert fovea("cache", "export", file).stdout.startswith("4 embeddings, ")
    assert fovea("cache", "purge").stdout == "4 embeddings purged\n"
    assert fovea("cache", "import", file).stdout == "4 embeddings imported\n"
    assert "4 cached" in fovea("cache", "warm", folder).stdout


def test_stats_show_both_stores_and_the_counters(fovea: Fovea) -> None:
    shown = fovea("cache", "stats").stdout
    assert "local  entries " in shown and "redis  none" in shown and "media  address in process" in shown
    assert "fovea_embedding_cache_misses_total" in shown
    assert json.loads(fovea("cache", "stats", "--json").stdout)["object"] == "cache"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["media", "show", "nothing"], "there are no media 'nothing'"),
        (["media", "rm", "nothing"], "there are no media 'nothing'"),
        (["media", "add", "nowhere.png"], "nowhere.png: No such file"),
        (["media", "add", __file__], "not an image of a supported format"),
        (["cache", "warm", "nowhere"], "nowhere is not a folder"),
        (["cache", "import", __file__], "is no export"),
        (["cache", "import", "nowhere"], "nowhere: No such file"),
        (["cache", "export", "nowhere/file"], "nowhere/file: No such file"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_errors_are_one_line(fovea: Fovea, arguments: list[str], words: str) -> None:
    error = fovea(*arguments).exception
    assert isinstance(error, ClientError)  # main() prints it
    assert words in str(error) and "\n" not in str(error)


def test_service_that_is_not_there_is_named() -> None:
    error = CliRunner().invoke(app, ["media", "list", "--url", f"http://127.0.0.1:{free_port()}"]).exception
    assert isinstance(error, ClientError) and "start one with `fovea up`" in str(error)


@pytest.mark.parametrize("by", ["option", "environment"])
def test_service_with_keys_is_managed_with_one(
    by: str, url_with_keys: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ["--api-key", "secret"] if by == "option" else []
    if by == "environment":
        monkeypatch.setenv("FOVEA_API_KEY", "secret")

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [*map(str, arguments), "--url", url_with_keys, *key])

    media_id = run("media", "add", folder / "0.png").stdout.split()[0]
    commands = [
        ("media", "list"), ("media", "show", media_id), ("media", "rm", media_id), ("cache", "warm", folder),
        ("cache", "stats"), ("cache", "export", tmp_path / "file"), ("cache", "purge"),
        ("cache", "import", tmp_path / "file"),
    ]  # fmt: skip
    assert [run(*command).exit_code for command in commands] == [0] * len(commands)


def test_missing_key_is_asked_for(url_with_keys: str) -> None:
    for command in (["media", "list"], ["cache", "stats"], ["cache", "export", "nowhere"]):
        error = CliRunner().invoke(app, [*command, "--url", url_with_keys]).exception
        assert isinstance(error, ClientError) and "give --api-key or set FOVEA_API_KEY" in str(error)
