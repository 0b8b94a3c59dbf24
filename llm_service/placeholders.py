"""What stands in a prompt for each image and clip, from sizes alone: placeholder tokens, and text around them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.embedding import Grid
from common.errors import InvalidRequestError
from common.families import VisionItem, clip_interval, clip_rule_of, family_of
from common.geometry import ImageGeometry
from llm_service.engine.request import PlaceholderRange


@dataclass(frozen=True, slots=True)
class ClipShape:
    """A clip as a prompt has to know it. `timestamps` are seconds, one for each of the temporal grids of `grid_thw`."""

    grid_thw: Grid
    seconds_per_grid: float
    timestamps: tuple[float, ...]


Shape = Grid | ClipShape


@dataclass(slots=True)
class Expansion:
    """`placeholders` and `intervals` are as in `EngineInput`; positions follow from `items`."""

    token_ids: list[int] = field(default_factory=list)
    placeholders: list[list[PlaceholderRange]] = field(default_factory=list)
    intervals: list[float] = field(default_factory=list)
    items: list[VisionItem] = field(default_factory=list)


class PlaceholderExpander:
    """Puts what its size implies in the place of the one placeholder that a chat template has for an image or clip."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Any, geometry: ImageGeometry) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._geometry = geometry
        self._family = family_of(config)
        self._clips = clip_rule_of(config)
        self._added_token_ids = frozenset(tokenizer.added_tokens_decoder)  # text never joins across one
        self._image_token_id = image_token_of(config)
        self._video_token_id: int | None = getattr(config, "video_token_id", None) if self._clips else None

    def __call__(self, template_ids: Sequence[int], shapes: Sequence[Shape]) -> Expansion:
        """`shapes` in the order of the placeholders."""
        markers = [token_id for token_id in template_ids if token_id in (self._image_token_id, self._video_token_id)]
        wanted = [self._video_token_id if isinstance(shape, ClipShape) else self._image_token_id for shape in shapes]
        if markers != wanted:
            num_clips = sum(isinstance(shape, ClipShape) for shape in shapes)
            raise InvalidRequestError(
                f"the chat template made {len(markers)} placeholders, in this order, for {len(shapes) - num_clips} "
                f"images and {num_clips} clips",
                param="messages",
            )
        remaining = iter(shapes)
        found = Expansion()
        for token_id in self._without_brackets(template_ids) if self._clips == "timestamps" else template_ids:
            if token_id not in (self._image_token_id, self._video_token_id):
                found.token_ids.append(token_id)
                continue
            shape = next(remaining)
            if isinstance(shape, ClipShape):
                self._add_clip(found, shape)
            else:
                self._add_image(found, shape)
        return found

    def _add_image(self, found: Expansion, grid: Grid) -> None:
        ranges = []
        for piece in self._geometry.layout(grid):
            if isinstance(piece, str):
                text_ids = self._encode(piece)
                is_shared = self._family.shares_boundary and found.token_ids[-1:] == text_ids
                found.token_ids += [] if is_shared else text_ids
            else:
                ranges.append(PlaceholderRange(len(found.token_ids), piece))
                found.token_ids += [self._image_token_id] * piece
        found.placeholders.append(ranges)
        found.intervals.append(1.0)
        found.items.append(VisionItem(ranges[0].offset, grid))

    def _add_clip(self, found: Expansion, shape: ClipShape) -> None:
        """Temporal grids follow each other and are one item for positions, or each stands behind its time."""
        assert self._video_token_id is not None
        one_grid = (1, *shape.grid_thw[1:])
        num_tokens = self._geometry.num_tokens(one_grid)
        interval = clip_interval(self._config, shape.seconds_per_grid)
        if self._clips != "timestamps":
            found.items.append(VisionItem(len(found.token_ids), shape.grid_thw, interval))
        for timestamp in shape.timestamps:
            if self._clips == "timestamps":
                self._add_text(found, f"<{timestamp:.1f} seconds>")
                found.token_ids.append(self._config.vision_start_token_id)
                found.items.append(VisionItem(len(found.token_ids), one_grid))
            found.placeholders.append([PlaceholderRange(len(found.token_ids), num_tokens)])
            found.intervals.append(interval)
            found.token_ids += [self._video_token_id] * num_tokens
            if self._clips == "timestamps":
                found.token_ids.append(self._config.vision_end_token_id)

    def _add_text(self, found: Expansion, text: str) -> None:
        """As if it had stood in the prompt before that was tokenized: it may join with the text before it."""
        start = len(found.token_ids)
        while start and found.token_ids[start - 1] not in self._added_token_ids:
            start -= 1
        before: str = self._tokenizer.decode(found.token_ids[start:])
        # what looks like a control token there is text
        found.token_ids[start:] = self._tokenizer.encode(
            before + text, add_special_tokens=False, split_special_tokens=True
        )

    def _without_brackets(self, template_ids: Sequence[int]) -> list[int]:
        """Each grid of Qwen3-VL's clips has brackets of its own, in the place of the template's around the clip."""
        start, video, end = self._config.vision_start_token_id, self._video_token_id, self._config.vision_end_token_id
        neighbours = zip([None, *template_ids], template_ids, [*template_ids[1:], None], strict=False)
        return [
            token_id
            for before, token_id, after in neighbours
            if (token_id, after) != (start, video) and (before, token_id) != (video, end)
        ]

    def _encode(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return token_ids


def image_token_of(config: Any) -> int:
    """Raises ValueError for a configuration from before placeholders were tokens of the text model."""
    token_id, vocab_size = config.image_token_id, config.get_text_config().vocab_size
    if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
        raise ValueError(f"config.json: the image token is {token_id}, none of the text model's {vocab_size}")
    return token_id
