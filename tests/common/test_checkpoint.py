"""Either half of a checkpoint, and nothing of the other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from common.checkpoint import load_config, load_half, weights_digest
from common.config import ModelConfig


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


def test_dummy_halves_match_the_dummy_whole_in_every_process(tiny_checkpoint: Path) -> None:
    digests = {load_half(model_config(tiny_checkpoint, load_format="dummy"), "vision").digest for _ in range(2)}
    assert len(digests) == 1
    assert digests != {load_half(model_config(tiny_checkpoint), "vision").digest}


def test_other_weights_have_another_digest(tiny_checkpoint: Path) -> None:
    loaded = load_half(model_config(tiny_checkpoint), "language")
    with torch.no_grad():
        next(loaded.model.parameters()).view(-1)[0] += 1
    assert weights_digest(loaded.model, "language") != loaded.digest


def test_quantised_checkpoint_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised"):
        load_config(tmp_path)


def test_missing_directory_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="'/nowhere/model' is not a directory"):
        load_half(ModelConfig(path="/nowhere/model"), "vision")
