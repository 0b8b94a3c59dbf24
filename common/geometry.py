"""What an image becomes in a prompt, from its size alone: a grid, and pieces of text around its feature rows."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers.image_processing_utils import select_best_resolution

from common.config import TokenReduction
from common.embedding import KEPT, EmbeddingSpec, Grid, deepstack_names
from common.errors import InvalidRequestError

# Text to be tokenized, and between it numbers of placeholder tokens, which stand for so many feature rows, in order.
Layout = tuple[str | int, ...]

MAX_ASPECT_RATIO = 200  # the default of transformers' Qwen2-VL image processor
MAX_SPLIT_EDGE = 4096  # MAX_IMAGE_SIZE of transformers' Idefics3 image processor


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageGeometry(ABC):
    """How a checkpoint cuts images into tokens; all that a prompt needs to know of an image is its size.

    `min_pixels` and `max_pixels` are the pixel budget unless a request asks for another, 0 where a family has none;
    `hidden_size` is that of the text model, into which features are projected. Beside the features there are
    `num_deepstack` further sets of rows.
    """

    hidden_size: int
    min_pixels: int = 0
    max_pixels: int = 0
    num_deepstack: int = 0

    def grid(self, height: int, width: int, *, min_pixels: int, max_pixels: int, alone: bool = True) -> Grid:
        """The grid of an image of this displayed size, in patches or tiles, as the family counts.

        `alone` says whether it is the only image of its prompt. Raises InvalidRequestError for a size that the family
        cannot take.
        """
        try:
            # Some processors enlarge the shorter side first: a line of a few pixels would fill the memory.
            check_aspect_ratio(height, width)
            return self._grid(height, width, min_pixels, max_pixels, alone)
        except ValueError as exc:
            raise InvalidRequestError(str(exc), code="invalid_image") from exc

    @abstractmethod
    def _grid(self, height: int, width: int, min_pixels: int, max_pixels: int, alone: bool) -> Grid: ...

    @abstractmethod
    def layout(self, grid_thw: Grid) -> Layout:
        """What stands in the prompt for an image of this grid."""

    def runs(self, grid_thw: Grid) -> list[int]:
        """Rows of features, and so placeholder tokens, in each of the runs that text parts."""
        return [piece for piece in self.layout(grid_thw) if isinstance(piece, int)]

    def num_tokens(self, grid_thw: Grid) -> int:
        return sum(self.runs(grid_thw))

    def embedding_spec(
        self, grid_thw: Grid, dtype: torch.dtype, reduction: TokenReduction | None = None
    ) -> EmbeddingSpec:
        names = ["features", *deepstack_names(self.num_deepstack)]
        runs = self.runs(grid_thw)
        if reduction is None:
            return EmbeddingSpec(grid_thw, dict.fromkeys(names, (sum(runs), self.hidden_size)), dtype)
        num_kept = sum(map(reduction.num_kept, runs))
        shapes = dict.fromkeys(names, (num_kept, self.hidden_size)) | {KEPT: (num_kept, 1)}
        return EmbeddingSpec(grid_thw, shapes, dtype, num_rows=sum(runs))


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchGeometry(ImageGeometry):
    """Qwen's: images of any size in patches of one size, `merge_size` squared of which become one token."""

    patch_size: int
    merge_size: int

    def _grid(self, height: int, width: int, min_pixels: int, max_pixels: int, alone: bool) -> Grid:
        units = {"patch_size": self.patch_size, "merge_size": self.merge_size}
        return smart_resize_grid(height, width, **units, min_pixels=min_pixels, max_pixels=max_pixels)

    def layout(self, grid_thw: Grid) -> Layout:
        return (num_image_tokens(grid_thw, self.merge_size),)


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedGeometry(ImageGeometry):
    """Images of any size are resized, padded or resampled to the same tokens."""

    fixed_grid: Grid
    fixed_layout: Layout

    def _grid(self, height: int, width: int, min_pixels: int, max_pixels: int, alone: bool) -> Grid:
        return self.fixed_grid

    def layout(self, grid_thw: Grid) -> Layout:
        return self.fixed_layout


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledGeometry(ImageGeometry):
    """An image is cut into rows and columns of tiles, and there is a view of the whole if that is more than one.

    The grid is (views, rows, columns); `cut` gives rows and columns for a height and width, `write` their layout.
    """

    cut: Callable[[int, int], tuple[int, int]]
    write: Callable[[Grid], Layout]

    def _grid(self, height: int, width: int, min_pixels: int, max_pixels: int, alone: bool) -> Grid:
        rows, columns = self.cut(height, width)
        num_tiles = rows * columns
        return num_tiles + (num_tiles > 1), rows, columns

    def layout(self, grid_thw: Grid) -> Layout:
        return self.write(grid_thw)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyresGeometry(ImageGeometry):
    """LLaVA-NeXT's and LLaVA-OneVision's: a view of the whole, then tiles without their padding, row by row.

    The tiles fill the one of the `resolutions` (height, width) that fits best; every row of patches ends in a newline
    row. With `max_tiles` many patches are averaged into fewer, and an image that is not alone in its prompt is not cut.
    The grid is (1, rows, columns) of patches in the view of the whole, or (2, rows, columns) in the tiles.
    """

    tile_size: int
    patch_size: int
    resolutions: Sequence[tuple[int, int]]
    max_tiles: int | None = None

    @property
    def side(self) -> int:
        """Patches along each side of a tile."""
        return self.tile_size // self.patch_size

    def _grid(self, height: int, width: int, min_pixels: int, max_pixels: int, alone: bool) -> Grid:
        if not (alone or self.max_tiles is None):
            return 1, self.side, self.side
        best: tuple[int, int] | None = select_best_resolution((height, width), self.resolutions)
        rows, columns = (length // self.tile_size * self.side for length in best or (0, 0))
        if best is not None:
            rows, columns = unpadded(height, width, rows, columns)
        if self.max_tiles is not None:
            # Equal to pack_image_features of transformers' LLaVA-OneVision.
            ratio = math.sqrt(rows * columns / (self.max_tiles * self.side**2))
            if ratio > 1.1:
                rows, columns = int(rows // ratio), int(columns // ratio)
        if not (rows and columns):
            raise ValueError(f"an image of {width} x {height} pixels is too narrow for this model")
        return 2, rows, columns

    def layout(self, grid_thw: Grid) -> Layout:
        views, rows, columns = grid_thw
        return (self.side**2 + 1,) if views == 1 else (self.side**2 + rows * (columns + 1),)


def check_aspect_ratio(height: int, width: int) -> None:
    """Raises ValueError for an image of more than 200 times one side."""
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"the aspect ratio of {width} x {height} pixels is above {MAX_ASPECT_RATIO}")


def smart_resize_grid(
    height: int, width: int, *, patch_size: int, merge_size: int, min_pixels: int, max_pixels: int
) -> Grid:
    """The patch grid of an image of this displayed size, in pixels, from the size alone.

    Equal to `smart_resize` of transformers' Qwen2-VL image processor: sides are rounded half to even to multiples of
    `patch_size * merge_size`, shrunk by floor above `max_pixels`, grown by ceil below `min_pixels`. Raises ValueError
    for an aspect ratio above 200.
    """
    unit = patch_size * merge_size
    check_aspect_ratio(height, width)
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
    elif rows * columns * unit**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
    return 1, rows * merge_size, columns * merge_size


def num_image_tokens(grid_thw: Grid, merge_size: int) -> int:
    """Rows of features, and so placeholder tokens, of one of Qwen's images or clips."""
    return math.prod(grid_thw) // merge_size**2


def unpadded(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """What is left of rows and columns of patches when those are dropped that hold nothing but padding.

    Equal to `unpad_image` of transformers' LLaVA-NeXT.
    """
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return rows - 2 * padding, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return rows, columns - 2 * padding


def split_rows_and_columns(height: int, width: int, *, longest_edge: int, tile_size: int) -> tuple[int, int]:
    """Into how many tiles an image is cut after it was resized to a `longest_edge`.

    Equal to `resize`, `resize_for_vision_encoder` and `split_images` of transformers' Idefics3 image processor, whose
    `get_number_of_image_patches` is not always.
    """
    height, width = _with_longest_edge(height, width, longest_edge)
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile_size)
        rows = math.ceil(int(columns * tile_size / ratio) / tile_size)
    else:
        rows = math.ceil(height / tile_size)
        columns = math.ceil(int(rows * tile_size * ratio) / tile_size)
    return rows, columns


def _with_longest_edge(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """The other edge becomes even, and at least 1; then neither is longer than 4096."""
    ratio = width / height
    if width >= height:
        height, width = int(longest_edge / ratio), longest_edge
        height += height % 2
    else:
        height, width = longest_edge, int(longest_edge * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > MAX_SPLIT_EDGE:
        height, width = int(MAX_SPLIT_EDGE / ratio), MAX_SPLIT_EDGE
    elif height > width and height > MAX_SPLIT_EDGE:
        height, width = MAX_SPLIT_EDGE, int(MAX_SPLIT_EDGE * ratio)
    return max(height, 1), max(width, 1)
