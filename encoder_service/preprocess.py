"""Image bytes to uint8 patches on the CPU, and patches to pixel values on the device.

Equal, bit for bit, to transformers' Qwen2VLImageProcessorPil or, with the image backend `torchvision`, to its
Qwen2VLImageProcessor, given the oriented image. Patches stay uint8 and carry one frame until they reach the device: 8
times fewer bytes than the processor's float32 pixel values.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, features
from PIL import __version__ as pillow_version
from torch import Tensor

from common.config import ImageBackend, ImageLimits
from common.embedding import Grid
from common.errors import InvalidRequestError
from common.geometry import PatchGeometry
from common.media import MediaParams, open_image, orientation_of

_VERSION = 1  # of this file's arithmetic; part of the namespace

Pixels = np.ndarray[Any, Any]

# OPENAI_CLIP_MEAN and OPENAI_CLIP_STD, the processor's defaults
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class PreprocessedImage:
    """`patches` is uint8 `[N, 3, P, P]`; the patches that become one token are adjacent."""

    patches: Tensor
    grid_thw: Grid

    @property
    def num_patches(self) -> int:
        return self.patches.shape[0]


class ImagePreprocessor:
    """Decodes, orients, resizes and cuts images the way the checkpoint's own processor does. Thread-safe.

    `temporal_patch_size` frames are in a patch.
    """

    can_batch = True

    def __init__(
        self,
        geometry: PatchGeometry,
        preprocessor: Mapping[str, Any],
        limits: ImageLimits,
        temporal_patch_size: int = 2,
        image_backend: ImageBackend = "pil",
    ) -> None:
        for option in ("do_resize", "do_rescale", "do_normalize"):
            if not preprocessor.get(option, True):
                raise ValueError(f"preprocessor_config.json: {option}=false is not supported")
        if preprocessor.get("resample", Image.Resampling.BICUBIC) != Image.Resampling.BICUBIC:
            raise ValueError("preprocessor_config.json: only bicubic resampling is supported")
        self.geometry = geometry
        self.limits = limits
        self.temporal_patch_size = temporal_patch_size
        self.image_backend = image_backend
        self.rescale_factor: float = preprocessor.get("rescale_factor", 1 / 255)
        self.mean = tuple(preprocessor.get("image_mean") or _MEAN)
        self.std = tuple(preprocessor.get("image_std") or _STD)
        self._table = self.normalization_table()

    def __call__(self, data: bytes, params: MediaParams) -> PreprocessedImage:
        """Raises InvalidRequestError for bytes that are not a whole image within the limits."""
        image = decode(data, self.limits)
        grid = params.grid(self.geometry, image.height, image.width)
        return PreprocessedImage(patches=self.patchify(self.resize(image, grid), grid), grid_thw=grid)

    def resize(self, image: Image.Image, grid: Grid) -> Pixels:
        """An RGB image as uint8 `[H, W, 3]`, of the size of the grid. May share the memory of the image."""
        size = (grid[2] * self.geometry.patch_size, grid[1] * self.geometry.patch_size)
        if image.size == size:
            return np.asarray(image)
        return _resize_as_pil(image, size) if self.image_backend == "pil" else _resize_as_torchvision(image, size)

    def patchify(self, pixels: Pixels, grid: Grid) -> Tensor:
        """uint8 `[H, W, 3]` of the size of the grid to the patches of a `PreprocessedImage`: one copy."""
        patch, merge = self.geometry.patch_size, self.geometry.merge_size
        _, h, w = grid
        blocks = pixels.reshape(h // merge, merge, patch, w // merge, merge, patch, 3)
        patches = np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5))
        return torch.from_numpy(patches.reshape(h * w, 3, patch, patch))

    def model_inputs(self, images: Sequence[PreprocessedImage], device: torch.device) -> dict[str, Tensor]:
        """What `get_image_features` takes for a batch, on its device."""
        patches = torch.cat([image.patches for image in images]).to(device)
        return {
            "pixel_values": pixel_values(patches, self._table.to(device), self.temporal_patch_size),
            "image_grid_thw": torch.tensor([image.grid_thw for image in images], device=device),
        }

    def fingerprint(self) -> str:
        """Everything here that pixel values depend on besides the image and its params, for the namespace."""
        settings = [self.rescale_factor, self.mean, self.std, self.geometry.patch_size, self.geometry.merge_size]
        return json.dumps([self.image_backend, _VERSION, *settings])

    def normalization_table(self) -> Tensor:
        """float32 `[3, 256]`: the pixel value of each level of each channel, by the processor's own arithmetic."""
        if self.image_backend == "torchvision":  # which scales the constants to the levels, not the levels to one
            scaled = torch.tensor([self.mean, self.std])[:, :, None] * (1.0 / self.rescale_factor)
            return (torch.arange(256.0) - scaled[0]) / scaled[1]
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(values, np.float32)[:, None] for values in (self.mean, self.std))
        return torch.from_numpy((levels - mean) / std)


def _resize_as_pil(image: Image.Image, size: tuple[int, int]) -> Pixels:
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def _resize_as_torchvision(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """What torchvision does with a uint8 tensor on a CPU: torch's own operator, in fixed point, rounded once."""
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size=(size[1], size[0]), mode="bicubic", antialias=True)
    pixels: Pixels = resized[0].permute(1, 2, 0).numpy()
    return pixels


def decode(data: bytes, limits: ImageLimits) -> Image.Image:
    """An upright RGB image: EXIF orientation applied, transparency composited on white, 16 bits scaled to 8."""
    image = open_image(data, limits)
    orientation = orientation_of(image)
    try:
        image.load()
        upright = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
        return _to_rgb(upright)
    except MemoryError:
        raise
    except Exception as exc:  # decoders raise anything; their text may hold addresses, so it is not passed on
        raise InvalidRequestError("the image is truncated or damaged", code="invalid_image") from exc


def decoder_version() -> str:
    """The decoders behind Pillow differ in pixels between versions, so they are in the namespace."""
    libraries = [f"{name} {features.version(name)}" for name in ("libjpeg_turbo", "webp")]
    return ", ".join([f"pillow {pillow_version}", *libraries])


def pixel_values(patches: Tensor, table: Tensor, temporal_patch_size: int) -> Tensor:
    """uint8 `[N, 3, P, P]` and float32 `[3, 256]` to float32 `[N, 3 * temporal_patch_size * P * P]`, on their device.

    A still image doubles its frame. A table look-up is exact, whatever the device.
    """
    channels = [table[channel][patches[:, channel].int()] for channel in range(3)]
    values = torch.stack(channels, 1)[:, :, None]
    return values.expand(-1, -1, temporal_patch_size, -1, -1).reshape(len(patches), -1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
