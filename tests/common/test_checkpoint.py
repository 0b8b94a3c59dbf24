"""Either half of a checkpoint, and nothing of the other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Blip2Config, MllamaConfig, PreTrainedModel

from common.checkpoint import GIB, Half, load_config, load_half, load_preprocessor_config, weights_digest
from common.config import ModelConfig
from tests.tiny_families import TINY_FAMILIES, write_tiny_family


def model_config(directory: Path, **fields: str) -> ModelConfig:
    return ModelConfig(path=str(directory), **fields)


def test_two_halves_have_the_parameters_of_the_whole(tiny_checkpoint: Path, one_piece: PreTrainedModel) -> None:
    whole = dict(one_piece.named_parameters(remove_duplicate=False))
    halves: dict[str, torch.Tensor] = {}
    for half in ("vision", "language"):
        loaded = load_half(model_config(tiny_checkpoint), half)
        halves |= dict(loaded.model.named_parameters(remove_duplicate=False))
        assert loaded.digest == weights_digest(one_piece, half)
        assert not any(buffer.is_meta for buffer in loaded.model.buffers())
    assert halves.keys() == whole.keys()
    assert all(torch.equal(halves[name], whole[name]) for name in whole)


def test_lost_tensor_is_refused_by_the_half_that_needs_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))
    index = json.loads((broken / "model.safetensors.index.json").read_text())["weight_map"]
    lost, shard = next((name, file) for name, file in index.items() if "visual" in name)
    weights = load_file(broken / shard)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, broken / shard, {"format": "pt"})
    load_half(model_config(broken), "language")
    with pytest.raises(ValueError, match="missing_keys for the vision half"):
        load_half(model_config(broken), "vision")


def test_dummy_weights_are_not_those_of_the_checkpoint(tiny_checkpoint: Path) -> None:
    dummy, loaded = (
        load_half(model_config(tiny_checkpoint, load_format=by), "vision") for by in ("dummy", "safetensors")
    )
    assert dummy.digest != loaded.digest


@pytest.mark.parametrize("half", ["vision", "language"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_dummy_weights_are_the_same_in_every_replica(family: str, half: Half, tmp_path: Path) -> None:
    config = model_config(write_tiny_family(family, tmp_path), load_format="dummy")
    assert len({load_half(config, half).digest for _ in range(2)}) == 1


def test_other_weights_have_another_digest(tiny_checkpoint: Path) -> None:
    loaded = load_half(model_config(tiny_checkpoint), "language")
    with torch.no_grad():
        next(loaded.model.parameters()).view(-1)[0] += 1
    assert weights_digest(loaded.model, "language") != loaded.digest


def test_quantised_checkpoint_is_refused_with_its_method(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised checkpoints are not supported: awq, 4 bits"):
        load_config(tmp_path)


def test_adapter_is_refused_with_its_rank(tiny_checkpoint: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    adapter = {"peft_type": "LORA", "r": 16, "base_model_name_or_path": "Qwen/Qwen2-VL-2B"}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ValueError, match=r"LORA, rank 16, of Qwen/Qwen2-VL-2B\); merge it"):
        load_config(directory)


def test_text_model_with_an_encoder_is_refused_with_its_layers(tmp_path: Path) -> None:
    Blip2Config(text_config={"model_type": "t5", "num_layers": 5, "num_decoder_layers": 7}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder of their own are not supported: t5 of 5 \+ 7 layers"):
        load_config(tmp_path)


def test_cross_attention_model_is_refused(tmp_path: Path) -> None:
    MllamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'mllama' is not supported \(its decoder reads images by cross-attention"):
        load_config(tmp_path)


@pytest.mark.parametrize("half", ["vision", "language"])
def test_half_that_does_not_fit_its_gpu_is_refused_with_the_sizes(
    tiny_checkpoint: Path, half: Half, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_half(model_config(tiny_checkpoint), half)
    num_bytes = sum(parameter.nbytes for parameter in loaded.model.parameters()) // 2  # the checkpoint's are of 4 bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (num_bytes - 1, 80 * GIB))
    with pytest.raises(ValueError, match=f"the {half} half does not fit: .* in bfloat16, and 0.0 of 80.0 GiB are free"):
        load_half(model_config(tiny_checkpoint, device="cuda", dtype="bfloat16"), half)


def test_image_processor_is_read_where_transformers_5_saves_it(tmp_path: Path) -> None:
    assert load_preprocessor_config(tmp_path) == {}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_pixels": 1}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
    assert load_preprocessor_config(tmp_path) == {"max_pixels": 1}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"max_pixels": 2}}))
    assert load_preprocessor_config(tmp_path) == {"max_pixels": 2}


def test_missing_directory_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="'/nowhere/model' is not a directory"):
        load_half(ModelConfig(path="/nowhere/model"), "vision")
