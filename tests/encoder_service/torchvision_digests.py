"""Digests of what transformers' torchvision processor makes of drawn images, for `test_image_backends.py`.

Run `python tests/encoder_service/torchvision_digests.py` where transformers and torchvision are installed; it writes
`torchvision_digests.json` beside itself. The digests there are of transformers 5.23.0's Qwen2VLImageProcessor over
torchvision 0.28.0 (the wheel of the package index) and torch 2.13.0+cpu on an x86 CPU with AVX2, one thread. That wheel
is linked for CUDA and its compiled operators do not load beside torch+cpu, so `torchvision._meta_registrations`, which
only describes them, was left out; `resize` and `normalize` are Python over torch.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DIGESTS = Path(__file__).with_name("torchvision_digests.json")

# height, width, min_pixels, max_pixels
CASES = [
    (height, width, 56 * 56, max_pixels)
    for max_pixels in (12845056, 28 * 28 * 1280, 28 * 28 * 64)
    for height, width in [
        (1, 1), (1, 200), (28, 28), (30, 29), (56, 1000), (197, 333), (375, 500), (448, 448), (480, 640), (600, 800),
        (720, 1280), (900, 45), (980, 980), (1024, 1024),
    ]
] + [(100, 100, 28 * 28 * 256, 28 * 28 * 1280), (1080, 1920, 56 * 56, 12845056)]  # fmt: skip

SETTINGS: list[dict[str, Any]] = [
    {},
    {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "patch_size": 16},  # Qwen3-VL's
]


def drawn(height: int, width: int) -> Image.Image:
    """Smooth ramps, hard edges and some noise, by integers alone, so that it is the same with every library."""
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], -1)
    edges = ((rows // 9 + columns // 7) % 2 * 120)[..., None]
    noise = np.random.Generator(np.random.PCG64(height * 4096 + width)).integers(0, 40, (height, width, 3))
    return Image.fromarray(np.clip(ramp // 2 + edges + noise, 0, 255).astype(np.uint8))


def digest(pixel_values: Any, grid_thw: Any) -> str:
    values = np.ascontiguousarray(pixel_values, np.float32)
    return hashlib.sha256(str([int(n) for n in grid_thw]).encode() + values.tobytes()).hexdigest()


def case_name(settings: dict[str, Any], case: tuple[int, int, int, int]) -> str:
    return f"{settings.get('patch_size', 14)}: {' '.join(map(str, case))}"


def main() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    digests = {}
    for settings in SETTINGS:
        for height, width, min_pixels, max_pixels in CASES:
            size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
            found = Qwen2VLImageProcessor(size=size, **settings)([drawn(height, width)], return_tensors="pt")
            name = case_name(settings, (height, width, min_pixels, max_pixels))
            digests[name] = digest(found.pixel_values, found.image_grid_thw[0])
    DIGESTS.write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
