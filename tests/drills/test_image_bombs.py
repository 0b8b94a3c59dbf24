"""Bombs of `fovea bench bad-input` in a process of its own: each is a 400 and costs less than 64 MiB of memory."""

import json
import subprocess
import sys
from typing import Any

import pytest

from common.config import ImageLimits
from common.errors import InvalidRequestError
from common.media import image_header
from deploy.bench.image_bombs import BOMBS
from deploy.shapes import CHECKPOINT

_MEASURE = """
import json, sys
from pathlib import Path
from deploy.bench.bad_input import refusals
print(json.dumps(refusals(Path(sys.argv[1]), rounds=2)))
"""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """A case that is not answered with a 400 ends the process with an error."""
    child = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(CHECKPOINT)], capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
    return found


def test_every_bomb_is_refused_in_less_than_64_mib(rows: list[dict[str, Any]]) -> None:
    memory = {row["case"]: row["memory_mib"] for row in rows}
    assert set(BOMBS) <= set(memory)
    assert {case: mib for case, mib in memory.items() if mib >= 64} == {}


@pytest.mark.parametrize(
    ("bomb", "words"),
    [
        ("PNG 65535 x 65535, 1 bit", "65535 x 65535 = 4294836225 pixels, the limit is 64000000"),
        ("PNG of 300,000 chunks", "too many blocks around its pixels"),
        ("JPEG of 300,000 Exif segments", "too many blocks around its pixels"),
    ],
)
def test_the_reason_is_in_the_header(bomb: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        image_header(BOMBS[bomb](), ImageLimits())
