"""`fovea plan`: what a model needs on GPUs, from its configuration alone.

The arithmetic of one request: every weight is multiplied once with every token, attention once with every pair, and a
decode step reads all weights and all KV once. GPUs reach a share of their peaks, which is written below.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from common.checkpoint import load_config, load_preprocessor_config
from common.config import ModelConfig
from common.families import family_of
from common.geometry import ImageGeometry
from deploy.app import resolve_model
from deploy.service import ServiceError

MFU = 0.5  # of the peak of matrix products, in encoding and prefill
BANDWIDTH_SHARE = 0.7  # of the peak of memory, in decoding
MEMORY_SHARE = 0.9  # of a GPU's memory; the rest is the framework's and fragmentation's
ACTIVATION_BYTES = 2 * 1024**3
DECODE_BATCH = 64  # sequences of one step, if as many fit
BYTES = 2  # bf16 of weights, KV and embeddings

_CONFIGS = ["config.json", "preprocessor_config.json", "processor_config.json"]
_UNITS = {"": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
_UNITS |= {"KIB": 1024, "MIB": 1024**2, "GIB": 1024**3, "TIB": 1024**4}


@dataclass(frozen=True, slots=True)
class Load:
    """A typical request: pictures of width x height, text around them, tokens out, the share of pictures cached."""

    width: int
    height: int
    num_images: int
    text_tokens: int
    output_tokens: int
    reuse: float


@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU: memory in bytes, peak FLOP/s of bf16 matrix products, peak bytes/s of its memory."""

    memory_bytes: float
    flops: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Shape:
    """What the arithmetic needs of a model; parameters are counted on the meta device."""

    vision_parameters: int
    merger_parameters: int  # of these, those applied to tokens; the others are applied to patches
    vision_hidden: int
    vision_layers: int
    full_attention_layers: int
    window_patches: int  # that attend to each other in the other layers
    merged_patches: int  # in one token
    language_parameters: int
    layer_parameters: int  # of these, those of the layers; the others are the table and the head
    head_parameters: int
    layers: int
    attention_hidden: int
    hidden: int
    kv_bytes: int  # of one token


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes, counts and milliseconds; `encoders_per_decoder` is the ratio at which neither waits for the other."""

    image_tokens: int
    vision_weight_bytes: int
    language_weight_bytes: int
    kv_bytes_per_token: int
    embedding_bytes: int
    prompt_tokens: int
    sequence_kv_bytes: int
    sequences: int
    encode_ms: float
    prefill_ms: float
    decode_ms: float
    encoders_per_decoder: float


def run(model: str, load: Load, hardware: Hardware, *, max_pixels: int | None, as_json: bool) -> None:
    """Prints the plan. Raises ServiceError for a model that cannot be read or does not fit."""
    config, preprocessor = read(model)
    geometry = geometry_of(config, preprocessor)
    shape = shape_of(config)
    found = plan(shape, image_patches(geometry, load, max_pixels), load, hardware)
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        show(model, found, load, hardware)
    if found.sequences < 1:
        raise ServiceError(
            f"a GPU of {_size(hardware.memory_bytes)} (--gpu) has no room for them: the language half's "
            f"{_size(found.language_weight_bytes)}, activations of {_size(ACTIVATION_BYTES)} and one request's "
            f"{_size(found.sequence_kv_bytes)}"
        )


def read(model: str) -> tuple[Any, dict[str, Any]]:
    """The transformers configuration and that of the image processor. Raises ServiceError."""
    path = resolve_model(ModelConfig(path=model)).path
    try:
        is_directory = Path(path).expanduser().is_dir()
        directory = Path(path).expanduser() if is_directory else Path(snapshot_download(path, allow_patterns=_CONFIGS))
        return load_config(directory), load_preprocessor_config(directory)
    except (ValueError, OSError) as exc:
        raise ServiceError(f"{model}: {exc}") from exc


def geometry_of(config: Any, preprocessor: dict[str, Any]) -> ImageGeometry:
    """Raises ServiceError for a family whose vision tower the arithmetic below does not know."""
    family = family_of(config)
    if not family.own_pixels:
        raise ServiceError(f"`fovea plan` knows Qwen's families only, not {family.model_type!r}")
    return family.geometry(config, preprocessor)


def shape_of(config: Any) -> Shape:
    """Counted on the meta device: no weights, no memory."""
    with torch.device("meta"):
        model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._from_config(config)
    vision, text = config.vision_config, config.get_text_config()
    decoder = model.get_decoder()
    embeddings = _count(decoder.embed_tokens)
    head = _count(model.get_output_embeddings())
    whole = _count(model)  # a tied head counts once
    parts = {name: _count(part) for name, part in model.model.visual.named_children()}
    full = getattr(vision, "fullatt_block_indexes", None)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    vision_parameters = sum(parts.values())
    return Shape(
        vision_parameters=vision_parameters,
        merger_parameters=sum(count for name, count in parts.items() if "merger" in name),
        vision_hidden=getattr(vision, "embed_dim", vision.hidden_size),
        vision_layers=vision.depth,
        full_attention_layers=vision.depth if full is None else len(full),
        window_patches=0 if full is None else (vision.window_size // vision.patch_size) ** 2,
        merged_patches=vision.spatial_merge_size**2,
        language_parameters=whole - vision_parameters,
        layer_parameters=_count(decoder) - embeddings,
        head_parameters=head,
        layers=text.num_hidden_layers,
        attention_hidden=text.num_attention_heads * head_dim,
        hidden=text.hidden_size,
        kv_bytes=2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * BYTES,
    )


def image_patches(geometry: ImageGeometry, load: Load, max_pixels: int | None) -> tuple[int, int]:
    """Patches and tokens of one picture, within the pixel budget."""
    grid = geometry.grid(
        load.height, load.width, min_pixels=geometry.min_pixels, max_pixels=max_pixels or geometry.max_pixels
    )
    return grid[1] * grid[2], geometry.num_tokens(grid)


def plan(shape: Shape, patches_and_tokens: tuple[int, int], load: Load, hardware: Hardware) -> Plan:
    """The arithmetic; see the module."""
    patches, image_tokens = patches_and_tokens
    prompt = load.num_images * image_tokens + load.text_tokens
    length = prompt + load.output_tokens
    weights = shape.language_parameters * BYTES
    room = hardware.memory_bytes * MEMORY_SHARE - weights - ACTIVATION_BYTES
    sequence_bytes = length * shape.kv_bytes
    sequences = max(0, int(room // sequence_bytes))
    encode = load.num_images * (1 - load.reuse) * encode_flops(shape, patches) / (hardware.flops * MFU)
    prefill = prefill_flops(shape, prompt) / (hardware.flops * MFU)
    decode = decode_seconds(shape, prompt, load.output_tokens, max(1, min(DECODE_BATCH, sequences)), hardware)
    return Plan(
        image_tokens=image_tokens,
        vision_weight_bytes=shape.vision_parameters * BYTES,
        language_weight_bytes=weights,
        kv_bytes_per_token=shape.kv_bytes,
        embedding_bytes=image_tokens * shape.hidden * BYTES,
        prompt_tokens=prompt,
        sequence_kv_bytes=sequence_bytes,
        sequences=sequences,
        encode_ms=encode * 1000,
        prefill_ms=prefill * 1000,
        decode_ms=decode * 1000,
        encoders_per_decoder=encode / (prefill + decode),
    )


def encode_flops(shape: Shape, patches: int) -> float:
    """Of one picture: matrix products, and attention, in windows where the model has them."""
    full = shape.full_attention_layers * patches
    windowed = (shape.vision_layers - shape.full_attention_layers) * shape.window_patches
    attention = 4 * patches * shape.vision_hidden * (full + windowed)
    merger = 2 * shape.merger_parameters * patches / shape.merged_patches
    return 2 * patches * (shape.vision_parameters - shape.merger_parameters) + merger + attention


def prefill_flops(shape: Shape, tokens: int) -> float:
    """Of one prompt: matrix products, causal attention, and the head for the first token."""
    attention = shape.layers * 4 * shape.attention_hidden * tokens**2 / 2
    return 2 * shape.layer_parameters * tokens + attention + 2 * shape.head_parameters


def decode_seconds(shape: Shape, prompt: int, output: int, batch: int, hardware: Hardware) -> float:
    """Of one request's tokens among `batch` sequences: what a step reads, shared between them."""
    weights = (shape.layer_parameters + shape.head_parameters) * BYTES
    kv = (prompt + output / 2) * shape.kv_bytes
    return output * (weights / batch + kv) / (hardware.bandwidth * BANDWIDTH_SHARE)


def show(model: str, found: Plan, load: Load, hardware: Hardware) -> None:
    table = Table(title=f"{model} on GPUs of {_size(hardware.memory_bytes)}", title_justify="left", show_header=False)
    pictures = f"{load.num_images} picture{'s' if load.num_images > 1 else ''} of {load.width} x {load.height}"
    table.add_row("request", f"{pictures}, {load.text_tokens} text tokens, {load.output_tokens} tokens out")
    table.add_row("tokens of a picture", str(found.image_tokens))
    table.add_row("weights, encoder", _size(found.vision_weight_bytes))
    table.add_row("weights, LLM", _size(found.language_weight_bytes))
    table.add_row("KV of a token", _size(found.kv_bytes_per_token))
    table.add_row(
        "KV of a request", f"{_size(found.sequence_kv_bytes)} for {found.prompt_tokens + load.output_tokens} tokens"
    )
    table.add_row(
        "embedding of a picture",
        f"{_size(found.embedding_bytes)}; 10 GB of Redis keep {int(10e9 // found.embedding_bytes)}",
    )
    table.add_row("requests at once that fit", str(found.sequences))
    table.add_row("GPU time: encode", f"{found.encode_ms:.3g} ms")
    table.add_row("GPU time: prefill, decode", f"{found.prefill_ms:.3g} ms, {found.decode_ms:.3g} ms")
    table.add_row("encoder : LLM GPUs", ratio(found.encoders_per_decoder))
    Console(width=max(Console().width, 100)).print(table)
    print(
        f"bf16, at {MFU:.0%} of {hardware.flops / 1e12:.0f} TFLOP/s, {BANDWIDTH_SHARE:.0%} of "
        f"{hardware.bandwidth / 1e12:.1f} TB/s, and {load.reuse:.0%} of pictures in the cache"
    )


def ratio(encoders_per_decoder: float) -> str:
    """The larger side as a number, the other one 1; with replicas that are whole."""
    if encoders_per_decoder == 0:
        return "no encoder"
    decoders = 1 / encoders_per_decoder
    whole = (1, max(1, round(decoders))) if decoders >= 1 else (max(1, round(encoders_per_decoder)), 1)
    return f"1 : {decoders:.2f}; start with --encoder-replicas {whole[0]} --llm-replicas {whole[1]}"


def bytes_of(text: str) -> float:
    """Raises ServiceError unless it is a size such as 80GB or 24GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ServiceError(f"--gpu is a size such as 80GB or 24GiB, not {text!r}")
    return float(match[1]) * _UNITS[match[2].upper()]


def size_of(text: str) -> tuple[int, int]:
    """Width and height. Raises ServiceError unless it is a size such as 1024x768."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower())
    if match is None or not int(match[1]) * int(match[2]):
        raise ServiceError(f"--image is width x height such as 1024x768, not {text!r}")
    return int(match[1]), int(match[2])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _size(num_bytes: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"
