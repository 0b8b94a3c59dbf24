"""The peer beside `fovea bench`: vLLM's offline `LLM.generate` on the same shape, in vLLM's own environment.

    python deploy/bench/vllm_peer.py text OUTPUT.json      beside `engine`: prompts of 300 random tokens, 256 tokens out
    python deploy/bench/vllm_peer.py images OUTPUT.json    beside `encoder`: a new picture in each prompt, one token out

Stands alone: it imports vLLM and nothing of Fovea. Random weights in bf16; words and special tokens are those of the
embedded model.
"""

import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

SHAPE = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
}


EMBEDDED = Path(__file__).parents[1] / "shapes" / "checkpoint"


def load(directory: str, **limits: Any) -> LLM:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.json"):
        shutil.copy(EMBEDDED / name, directory)
    embedded = json.loads((EMBEDDED / "config.json").read_text())
    special = {name: embedded[name] for name in embedded if name.endswith("_token_id")}
    Path(directory, "config.json").write_text(json.dumps({"model_type": "qwen2_vl", **SHAPE, **special}))
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    budget = {"patch_size": 14, "merge_size": 2, "min_pixels": 56 * 56, "max_pixels": 12845056}
    Path(directory, "preprocessor_config.json").write_text(json.dumps(processor | budget))
    return LLM(directory, load_format="dummy", dtype="bfloat16", enable_prefix_caching=False, **limits)


def text(directory: str) -> list[dict[str, float]]:
    """Tokens a second between the first token and token 256, and prompts a second up to the first one."""
    limits = {"max_model_len": 4096, "max_num_seqs": 256, "limit_mm_per_prompt": {"image": 0, "video": 0}}
    llm = load(directory, skip_tokenizer_init=True, **limits)

    def seconds(concurrency: int, num_tokens: int) -> float:
        prompts = [{"prompt_token_ids": torch.randint(150_000, (300,)).tolist()} for _ in range(concurrency)]
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    rows = []
    for concurrency in (1, 64, 256):
        seconds(concurrency, 256)  # warm
        rounds = [(seconds(concurrency, 256), seconds(concurrency, 1)) for _ in range(3)]
        decode_s = statistics.median(whole_s - prompts_s for whole_s, prompts_s in rounds)
        prompts_s = statistics.median(prompts_s for _, prompts_s in rounds)
        rows.append(
            {
                "concurrency": concurrency,
                "tok/s": concurrency * 255 / decode_s,
                "prompts/s": concurrency / prompts_s,
            }
        )
    return rows


def images(directory: str) -> list[dict[str, float]]:
    """Pictures a second from JPEG bytes to the first token: decoding, preprocessing, encoding and prefill."""
    llm = load(directory, max_model_len=8192, limit_mm_per_prompt={"image": 1, "video": 0}, mm_processor_cache_gb=0)

    def seconds(pictures: list[bytes]) -> float:
        begin = time.perf_counter()
        prompts = [
            {
                "prompt": "<|vision_start|><|image_pad|><|vision_end|>What is it?",
                "multi_modal_data": {"image": Image.open(io.BytesIO(data)).convert("RGB")},
            }
            for data in pictures
        ]
        llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0, detokenize=False), use_tqdm=False)
        return time.perf_counter() - begin

    rows = []
    for side, count in ((448, 256), (980, 64), (1024, 64), (1792, 16)):
        pictures = [picture(seed, side) for seed in range(2 * count)]
        seconds(pictures[:8])  # warm
        rows.append({"side": side, "images/s": count / seconds(pictures[count:])})
    return rows


def picture(seed: int, side: int) -> bytes:
    """A smooth JPEG that no other one equals, as those of `fovea bench encoder`."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


if __name__ == "__main__":
    what, output = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:  # to the end: vLLM reads its processor late
        rows = {"text": text, "images": images}[what](directory)
    for row in rows:
        print(row)
    Path(output).write_text(json.dumps({"vllm": rows}, indent=2) + "\n")
