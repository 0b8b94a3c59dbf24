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
from common.device import to_device
from common.embedding import Grid
from common.errors import InvalidRequestError
from common.frames import Frame, RgbFrame, unpack_frames
from common.geometry import PatchGeometry
from common.media import MediaParams, open_image, orientation_of
from encoder_service.image_blocks import check_blocks

_VERSION = 2  # of this file's arithmetic; part of the namespace

Planes = Sequence[np.ndarray[Any, Any]]  # red, green and blue, each uint8 `[H, W]`

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
    """`patches` is uint8 `[N, 3, P, P]`, of two frames `[N, 3, 2, P, P]`; those that become one token are adjacent."""

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
        """Raises InvalidRequestError for bytes that are not a whole image, or two frames, within the limits."""
        if params.frames == 1:
            return self._of_image(decode(data, self.limits), params)
        first, second = (self._of_image(frame, params) for frame in decode_frames(data, self.limits))
        return PreprocessedImage(torch.stack([first.patches, second.patches], 2), first.grid_thw)

    def _of_image(self, image: Image.Image, params: MediaParams) -> PreprocessedImage:
        grid = params.grid(self.geometry, image.height, image.width)
        return PreprocessedImage(patches=self.patchify(self.resize(image, grid), grid), grid_thw=grid)

    def resize(self, image: Image.Image, grid: Grid) -> Planes:
        """An RGB image at the size of the grid."""
        size = (grid[2] * self.geometry.patch_size, grid[1] * self.geometry.patch_size)
        if image.size != size and self.image_backend == "torchvision":
            return _resize_as_torchvision(image, size)
        resized = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
        return [np.frombuffer(resized.tobytes("raw", band), np.uint8).reshape(size[::-1]) for band in "RGB"]

    def patchify(self, planes: Planes, grid: Grid) -> Tensor:
        """The patches of a `PreprocessedImage`, of planes of the size of the grid."""
        patch, merge = self.geometry.patch_size, self.geometry.merge_size
        _, h, w = grid
        # A row of a patch is one item: copying item by item is twice as fast as byte by byte.
        rows = np.empty((h // merge, w // merge, merge, merge, 3, patch), f"V{patch}")
        for channel, plane in enumerate(planes):
            cut = plane.view(rows.dtype).reshape(h // merge, merge, patch, w // merge, merge)
            rows[..., channel, :] = cut.transpose(0, 3, 1, 4, 2)
        return torch.from_numpy(rows.view(np.uint8).reshape(h * w, 3, patch, patch))

    def model_inputs(self, images: Sequence[PreprocessedImage], device: torch.device) -> dict[str, Tensor]:
        """What `get_image_features` takes for a batch, on its device."""
        patches = to_device(device, torch.cat(_with_equal_frames([image.patches for image in images])))
        return {
            "pixel_values": pixel_values(patches, to_device(device, self._table), self.temporal_patch_size),
            "image_grid_thw": to_device(device, [image.grid_thw for image in images]),
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


def _resize_as_torchvision(image: Image.Image, size: tuple[int, int]) -> Planes:
    """What torchvision does with a uint8 tensor on a CPU: torch's own operator, in fixed point, rounded once."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size=(size[1], size[0]), mode="bicubic", antialias=True)
    return list(resized[0].contiguous().numpy())


def decode(data: bytes, limits: ImageLimits) -> Image.Image:
    """An upright RGB image: EXIF orientation applied, transparency composited on white, 16 bits scaled to 8."""
    image = open_image(data, limits)
    check_blocks(image, data, limits)
    orientation = orientation_of(image)
    try:
        image.load()
        upright = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
        return _to_rgb(upright)
    except (MemoryError, InvalidRequestError):
        raise
    except Exception as exc:  # decoders raise anything; their text may hold addresses, so it is not passed on
        raise InvalidRequestError("the image is truncated or damaged", code="invalid_image") from exc


def decode_frames(data: bytes, limits: ImageLimits) -> list[Image.Image]:
    """The two upright RGB frames of a temporal grid."""
    return [_decode_frame(frame, limits) for frame in unpack_frames(data)]


def _decode_frame(frame: Frame, limits: ImageLimits) -> Image.Image:
    if isinstance(frame, RgbFrame):
        return Image.fromarray(np.frombuffer(frame.pixels, np.uint8).reshape(frame.height, frame.width, 3))
    return decode(frame, limits)


def decoder_version() -> str:
    """The decoders behind Pillow differ in pixels between versions, so they are in the namespace."""
    libraries = [f"{name} {features.version(name)}" for name in ("libjpeg_turbo", "webp")]
    return ", ".join([f"pillow {pillow_version}", *libraries])


def pixel_values(patches: Tensor, table: Tensor, temporal_patch_size: int) -> Tensor:
    """uint8 `[N, 3, P, P]` and float32 `[3, 256]` to float32 `[N, 3 * temporal_patch_size * P * P]`, on their device.

    A still image doubles its frame; patches of a clip, `[N, 3, temporal_patch_size, P, P]`, have theirs. A table
    look-up is exact, whatever the device.
    """
    channels = torch.arange(3, dtype=torch.int32, device=patches.device).view(3, *[1] * (patches.ndim - 2))
    entries = patches.int() + 256 * channels
    values = table.flatten().index_select(0, entries.flatten()).view(patches.shape)
    if values.ndim == 4:
        values = values[:, :, None].expand(-1, -1, temporal_patch_size, -1, -1)
    return values.reshape(len(patches), -1)


def _with_equal_frames(patches: Sequence[Tensor]) -> list[Tensor]:
    """Stills among grids of clips get a second frame here, so that one tensor can hold all."""
    frames = [one.shape[2] for one in patches if one.ndim == 5]
    if len(frames) in (0, len(patches)):
        return list(patches)
    return [one if one.ndim == 5 else one[:, :, None].expand(-1, -1, frames[0], -1, -1) for one in patches]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        image = _eight_bits(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _eight_bits(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.uint32)
    scaled = Image.fromarray((levels >> 8).astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:
        scaled.putalpha(Image.fromarray((levels != clear).astype(np.uint8) * 255))
    return scaled
