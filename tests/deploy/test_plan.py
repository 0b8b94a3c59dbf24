"""`fovea plan` against the published sizes of Qwen's models and hand arithmetic on them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig
from typer.testing import CliRunner

from deploy import plan as planning
from deploy.cli import app
from deploy.plan import Hardware, Load
from deploy.service import ServiceError
from deploy.shapes import CHECKPOINT

H200 = Hardware(141e9, 790e12, 4.3e12)
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "rope_parameters": ROPE,
    }


QWEN2_VL_2B = Qwen2VLConfig(
    text_config=text(1536, 8960, 28, 12, 2, 151936),
    vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
    tie_word_embeddings=True,
)
QWEN2_5_VL_7B = Qwen2_5_VLConfig(
    text_config=text(3584, 18944, 28, 28, 4, 152064),
    vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
    tie_word_embeddings=False,
)
SHAPES = {"2B": planning.shape_of(QWEN2_VL_2B), "7B": planning.shape_of(QWEN2_5_VL_7B)}


def patches(config: Any, load: Load) -> tuple[int, int]:
    return planning.image_patches(planning.geometry_of(config, {}), load, None)


@pytest.mark.parametrize(
    ("model", "vision", "language", "kv"), [("2B", 0.665e9, 1.543e9, 28_672), ("7B", 0.676e9, 7.616e9, 57_344)]
)
def test_parameters_and_kv_are_those_of_the_published_models(
    model: str, vision: float, language: float, kv: int
) -> None:
    shape = SHAPES[model]
    assert shape.vision_parameters == pytest.approx(vision, rel=2e-3)
    assert shape.language_parameters == pytest.approx(language, rel=2e-3)
    assert shape.kv_bytes == kv


@pytest.mark.parametrize(
    ("model", "tera_flops"), [("2B", {256: 1.48, 1225: 10.2, 4096: 64.92}), ("7B", {256: 1.35, 1225: 6.84, 4096: 26.7})]
)
def test_encoding_takes_the_operations_counted_by_hand(model: str, tera_flops: dict[int, float]) -> None:
    counted = {tokens: planning.encode_flops(SHAPES[model], 4 * tokens) / 1e12 for tokens in tera_flops}
    assert counted == pytest.approx(tera_flops, rel=0.01)


@pytest.mark.parametrize(("model", "milliseconds"), [("2B", 4.46), ("7B", 21.72)])
def test_prefill_takes_the_operations_counted_by_hand(model: str, milliseconds: float) -> None:
    assert planning.prefill_flops(SHAPES[model], 1225 + 64) / 790e12 * 1000 == pytest.approx(milliseconds, rel=0.01)


@pytest.mark.parametrize(
    ("model", "config", "reuse", "decoders"),
    [
        ("2B", QWEN2_VL_2B, 0.0, 0.47),
        ("7B", QWEN2_5_VL_7B, 0.0, 3.17),
        ("2B", QWEN2_VL_2B, 0.8, 2.3),
        ("7B", QWEN2_5_VL_7B, 0.8, 16),
    ],
)
def test_encoders_for_each_decoder_at_one_large_picture(model: str, config: Any, reuse: float, decoders: float) -> None:
    load = Load(980, 980, 1, 106, 100, reuse)
    found = planning.plan(SHAPES[model], patches(config, load), load, H200)
    assert found.image_tokens == 1225
    assert 1 / found.encoders_per_decoder == pytest.approx(decoders, rel=0.03)


def test_sequences_fill_what_weights_leave() -> None:
    load = Load(980, 980, 1, 106, 100, 0)
    found = planning.plan(SHAPES["7B"], (4900, 1225), load, Hardware(80e9, 790e12, 4.3e12))
    used = found.language_weight_bytes + found.sequences * found.sequence_kv_bytes + planning.ACTIVATION_BYTES
    assert used <= 0.9 * 80e9 < used + found.sequence_kv_bytes


def test_command_plans_the_embedded_model_without_its_weights(tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--image", "224x224", "--json"])
    assert json.loads(result.stdout)["image_tokens"] == 64


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["shapes", "--gpu", "large"], "--gpu is a size"),
        (["shapes", "--image", "10"], "--image is width x height"),
        (["shapes", "--gpu", "1GB"], "no room for them"),
        (["/nowhere"], "/nowhere"),
    ],
)
def test_wrong_argument_is_one_line_that_names_it(arguments: list[str], complaint: str) -> None:
    error = CliRunner().invoke(app, ["plan", *arguments]).exception
    assert isinstance(error, ServiceError) and complaint in str(error)
