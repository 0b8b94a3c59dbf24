"""What differs between model families: placeholders, token counts, position rule, feature layout.

A family that is not in `FAMILIES` is refused at start. Another family is one more row.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from common.embedding import EmbeddingSpec, Grid, deepstack_names
from common.errors import InvalidRequestError

MropeRule = Literal["qwen", "hf5"]

MAX_ASPECT_RATIO = 200  # these three are the defaults of transformers' Qwen2-VL image processor
DEFAULT_MIN_PIXELS = 56 * 56
DEFAULT_MAX_PIXELS = 28 * 28 * 1280


@dataclass(frozen=True, slots=True)
class VisionItem:
    """One image or clip in a prompt: where its placeholders start, its patch grid, and its temporal step.

    `interval` is the distance in position ids between two temporal grids; 1 for images and for Qwen2-VL.
    """

    offset: int
    grid_thw: Grid
    interval: float = 1.0


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table. `placeholder` is what the chat template writes once for each image."""

    model_type: str
    placeholder: str
    uses_mrope: bool


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen2_vl", placeholder="<|image_pad|>", uses_mrope=True),
        Family("qwen2_5_vl", placeholder="<|image_pad|>", uses_mrope=True),
        Family("qwen3_vl", placeholder="<|image_pad|>", uses_mrope=True),
    )
}


def family_of(config: Any) -> Family:
    """The family of a transformers configuration. Raises ValueError with the supported names for any other."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"model type {config.model_type!r} is not supported; supported are {sorted(FAMILIES)}")
    return family


def smart_resize_grid(
    height: int, width: int, *, patch_size: int, merge_size: int, min_pixels: int, max_pixels: int
) -> Grid:
    """The patch grid of an image of this displayed size, in pixels, from the size alone.

    Equal to `smart_resize` of transformers' Qwen2-VL image processor: sides are rounded half to even to multiples of
    `patch_size * merge_size`, shrunk by floor above `max_pixels`, grown by ceil below `min_pixels`. Raises ValueError
    for an aspect ratio above 200.
    """
    unit = patch_size * merge_size
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"the aspect ratio of {width} x {height} pixels is above {MAX_ASPECT_RATIO}")
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
    elif rows * columns * unit**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
    return 1, rows * merge_size, columns * merge_size


def num_image_tokens(grid_thw: Grid, merge_size: int) -> int:
    """Rows of features, and so placeholder tokens, of one image or clip."""
    return math.prod(grid_thw) // merge_size**2


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """How a checkpoint cuts images into patches and tokens; all that a prompt needs to know of an image is its size.

    `min_pixels` and `max_pixels` are the pixel budget unless a request asks for another; `hidden_size` is that of the
    text model, into which features are projected. Beside the features there are `num_deepstack` further sets of rows.
    """

    patch_size: int
    merge_size: int
    hidden_size: int
    min_pixels: int
    max_pixels: int
    num_deepstack: int = 0

    @classmethod
    def of(cls, config: Any, preprocessor: Mapping[str, Any]) -> "ImageGeometry":
        """From the transformers configuration and `preprocessor_config.json`, in either of its two spellings."""
        size = preprocessor.get("size") or {}
        return cls(
            patch_size=config.vision_config.patch_size,
            merge_size=config.vision_config.spatial_merge_size,
            hidden_size=config.get_text_config().hidden_size,
            min_pixels=preprocessor.get("min_pixels") or size.get("shortest_edge") or DEFAULT_MIN_PIXELS,
            max_pixels=preprocessor.get("max_pixels") or size.get("longest_edge") or DEFAULT_MAX_PIXELS,
            num_deepstack=len(getattr(config.vision_config, "deepstack_visual_indexes", ())),
        )

    def grid(self, height: int, width: int, *, min_pixels: int, max_pixels: int) -> Grid:
        """The patch grid of an image of this displayed size. Raises InvalidRequestError for an extreme aspect ratio."""
        units = {"patch_size": self.patch_size, "merge_size": self.merge_size}
        try:
            return smart_resize_grid(height, width, **units, min_pixels=min_pixels, max_pixels=max_pixels)
        except ValueError as exc:
            raise InvalidRequestError(str(exc), code="invalid_image") from exc

    def embedding_spec(self, grid_thw: Grid, dtype: torch.dtype) -> EmbeddingSpec:
        shape = (num_image_tokens(grid_thw, self.merge_size), self.hidden_size)
        names = ["features", *deepstack_names(self.num_deepstack)]
        return EmbeddingSpec(grid_thw=grid_thw, shapes=dict.fromkeys(names, shape), dtype=dtype)


def mrope_positions(
    token_ids: Sequence[int], items: Iterable[VisionItem], *, merge_size: int, rule: MropeRule = "qwen"
) -> tuple[Tensor, int]:
    """Qwen's three-axis position ids of a prompt with expanded placeholders, from sizes alone.

    Text advances the three axes together. A vision item spans (t, h / merge, w / merge) from one common start; what
    follows it continues after its largest position (`qwen`, the rule the published weights learned with), or after
    its largest height or width (`hf5`, transformers 5.23). They differ for clips only.

    Returns the ids as int64 `[3, len(token_ids)]` and the position of the first generated token.
    """
    positions = torch.empty(3, len(token_ids), dtype=torch.long)
    index = start = 0
    for item in items:
        positions[:, index : item.offset] = torch.arange(start, start + item.offset - index)
        start += item.offset - index
        t, h, w = item.grid_thw[0], item.grid_thw[1] // merge_size, item.grid_thw[2] // merge_size
        # One float32 product of the absolute index, as transformers does; accumulated steps would drift.
        temporal = (torch.arange(t) * torch.tensor(item.interval, dtype=torch.float32)).long()
        axes = torch.meshgrid(temporal, torch.arange(h), torch.arange(w), indexing="ij")
        index = item.offset + t * h * w
        positions[:, item.offset : index] = torch.stack(axes).reshape(3, -1) + start
        last = max(h, w, int(temporal[-1]) + 1) if rule == "qwen" else max(h, w)
        start += last
    end = start + len(token_ids) - index
    positions[:, index:] = torch.arange(start, end)
    return positions, end
