"""What an image becomes, from its size alone, is what transformers' own processors make of its pixels."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import (
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
)

from common.checkpoint import load_config, load_geometry
from common.errors import InvalidRequestError
from common.families import FAMILIES
from common.geometry import AnyresGeometry, ImageGeometry
from tests.tiny_families import write_tiny_family

TILE = 336
PINPOINTS = [list(sides) for sides in itertools.product(range(TILE, 7 * TILE, TILE), repeat=2)]


def sizes(count: int, most: int = 3000) -> Iterator[tuple[int, int]]:
    rng = random.Random(0)
    random_sizes = [(rng.randint(1, most), rng.randint(1, most)) for _ in range(count)]
    for height, width in [(1, 1), (TILE, TILE), (1, 200), (200, 1), *random_sizes]:
        if max(height, width) <= 200 * min(height, width):
            yield height, width


def num_tokens(geometry: ImageGeometry, height: int, width: int) -> int:
    return geometry.num_tokens(geometry.grid(height, width, min_pixels=0, max_pixels=0))


def anyres(model_type: str, **config: Any) -> ImageGeometry:
    vision = SimpleNamespace(model_type="siglip_vision_model", image_size=TILE, patch_size=14)
    text = SimpleNamespace(hidden_size=8)
    settings = SimpleNamespace(
        vision_config=vision,
        get_text_config=lambda: text,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        **config,
    )
    return FAMILIES[model_type].geometry(settings, None)


def test_unpadded_tiles_are_counted_as_the_processors_count_them() -> None:
    patches = (TILE // 14) ** 2
    image_processor = SimpleNamespace(image_grid_pinpoints=PINPOINTS)
    count: Any = LlavaNextProcessor._get_number_of_features
    next_processor = SimpleNamespace(
        image_processor=image_processor,
        patch_size=14,
        num_additional_image_tokens=0,
        _get_unpadded_features=lambda *sizes: LlavaNextProcessor._get_unpadded_features(None, *sizes),
    )
    onevision = SimpleNamespace(
        image_processor=image_processor, num_image_tokens=patches, vision_aspect_ratio="anyres_max_9"
    )
    onevision._get_unpadded_features = lambda *sizes: LlavaOnevisionProcessor._get_unpadded_features(onevision, *sizes)
    of_next, of_onevision = anyres("llava_next"), anyres("llava_onevision", vision_aspect_ratio="anyres_max_9")
    compared = 0
    for height, width in sizes(1000):
        try:
            ours = num_tokens(of_next, height, width), num_tokens(of_onevision, height, width)
        except InvalidRequestError:
            continue
        compared += 1
        assert ours[0] == count(next_processor, height, width, TILE, TILE)
        assert ours[1] == LlavaOnevisionProcessor._get_number_of_features(onevision, height, width, TILE, TILE)
    assert compared > 980  # the others are more than a hundred times as wide as high, or as high as wide


def test_image_among_others_is_not_cut_by_onevision() -> None:
    geometry = anyres("llava_onevision", vision_aspect_ratio="anyres_max_9")
    grid = geometry.grid(1000, 2000, min_pixels=0, max_pixels=0, alone=False)
    assert (grid, geometry.num_tokens(grid)) == ((1, 24, 24), 24 * 24 + 1)
    assert isinstance(geometry, AnyresGeometry)


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [(1, 190, "190 x 1 pixels is too narrow"), (201, 1, "aspect ratio of 1 x 201 pixels is above 200")],
)
def test_image_that_is_all_but_a_line_is_a_callers_error(height: int, width: int, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        anyres("llava_next").grid(height, width, min_pixels=0, max_pixels=0)


@pytest.mark.parametrize("longest_edge", [4 * 28, 3 * 28 + 5])
def test_split_images_have_the_rows_and_columns_of_the_processor(longest_edge: int) -> None:
    sizes_of_tiles = {"size": {"longest_edge": longest_edge}, "max_image_size": {"longest_edge": 28}}
    processor = Idefics3ImageProcessorPil(**sizes_of_tiles)
    vision = SimpleNamespace(image_size=28, patch_size=14)
    text = SimpleNamespace(hidden_size=8)
    config = SimpleNamespace(vision_config=vision, scale_factor=2, get_text_config=lambda: text)
    geometry = FAMILIES["idefics3"].geometry(config, processor)
    for height, width in [*sizes(150, 150), (27, 28), (29, 28), (1, 28)]:
        blank = np.zeros((height, width, 3), np.uint8)
        processed = processor(blank, return_row_col_info=True, input_data_format="channels_last")
        rows, columns = processed["rows"][0][0], processed["cols"][0][0]
        grid = geometry.grid(height, width, min_pixels=0, max_pixels=0)
        assert grid == ((rows * columns + 1, rows, columns) if rows else (1, 1, 1)), (height, width)


def test_tiles_are_counted_as_the_processor_counts_them() -> None:
    processor = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True)
    text = SimpleNamespace(hidden_size=8)
    config = SimpleNamespace(image_seq_length=256, get_text_config=lambda: text)
    geometry = FAMILIES["internvl"].geometry(config, processor)
    for height, width in sizes(1000):
        assert num_tokens(geometry, height, width) == 256 * processor.get_number_of_image_patches(height, width)


def test_dinov2_is_counted_by_the_size_of_its_images_not_by_its_own(tmp_path: Path) -> None:
    directory = write_tiny_family("llava-dinov2", tmp_path / "model")
    config = load_config(directory)
    assert config.vision_config.image_size == 84
    assert load_geometry(directory, config).grid(50, 50, min_pixels=0, max_pixels=0) == (1, 4, 4)  # of 56 / 14


def test_other_towers_are_refused_with_the_supported_ones(tmp_path: Path) -> None:
    directory = write_tiny_family("llava", tmp_path / "model")
    config = load_config(directory)
    config.vision_config.model_type = "pixtral"
    with pytest.raises(ValueError, match=r"vision tower 'pixtral' is not supported; supported are \['clip_vision"):
        load_geometry(directory, config)
