"""The architecture of the embedded model, its checkpoint directory, and a vision tower batched over equal pictures.

Shapes: U pictures or frame pairs of one size, S patches in each, D = embed_dim of the vision tower, H its heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from common.families import MropeRule
from deploy.shapes.scenes import MAX_PIXELS, MERGE_SIZE, MIN_PIXELS, PATCH_SIZE
from deploy.shapes.tokenizer import (
    MODEL_MAX_LENGTH,
    TOKEN_IDS,
    VOCAB_SIZE,
    train_tokenizer,
    write_json,
    write_tokenizer,
)

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MROPE_RULE: MropeRule = "hf5"  # positions after a clip as transformers 5.23 counts them
VISION_ROPE_THETA = 10000.0  # the constant of Qwen2-VL's vision tower


def model_config() -> Qwen2VLConfig:
    """7.6 M parameters.

    The rotary frequencies are chosen for pictures of eight columns: from 0.08 radians a column, so that left and right
    can be told, down to 0.001, so that what is asked for can be found wherever it is. (Qwen2-VL's own sections and
    theta leave a column 0.003 radians.)
    """
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": math.ceil(VOCAB_SIZE / 64) * 64,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": MODEL_MAX_LENGTH,
            "rms_norm_eps": 1e-6,
            "attention_dropout": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 8, 20]},
            "bos_token_id": TOKEN_IDS["<|endoftext|>"],
            "eos_token_id": TOKEN_IDS["<|im_end|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 4,
            "embed_dim": 192,
            "hidden_size": 256,
            "num_heads": 4,
            "mlp_ratio": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": 2,
        },
        image_token_id=TOKEN_IDS["<|image_pad|>"],
        video_token_id=TOKEN_IDS["<|video_pad|>"],
        vision_start_token_id=TOKEN_IDS["<|vision_start|>"],
        vision_end_token_id=TOKEN_IDS["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    config.mrope_rule = MROPE_RULE
    return config


def new_model(seed: int) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(seed)
    return Qwen2VLForConditionalGeneration(model_config())


def write_checkpoint(model: Qwen2VLForConditionalGeneration, path: Path) -> None:
    """A complete Hugging Face directory with the weights in bf16. The model itself is not changed."""
    copy = Qwen2VLForConditionalGeneration(model_config())
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=TOKEN_IDS["<|endoftext|>"],
        pad_token_id=TOKEN_IDS["<|endoftext|>"],
        eos_token_id=[TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]],
    )
    copy.to(torch.bfloat16).save_pretrained(path)
    write_tokenizer(train_tokenizer(), path)
    write_json(
        path / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": 2,
            "merge_size": MERGE_SIZE,
            "image_mean": list(IMAGE_MEAN),
            "image_std": list(IMAGE_STD),
        },
    )


@dataclass(frozen=True, slots=True)
class BlockFunctions:
    """What the two towers compute around their attention; plain, or compiled for training on a GPU."""

    encode_heads: Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    encode_rest: Callable[[Any, Tensor, Tensor], Tensor]
    decode_heads: Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    decode_rest: Callable[[Any, Tensor, Tensor], Tensor]


def encode_equal(
    visual: Any, patches: Tensor, rows: int, columns: int, functions: BlockFunctions | None = None
) -> Tensor:
    """transformers' vision tower for U units of one grid: patches [U, S, patch_dim] -> features [U, S / 4, hidden].

    The tower's own forward loops over pictures in each layer; this one attends in one batch, seven times as fast in
    training, and computes the same.
    """
    functions = functions or PLAIN_FUNCTIONS
    num_units, num_patches, _ = patches.shape
    hidden = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))  # what its convolution amounts to
    cos, sin = rotary_tables(rows, columns, hidden.shape[-1] // visual.config.num_heads, hidden.device)
    for block in visual.blocks:
        query, key, value = functions.encode_heads(block, hidden, cos, sin)
        hidden = functions.encode_rest(block, hidden, F.scaled_dot_product_attention(query, key, value))
    features: Tensor = visual.merger(hidden)
    return features.view(num_units, num_patches // MERGE_SIZE**2, -1)


def encode_heads(block: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated query and key, and value: each [U, H, S, head_dim]."""
    num_units, num_patches, dim = hidden.shape
    num_heads = block.attn.num_heads
    qkv = block.attn.qkv(block.norm1(hidden)).view(num_units, num_patches, 3, num_heads, dim // num_heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def encode_rest(block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + block.attn.proj(attended.transpose(1, 2).reshape(hidden.shape))
    result: Tensor = hidden + block.mlp(block.norm2(hidden))
    return result


def decode(
    language_model: Any, embeddings: Tensor, position_ids: Tensor, mask: Tensor, functions: BlockFunctions | None = None
) -> list[Tensor]:
    """transformers' language model without its dispatch: [B, L, hidden], position ids [3, B, L], bool mask
    [B, 1, L, L] -> the hidden states after each layer, the last ones normed."""
    functions = functions or PLAIN_FUNCTIONS
    cos, sin = language_model.rotary_emb(embeddings.float(), position_ids)
    cos, sin = cos[:, None], sin[:, None]
    groups = language_model.config.num_attention_heads // language_model.config.num_key_value_heads
    hidden, states = embeddings, []
    for layer in language_model.layers:
        query, key, value = functions.decode_heads(layer, hidden, cos, sin)
        key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
        hidden = functions.decode_rest(layer, hidden, F.scaled_dot_product_attention(query, key, value, mask))
        states.append(hidden)
    states[-1] = language_model.norm(hidden)
    return states


def decode_heads(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated query and key, and value: each [B, heads, L, head_dim]."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    query, key, value = (
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def decode_rest(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).reshape(hidden.shape))
    result: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return result


PLAIN_FUNCTIONS = BlockFunctions(encode_heads, encode_rest, decode_heads, decode_rest)


def compiled_functions() -> BlockFunctions:
    return BlockFunctions(
        encode_heads=torch.compile(encode_heads, dynamic=True),
        encode_rest=torch.compile(encode_rest, dynamic=True),
        decode_heads=torch.compile(decode_heads, dynamic=True),
        decode_rest=torch.compile(decode_rest, dynamic=True),
    )


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.float().chunk(2, dim=-1)
    return (heads.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)


@lru_cache(maxsize=512)
def rotary_tables(rows: int, columns: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [S, head_dim] of patch positions, in the order in which merged patches are adjacent."""
    steps = torch.arange(0, head_dim // 2, 2, dtype=torch.float, device=device)
    frequencies = 1.0 / VISION_ROPE_THETA ** (steps / (head_dim // 2))
    axes = (torch.arange(size, device=device) for size in (rows, columns))
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    blocks = place.view(2, rows // MERGE_SIZE, MERGE_SIZE, columns // MERGE_SIZE, MERGE_SIZE)
    row, column = blocks.permute(0, 1, 3, 2, 4).reshape(2, -1, 1)
    angles = torch.cat([row * frequencies, column * frequencies], dim=-1).repeat(1, 2)
    return angles.cos(), angles.sin()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
