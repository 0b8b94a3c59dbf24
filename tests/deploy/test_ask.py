"""`fovea ask` about pictures and clips, against the two services in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from llm_service.api.app import create_app
from tests.clips import LOSSLESS, frames, png, video
from tests.conftest import serving
from tests.services import Services


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path) -> Iterator[str]:
    services = Services(tiny_checkpoint)
    with serving(create_app(services.llm)) as found:
        yield found
    services.llm.engine.shutdown()


def ask(url: str, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["ask", "--url", url, "--max-tokens", "2", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_clips_are_files_or_folders_of_frames_and_say_what_was_cached(url: str, tmp_path: Path) -> None:
    shown = frames(6, first=50)
    clip, folder, still = tmp_path / "clip.mp4", tmp_path / "frames", tmp_path / "still.png"
    clip.write_bytes(video(shown, **LOSSLESS))
    still.write_bytes(png(shown[0]))
    folder.mkdir()
    for index, image in enumerate(shown[:4]):
        (folder / f"{index:03}.png").write_bytes(png(image))
    output = ask(url, str(still), "What?", "--video", str(clip), "--video", str(folder), "--fps", "30")
    assert f"{still}: 6 tokens from encoder" in output
    assert f"{clip}: 18 tokens from encoder" in output and "6 frames, 0 of 3 pairs of frames from the cache" in output
    assert f"{folder}: 12 tokens from encoder" in output and "4 frames, 0 of 2 pairs" in output
    output = ask(url, "Where?", "--video", str(clip), "--num-frames", "6")
    assert "6 frames, 3 of 3 pairs of frames from the cache" in output
