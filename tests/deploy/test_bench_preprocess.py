"""The benchmark of preprocessing measures all three, and says how they compare."""

from typing import get_args

import pytest

from common.config import ImageBackend
from deploy.bench.preprocess import preprocessing_rows


def test_each_size_has_a_row_for_each_image_backend_and_one_for_transformers() -> None:
    rows = preprocessing_rows([56, 60], rounds=3)
    assert [(row["side"], row["by"]) for row in rows] == [
        (side, by) for side in (56, 60) for by in (*get_args(ImageBackend), "transformers")
    ]
    for ours, _, transformers in (rows[:3], rows[3:]):
        assert transformers["speed"] == 1
        assert ours["patches"] == ours["resize"] + ours["patchify"]
        assert ours["speed"] == pytest.approx(transformers["patches"] / ours["patches"])
