"""Loads one half of a generated checkpoint and prints its MiB, the growth of peak memory and the whole's MiB.

    python load_half_memory.py DIRECTORY vision|language

The checkpoint is written into DIRECTORY by the first call, in a process of its own.
"""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from common.checkpoint import load_half
from common.config import ModelConfig

MIB = 1024**2


def write(directory: Path) -> None:
    """About 400 MiB in fp32, a third of it vision, in shards of at most 80 MB."""
    text = {
        "vocab_size": 16384, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6,
        "num_attention_heads": 12, "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    vision = {"depth": 6, "embed_dim": 768, "hidden_size": 768, "num_heads": 12}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    model.save_pretrained(directory, max_shard_size="80MB")


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    directory, half = Path(sys.argv[1]), sys.argv[2]
    if half == "write":
        write(directory)
        return
    if not any(directory.iterdir()):
        subprocess.run([sys.executable, __file__, str(directory), "write"], check=True, capture_output=True)
    torch.set_num_threads(1)
    before = peak_bytes()
    loaded = load_half(ModelConfig(path=str(directory)), half)
    for parameter in loaded.model.parameters():
        parameter.sum()  # weights may stay file-mapped: touch every page
    grown = peak_bytes() - before
    size = sum(parameter.nbytes for parameter in loaded.model.parameters())
    whole = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    print(size / MIB, grown / MIB, whole / MIB)


main()
