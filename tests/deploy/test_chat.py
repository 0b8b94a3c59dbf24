"""`fovea chat`: a conversation typed at a terminal, against a service on a socket."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deploy.chat import pictures_in
from deploy.cli import app
from deploy.client import ClientError
from deploy.service import free_port
from tests.conftest import picture

Talk = Callable[..., Result]


@pytest.fixture
def talk(url: str, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Types these lines, then Ctrl-D."""

    def run(*lines: str, arguments: tuple[str, ...] = ()) -> Result:
        typed = iter(lines)

        def next_line(prompt: str) -> str:
            for line in typed:
                return line
            raise EOFError

        monkeypatch.setattr("builtins.input", next_line)
        return CliRunner().invoke(app, ["chat", *arguments, "--url", url, "--max-tokens", "3"], catch_exceptions=False)

    return run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    path.write_bytes(picture(70, 84, 77))
    return path


def test_picture_in_a_question_is_sent_and_the_conversation_goes_on(talk: Talk, image: Path) -> None:
    said = talk(f"What is in '{image}' then?", "And now?")
    assert f"{image}: 6 tokens from encoder in " in said.stdout
    assert "1 of 1 pictures from the cache" in said.stdout
    assert said.stdout.count("tokens from") == 1  # later answers name new pictures only


def test_pictures_of_the_command_line_wait_for_the_first_question(talk: Talk, image: Path) -> None:
    said = talk("/drop", "What?", arguments=(str(image),))
    assert "a picture.png will be sent with the question" in said.stdout
    assert "pictures from the cache" not in said.stdout


def test_new_forgets_the_conversation(talk: Talk, image: Path) -> None:
    said = talk(f"What is '{image}'?", "/new", "What?")
    assert said.stdout.count("pictures from the cache") == 1


def test_refusal_and_missing_file_leave_the_conversation_as_it_was(talk: Talk, image: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    said = talk(f"What is {tmp_path}/broken.png", "/new", f"See {tmp_path}/missing.png", "/what", "Well?")
    assert "missing.png: no such file" in said.stdout and "/what is not a command" in said.stdout
    assert said.exit_code == 0 and said.stdout.count(" tokens in ") == 1


def test_words_that_look_like_pictures_are_paths() -> None:
    assert pictures_in("compare a.png and 'b c.JPG'?") == ([Path("a.png"), Path("b c.JPG")], "compare and")
    assert pictures_in("it's nice") == ([], "it's nice")
    assert pictures_in("what's in a.png") == ([Path("a.png")], "what's in")


def test_without_a_service_it_says_how_to_start_one() -> None:
    error = CliRunner().invoke(app, ["chat", "--url", f"http://127.0.0.1:{free_port()}"]).exception
    assert isinstance(error, ClientError) and "fovea up" in str(error)
