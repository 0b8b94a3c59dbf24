"""What differs between model families, in one table; the only place that knows a family by its name.

A family that is not in `FAMILIES` is refused at start. Another family is one more row, and a function that makes its
geometry from the checkpoint's configuration.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from common.embedding import Grid
from common.frames import FRAMES_PER_GRID
from common.geometry import (
    AnyresGeometry,
    FixedGeometry,
    ImageGeometry,
    Layout,
    PatchGeometry,
    TiledGeometry,
    split_rows_and_columns,
)

MropeRule = Literal["qwen", "hf5"]
ClipRule = Literal["grids", "seconds", "timestamps"]

DEFAULT_MIN_PIXELS = 56 * 56  # these two are the defaults of transformers' Qwen2-VL image processor
DEFAULT_MAX_PIXELS = 28 * 28 * 1280

_FAKE, _IMAGE = "<fake_token_around_image>", "<image>"

# Base models have no chat template: as transformers' processors, images first, even before the beginning of the text.
_IMAGES_THEN_TEXT = (
    "{% for message in messages %}{% for part in message.content if part.type == 'image' %}<image>{% endfor %}"
    "{% endfor %}{{ bos_token }}{% for message in messages %}{{ '\n' if not loop.first }}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class VisionItem:
    """One image or clip in a prompt: where its placeholders start, its patch grid, and its temporal step.

    `interval` is the distance in position ids between two temporal grids; 1 for images and for Qwen2-VL.
    """

    offset: int
    grid_thw: Grid
    interval: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table.

    `geometry` is made from the transformers configuration and what says how images are processed: the fields of
    `preprocessor_config.json` for a family whose pixels we make (`own_pixels`), else transformers' image processor,
    which is called with `processor_options`. `chat_template` is for checkpoints without one; `string_content` says that
    templates take text as a string. With `counts_images` features depend on whether an image is alone in its prompt,
    with `needs_instruction` on the text of the prompt. Of two images with nothing between them `shares_boundary` lets
    the second begin with the token that the first ends with, and `spaces_text` parts the text after an image from it.

    `clips` says how time is told: a step of one position for each temporal grid, or of so many as its seconds are worth
    (`tokens_per_second`), or the time as text before each grid. None: clips are refused.
    """

    model_type: str
    geometry: Callable[[Any, Any], ImageGeometry]
    uses_mrope: bool = False
    own_pixels: bool = False
    processor_options: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    string_content: bool = False
    counts_images: bool = False
    needs_instruction: bool = False
    shares_boundary: bool = False
    spaces_text: bool = False
    clips: ClipRule | None = None


def _patches(config: Any, preprocessor: Mapping[str, Any]) -> ImageGeometry:
    """`preprocessor` is `preprocessor_config.json`, in either of its two spellings."""
    size = preprocessor.get("size") or {}
    return PatchGeometry(
        patch_size=config.vision_config.patch_size,
        merge_size=config.vision_config.spatial_merge_size,
        hidden_size=config.get_text_config().hidden_size,
        min_pixels=preprocessor.get("min_pixels") or size.get("shortest_edge") or DEFAULT_MIN_PIXELS,
        max_pixels=preprocessor.get("max_pixels") or size.get("longest_edge") or DEFAULT_MAX_PIXELS,
        num_deepstack=len(getattr(config.vision_config, "deepstack_visual_indexes", ())),
    )


# rows beside those of patches that a LLaVA tower puts first
_TOWERS = {"clip_vision_model": 1, "dinov2": 1, "siglip_vision_model": 0}


def _num_other_rows(config: Any) -> int:
    """What is left of these rows when `default` has dropped the first one."""
    tower: str = config.vision_config.model_type
    if tower not in _TOWERS:
        raise ValueError(f"vision tower {tower!r} is not supported; supported are {sorted(_TOWERS)}")
    drops_first: bool = config.vision_feature_select_strategy == "default"
    return _TOWERS[tower] - drops_first


def _llava(config: Any, processor: Any) -> ImageGeometry:
    size = processor.crop_size if processor.do_center_crop else processor.size
    rows, columns = (length // config.vision_config.patch_size for length in (size["height"], size["width"]))
    return _fixed(config, rows * columns + _num_other_rows(config), grid=(1, rows, columns))


def _anyres(config: Any, processor: Any, max_tiles: int | None = None) -> ImageGeometry:
    if _num_other_rows(config):
        raise ValueError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} leaves rows of the tower "
            f"{config.vision_config.model_type!r} that are no patches"
        )
    return AnyresGeometry(
        hidden_size=config.get_text_config().hidden_size,
        tile_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        resolutions=[(height, width) for height, width in config.image_grid_pinpoints],
        max_tiles=max_tiles,
    )


def _onevision(config: Any, processor: Any) -> ImageGeometry:
    return _anyres(config, processor, max_tiles=int(config.vision_aspect_ratio.removeprefix("anyres_max_")))


def _internvl(config: Any, processor: Any) -> ImageGeometry:
    tile = processor.size["height"], processor.size["width"]

    def cut(height: int, width: int) -> tuple[int, int]:
        columns, rows = get_optimal_tiled_canvas((height, width), tile, processor.min_patches, processor.max_patches)
        return rows, columns

    def write(grid: Grid) -> Layout:
        return "<img>", grid[0] * config.image_seq_length, "</img>"

    return TiledGeometry(hidden_size=config.get_text_config().hidden_size, cut=cut, write=write)


def _idefics2(config: Any, processor: Any) -> ImageGeometry:
    num_views = 5 if processor.do_image_splitting else 1  # quarters and the whole
    layout = (*(_FAKE, config.perceiver_config.resampler_n_latents) * num_views, _FAKE)
    return FixedGeometry(
        hidden_size=config.get_text_config().hidden_size, fixed_grid=(num_views, 1, 1), fixed_layout=layout
    )


def _idefics3(config: Any, processor: Any) -> ImageGeometry:
    vision = config.vision_config
    num_tokens = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    whole = (f"{_FAKE}<global-img>", num_tokens, _FAKE)

    def write(grid: Grid) -> Layout:
        views, rows, columns = grid
        if views == 1:
            return whole
        pieces: list[str | int] = []
        for row, column in ((row, column) for row in range(rows) for column in range(columns)):
            newline = "\n" if row and not column else ""
            pieces += [f"{newline}{_FAKE}<row_{row + 1}_col_{column + 1}>", num_tokens]
        return (*pieces, f"\n\n{whole[0]}", *whole[1:])

    edges = {"longest_edge": processor.size["longest_edge"], "tile_size": processor.max_image_size["longest_edge"]}
    return TiledGeometry(
        hidden_size=config.get_text_config().hidden_size,
        cut=partial(split_rows_and_columns, **edges) if processor.do_image_splitting else lambda height, width: (1, 1),
        write=write,
    )


def _queries(config: Any, processor: Any) -> ImageGeometry:
    return _fixed(config, config.num_query_tokens)


def _fixed(config: Any, num_tokens: int, grid: Grid = (1, 1, 1)) -> ImageGeometry:
    return FixedGeometry(hidden_size=config.get_text_config().hidden_size, fixed_grid=grid, fixed_layout=(num_tokens,))


_QWEN: Mapping[str, Any] = {"geometry": _patches, "uses_mrope": True, "own_pixels": True, "string_content": True}
_BLIP: Mapping[str, Any] = {"geometry": _queries, "chat_template": _IMAGES_THEN_TEXT}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="qwen2_vl", **_QWEN, clips="grids"),
        Family(model_type="qwen2_5_vl", **_QWEN, clips="seconds"),
        Family(model_type="qwen3_vl", **_QWEN, clips="timestamps"),
        Family(model_type="llava", geometry=_llava),
        Family(model_type="llava_next", geometry=_anyres),
        Family(model_type="llava_onevision", geometry=_onevision, counts_images=True),
        Family(model_type="internvl", geometry=_internvl, processor_options={"crop_to_patches": True}),
        Family(model_type="idefics2", geometry=_idefics2, shares_boundary=True, spaces_text=True),
        Family(model_type="idefics3", geometry=_idefics3),
        Family(model_type="smolvlm", geometry=_idefics3),
        Family(model_type="blip-2", **_BLIP),
        Family(model_type="instructblip", **_BLIP, needs_instruction=True),
    )
}

# Refused with a reason: their decoders do more with an image than read rows in place of tokens.
_REFUSED = {
    "mllama": "its decoder reads images by cross-attention",
    "idefics": "its decoder reads images by cross-attention",
    "paligemma": "its decoder lets the prompt attend to what follows it",
    "gemma3": "its decoder lets the tokens of an image attend to those that follow",
}


def family_of(config: Any) -> Family:
    """The family of a transformers configuration. Raises ValueError with the supported names for any other."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        reason = _REFUSED.get(config.model_type)
        raise ValueError(
            f"model type {config.model_type!r} is not supported{f' ({reason})' if reason else ''}; supported are "
            f"{sorted(FAMILIES)}"
        )
    return family


def clip_rule_of(config: Any) -> ClipRule | None:
    """None if the model takes no clips."""
    has_pairs = getattr(config.vision_config, "temporal_patch_size", None) == FRAMES_PER_GRID
    return family_of(config).clips if has_pairs else None


def clip_interval(config: Any, seconds_per_grid: float) -> float:
    """The step of position ids between two temporal grids, as `VisionItem` takes it."""
    if clip_rule_of(config) != "seconds":
        return 1.0
    # One float32 product, as transformers makes it.
    seconds = torch.tensor(seconds_per_grid, dtype=torch.float32)
    return float(config.vision_config.tokens_per_second * seconds)


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
