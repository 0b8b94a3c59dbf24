"""Token counts and positions from sizes alone are transformers' own."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLConfig, Qwen2VLModel, Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from common.errors import InvalidRequestError
from common.families import VisionItem, clip_interval, family_of, mrope_positions
from common.geometry import PatchGeometry, num_image_tokens, smart_resize_grid

IMAGE, VIDEO, VISION_START, VISION_END = 300, 301, 302, 303
GEOMETRY = PatchGeometry(patch_size=14, merge_size=2, hidden_size=8, min_pixels=3136, max_pixels=50176)


@pytest.mark.parametrize("max_pixels", [200_704, 1_003_520, 12_845_056])
def test_grid_is_the_processors(max_pixels: int) -> None:
    rng = random.Random(max_pixels)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": max_pixels})
    for _ in range(25):
        height, width = rng.randint(3, 500), rng.randint(3, 500)
        blank = Image.fromarray(np.zeros((height, width, 3), np.uint8))
        expected = processor(blank, return_tensors="pt").image_grid_thw[0].tolist()
        grid = smart_resize_grid(height, width, patch_size=14, merge_size=2, min_pixels=3136, max_pixels=max_pixels)
        assert list(grid) == expected


def test_extreme_aspect_ratio_is_a_callers_error() -> None:
    with pytest.raises(InvalidRequestError, match="above 200"):
        GEOMETRY.grid(1, 201, min_pixels=3136, max_pixels=50176)


def random_prompt(rng: random.Random, with_clips: bool) -> tuple[list[int], list[VisionItem], list[int]]:
    ids = [rng.randrange(100) for _ in range(rng.randrange(1, 9))]
    items, kinds = [], []
    for _ in range(rng.randrange(4)):
        clip = with_clips and rng.random() < 0.5
        grid = (rng.randint(2, 6) if clip else 1, 2 * rng.randint(1, 9), 2 * rng.randint(1, 9))
        items.append(VisionItem(len(ids) + 1, grid))
        kinds.append(VIDEO if clip else IMAGE)
        ids += [VISION_START, *[kinds[-1]] * num_image_tokens(grid, 2), VISION_END]
        ids += [rng.randrange(100) for _ in range(rng.randrange(5))]
    return ids, items, kinds


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [(Qwen2VLModel, Qwen2VLConfig), (Qwen2_5_VLModel, Qwen2_5_VLConfig), (Qwen3VLModel, Qwen3VLConfig)],
)
def test_positions_are_those_of_get_rope_index(model_class: type, config_class: type) -> None:
    text = {
        "vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "embed_dim": 16, "out_hidden_size": 16, "num_heads": 1}
    model = model_class(
        config_class(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
                     vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)
    )  # fmt: skip
    rng = random.Random(0)
    for _ in range(100):
        # Clips of Qwen3-VL have text between their grids.
        ids, items, kinds = random_prompt(rng, with_clips=model_class is not Qwen3VLModel)
        tokens = torch.tensor([ids])
        seconds = {}
        if model_class is Qwen2_5_VLModel:
            per_grid = [2 / rng.choice([0.5, 1, 2.997, 3, 23.976, 29.97, rng.uniform(0.1, 60)]) for _ in items]
            items = [
                replace(item, interval=clip_interval(model.config, spg)) if kind == VIDEO else item
                for item, kind, spg in zip(items, kinds, per_grid, strict=True)
            ]
            seconds = {
                "second_per_grid_ts": torch.tensor(
                    [spg for spg, of in zip(per_grid, kinds, strict=True) if of == VIDEO]
                )
            }
        grids = {
            kind: torch.tensor([item.grid_thw for item, of in zip(items, kinds, strict=True) if of == kind])
            for kind in set(kinds)
        }
        expected, delta = model.get_rope_index(
            tokens,
            (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int(),
            grids.get(IMAGE),
            grids.get(VIDEO),
            attention_mask=torch.ones_like(tokens),
            **seconds,
        )
        positions, next_position = mrope_positions(ids, items, merge_size=2, rule="hf5")
        assert torch.equal(positions, expected[:, 0])
        if VIDEO not in kinds:
            assert next_position == len(ids) + int(delta)


def test_rules_differ_only_after_clips_longer_than_their_sides() -> None:
    def after(t: int, rule: str) -> int:
        item = VisionItem(1, (t, 4, 8))
        return mrope_positions([0] * (2 + t * 8), [item], merge_size=2, rule=rule)[1]

    assert after(1, "qwen") == after(1, "hf5") == 1 + 4 + 1
    assert after(4, "qwen") == after(4, "hf5")
    assert after(9, "qwen") == 1 + 9 + 1
    assert after(9, "hf5") == 1 + 4 + 1


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        (
            "mllama",
            r"'mllama' is not supported \(its decoder reads images by cross-attention\); supported are .*'llava'",
        ),
        ("idefics", "cross-attention"),
        ("gemma3", "attend to those that follow"),
        ("bert", r"'bert' is not supported; supported are \['blip-2', "),
    ],
)
def test_other_families_are_refused_with_the_reason_and_the_supported_ones(model_type: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        family_of(SimpleNamespace(model_type=model_type))
