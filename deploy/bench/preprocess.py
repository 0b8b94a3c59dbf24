"""Decoded image to uint8 patches on one thread, beside transformers' PIL processor; a part of `fovea bench encoder`."""

import io
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from common.config import ImageBackend, ImageLimits
from common.geometry import PatchGeometry
from common.media import MediaParams
from encoder_service.preprocess import ImagePreprocessor, decode, pixel_values

# the budget of the published Qwen2-VL checkpoints, under which no picture here is made smaller
_PARAMS = MediaParams(min_pixels=56 * 56, max_pixels=12845056)
_GEOMETRY = PatchGeometry(patch_size=14, merge_size=2, hidden_size=1536)
_FRAMES = 2


def preprocessing_rows(sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Three rows for each side of a square JPEG: our two image backends, and transformers' PIL processor.

    Medians in ms of the thread's CPU time, which other work on the machine delays least; the three take turns.
    `patches` is from the decoded image to uint8 patches, of transformers its whole call, to pixel values. `speed` is
    that call's time over `patches`, `speed to values` over `patches` and `normalise`, which is the device's work.
    """
    torch.set_num_threads(1)
    return [row for size in sizes for row in _rows_of_size(size, rounds)]


def _rows_of_size(size: int, rounds: int) -> list[dict[str, Any]]:
    data = _photo(size)
    image = decode(data, ImageLimits())
    steps = {backend: _our_steps(image, backend) for backend in get_args(ImageBackend)} | {
        "transformers": _transformers_steps(image)
    }
    seconds: dict[tuple[str, str], list[float]] = {(by, step): [] for by in steps for step in steps[by]}
    decode_s = []
    for _ in range(rounds):
        decode_s.append(_seconds(lambda: decode(data, ImageLimits())))
        for by, step in seconds:
            seconds[by, step].append(_seconds(steps[by][step]))
    ms = {key: statistics.median(values) * 1000 for key, values in seconds.items()}
    whole = ms["transformers", "patches"]
    rows = []
    for by in steps:
        normalise = 0.0 if by == "transformers" else ms[by, "normalise"]
        patches = whole if by == "transformers" else ms[by, "resize"] + ms[by, "patchify"]
        rows.append(
            {
                "side": size,
                "by": by,
                "decode": statistics.median(decode_s) * 1000,
                "resize": ms[by, "resize"],
                "patchify": ms[by, "patchify"],
                "patches": patches,
                "normalise": ms[by, "normalise"],
                "speed": whole / patches,
                "speed to values": whole / (patches + normalise),
            }
        )
    return rows


def _our_steps(image: Image.Image, image_backend: ImageBackend) -> dict[str, Callable[[], object]]:
    preprocess = ImagePreprocessor(_GEOMETRY, {}, ImageLimits(), _FRAMES, image_backend)
    grid = _PARAMS.grid(_GEOMETRY, image.height, image.width)
    planes = preprocess.resize(image, grid)
    patches = preprocess.patchify(planes, grid)
    table = preprocess.normalization_table()
    return {
        "resize": lambda: preprocess.resize(image, grid),
        "patchify": lambda: preprocess.patchify(planes, grid),
        "normalise": lambda: pixel_values(patches, table, _FRAMES),
    }


def _transformers_steps(image: Image.Image) -> dict[str, Callable[[], object]]:
    """The whole call, and its parts on what each gets in it."""
    size = {"shortest_edge": _PARAMS.min_pixels, "longest_edge": _PARAMS.max_pixels}
    processor = Qwen2VLImageProcessorPil(size=size)
    sides = {"patch_size": _GEOMETRY.patch_size, "merge_size": _GEOMETRY.merge_size, "temporal_patch_size": _FRAMES}

    def resize() -> Any:
        unit = _GEOMETRY.patch_size * _GEOMETRY.merge_size
        pixels = processor.process_image(image, do_convert_rgb=True)
        return processor.resize(pixels, size=processor.size, resample=processor.resample, factor=unit)

    def normalise() -> Any:
        rescaled = processor.rescale(resized, processor.rescale_factor)
        return processor.normalize(rescaled, processor.image_mean, processor.image_std)

    resized = resize()
    normalised = normalise()
    return {
        "resize": resize,
        "normalise": normalise,
        "patchify": lambda: processor.patchify(normalised, **sides),
        "patches": lambda: processor([image], return_tensors="pt"),
    }


def _photo(size: int) -> bytes:
    """Smooth areas with some noise: about as many bytes as a photograph of the size."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (18, 18, 3), np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    pixels = np.clip(smooth + rng.normal(0, 6, (size, size, 1)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _seconds(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started
