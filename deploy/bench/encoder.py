"""`fovea bench encoder`: JPEG bytes to packed embeddings in one encoder, beside transformers, and where the time goes.

On a GPU with the tower of Qwen2-VL-2B in bf16, on a CPU with a small one, so that the rest can be seen; random weights.
"""

import asyncio
import copy
import dataclasses
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.random import default_rng
from PIL import Image
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from common.cache import LocalTier, TieredCache
from common.checkpoint import LoadedHalf, load_half
from common.config import MIB, ImageLimits, ModelConfig
from common.embedding import Grid, pack
from common.media import MediaItem, MediaParams
from deploy.bench import report
from deploy.bench.engine import MATRIX_FLOPS, NUMERICS, QWEN2_VL_2B, Numerics
from deploy.bench.preprocess import preprocessing_rows
from deploy.bench.workloads import picture
from encoder_service.config import EncoderConfig
from encoder_service.encoder import VisionEncoder, load_preprocessor
from encoder_service.preprocess import ImagePreprocessor, decode
from encoder_service.server import EncoderServer

_SMALL_TOWER = {"depth": 1, "embed_dim": 64, "hidden_size": 1536, "num_heads": 2}
_PARAMS = MediaParams(min_pixels=56 * 56, max_pixels=12845056)  # of the published Qwen2-VL checkpoints
_IN_FLIGHT = 64  # images


def run(sizes: Sequence[int], seconds: float, output: Path) -> None:
    """`sizes` are sides of square pictures; each rate is measured for `seconds`."""
    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        model = _checkpoint(Path(directory))
        half = load_half(model, "vision")
        torch.set_num_threads(model.num_threads)
        pictures = {size: picture(default_rng(size), size, size) for size in sizes}
        for size, data in pictures.items():
            tables["tower"].append(_tower("transformers", half, _grid(size), 1))
            tables["images"].append(_transformers_rate(half, size, data, seconds))
        for numerics in NUMERICS:
            encoder = _encoder(model, half, numerics)
            server = _server(model, encoder.half, numerics)
            for size, data in pictures.items():
                num_patches = _grid(size)[1] * _grid(size)[2]
                largest = EncoderConfig().max_batch_patches // num_patches if encoder.is_batched else 1
                for count in sorted({1, max(1, largest)}):
                    tables["tower"].append(_tower(numerics, encoder.half, _grid(size), count))
                tables["one image"].append(_steps(encoder, numerics, size, data))
                rate = asyncio.run(_rate(server, data, seconds))
                tables["images"].append({"by": numerics, "side": size, "images/s": rate})
    tables["preprocessing"] = preprocessing_rows(sizes, rounds=15)
    gpu = torch.cuda.get_device_name() if half.device.type == "cuda" else "none"
    titles = {
        "tower": "the tower alone: patches on the device to features there; `of products` is of 790 TFLOP/s",
        "one image": "one image with nothing beside it, in ms",
        "images": f"JPEG bytes to packed embeddings, {_IN_FLIGHT} images on their way; transformers: one by one",
        "preprocessing": "one thread, ms of CPU time; `patches`: decoded image to uint8 patches",
    }
    for name, title in titles.items():
        report.show(title, sorted(tables[name], key=lambda row: row["side"]))
    report.write(output, {"circumstances": report.circumstances(gpu=gpu)} | tables)


def _checkpoint(directory: Path) -> ModelConfig:
    tower = QWEN2_VL_2B["vision_config"] if torch.cuda.is_available() else _SMALL_TOWER
    Qwen2VLConfig(**QWEN2_VL_2B | {"vision_config": tower}).save_pretrained(directory)
    budget = {"min_pixels": _PARAMS.min_pixels, "max_pixels": _PARAMS.max_pixels}
    (directory / "preprocessor_config.json").write_text(json.dumps(budget))
    return ModelConfig(path=str(directory), load_format="dummy")


def _grid(size: int) -> Grid:
    rows = round(size / 28) * 2  # none of the sizes is outside of the budget
    return 1, rows, rows


def _tower(by: str, half: LoadedHalf, grid: Grid, count: int) -> dict[str, Any]:
    num_patches = grid[1] * grid[2]
    vision = half.config.vision_config
    pixel_values = torch.randn(
        count * num_patches, 3 * vision.temporal_patch_size * vision.patch_size**2, device=half.device
    )
    grids = torch.tensor([grid] * count, device=half.device)
    model: Any = half.model

    @torch.inference_mode()
    def forward() -> None:
        model.get_image_features(pixel_values.to(half.dtype), grids, return_dict=True)
        _synchronize(half)

    seconds = _median_s(forward)
    flops = count * _tower_flops(vision, num_patches) / seconds
    side = grid[1] * vision.patch_size
    row = {"by": by, "side": side, "images": count, "ms": seconds * 1e3, "images/s": count / seconds}
    return row | {"TFLOP/s": flops / 1e12, "of products": flops / MATRIX_FLOPS}


def _tower_flops(vision: Any, num_patches: int) -> float:
    """Of Qwen2-VL's tower for one image: products of layers, attention, patch embedding, merger."""
    width, depth, merged = vision.embed_dim, vision.depth, vision.embed_dim * vision.spatial_merge_size**2
    layers = 2 * num_patches * depth * (4 + 2 * vision.mlp_ratio) * width**2
    attention = 4 * num_patches**2 * width * depth
    patches = 2 * num_patches * 3 * vision.temporal_patch_size * vision.patch_size**2 * width
    merger = 2 * num_patches / vision.spatial_merge_size**2 * merged * (merged + vision.hidden_size)
    return float(layers + attention + patches + merger)


def _steps(encoder: VisionEncoder, numerics: Numerics, size: int, data: bytes) -> dict[str, Any]:
    """Each step on the result of the one before."""
    preprocess, half = encoder.preprocessor, encoder.half
    assert isinstance(preprocess, ImagePreprocessor)
    image = decode(data, ImageLimits())
    patches = preprocess(data, _PARAMS)
    inputs = preprocess.model_inputs([patches], half.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(half.dtype)
    embedding = encoder.encode([patches])[0]
    on_device = embedding.features.to(half.device)
    model: Any = half.model

    def transfer() -> None:
        preprocess.model_inputs([patches], half.device)
        _synchronize(half)

    @torch.inference_mode()
    def forward() -> None:
        model.get_image_features(**inputs, return_dict=True)
        _synchronize(half)

    steps: dict[str, Callable[[], object]] = {
        "decode": lambda: decode(data, ImageLimits()),
        "resize": lambda: preprocess.resize(image, patches.grid_thw),
        "decode to patches": lambda: preprocess(data, _PARAMS),
        "transfer, normalise": transfer,
        "tower": forward,
        "features to host": lambda: on_device.cpu(),
        "pack": lambda: pack(embedding, key="bench"),
    }
    return {"by": numerics, "side": size} | {name: _median_s(step) * 1e3 for name, step in steps.items()}


async def _rate(server: EncoderServer, data: bytes, seconds: float) -> float:
    """New images per second, without the first second, in which the encoder becomes busy."""
    numbers = itertools.count()
    begin = time.perf_counter() + 1
    end = begin + seconds
    answered: list[float] = []

    async def keep_asking() -> None:
        while time.perf_counter() < end:
            await server.encode(MediaItem.of(data + str(next(numbers)).encode(), _PARAMS))
            answered.append(time.perf_counter())

    async with asyncio.TaskGroup() as group:
        for _ in range(_IN_FLIGHT):
            group.create_task(keep_asking())
    return sum(begin <= at < end for at in answered) / seconds


def _transformers_rate(half: LoadedHalf, size: int, data: bytes, seconds: float) -> dict[str, Any]:
    """Its PIL processor and `get_image_features` on one image after another, features on the CPU at the end."""
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": _PARAMS.min_pixels, "longest_edge": _PARAMS.max_pixels})
    model: Any = half.model

    @torch.inference_mode()
    def encode() -> None:
        inputs = processor([Image.open(io.BytesIO(data))], return_tensors="pt").to(half.device)
        values = inputs.pixel_values.to(half.dtype)
        model.get_image_features(values, inputs.image_grid_thw, return_dict=True).pooler_output[0].cpu()

    encode()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() < begin + seconds:
        encode()
        count += 1
    return {"by": "transformers", "side": size, "images/s": count / (time.perf_counter() - begin)}


def _encoder(model: ModelConfig, half: LoadedHalf, numerics: Numerics) -> VisionEncoder:
    preprocessor = load_preprocessor(Path(model.path), half.config, model.limits)
    own = dataclasses.replace(half, model=copy.deepcopy(half.model))  # which is changed
    encoder = VisionEncoder(own, preprocessor, numerics)
    encoder.speed_up()
    return encoder


def _server(model: ModelConfig, half: LoadedHalf, numerics: Numerics) -> EncoderServer:
    config = EncoderConfig(preprocess_threads=max(1, (os.cpu_count() or 1) - 2), max_queued_images=2 * _IN_FLIGHT)
    cache = TieredCache(LocalTier(256 * MIB), None)
    return EncoderServer(model.model_copy(update={"numerics": numerics}), config, cache, half=half)


def _median_s(call: Callable[[], object], repeats: int = 5) -> float:
    for _ in range(2):  # a grid that comes again gets a graph
        call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _synchronize(half: LoadedHalf) -> None:
    if half.device.type == "cuda":
        torch.cuda.synchronize(half.device)
