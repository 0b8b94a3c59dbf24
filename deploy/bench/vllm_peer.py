"""The peer beside `fovea bench engine`: vLLM's offline `LLM.generate` on the same shape, in vLLM's own environment.

    python deploy/bench/vllm_peer.py OUTPUT.json

Stands alone: it imports vLLM and nothing of Fovea. Random weights, bf16, prompts of 300 random tokens, 256 tokens out.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
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


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps({"model_type": "qwen2_vl", **SHAPE}))
        Path(directory, "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2})
        )
        llm = LLM(
            directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=4096,
            max_num_seqs=256,
            limit_mm_per_prompt={"image": 0, "video": 0},
            enable_prefix_caching=False,
        )

    def seconds(concurrency: int, num_tokens: int) -> float:
        prompts = [{"prompt_token_ids": torch.randint(150_000, (300,)).tolist()} for _ in range(concurrency)]
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    rows = []
    for concurrency in (1, 64, 256):
        seconds(concurrency, 256)  # warm
        decode_s = statistics.median(seconds(concurrency, 256) - seconds(concurrency, 1) for _ in range(3))
        rows.append({"concurrency": concurrency, "tok/s": concurrency * 255 / decode_s})
        print(rows[-1], flush=True)
    Path(sys.argv[1]).write_text(json.dumps({"vllm": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
