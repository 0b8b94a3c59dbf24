"""Messages -> what the engine takes: chat template, tokens, expanded placeholders, position ids. No pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.embedding import Grid
from common.errors import InvalidRequestError
from common.families import ImageGeometry, MropeRule, VisionItem, mrope_positions, num_image_tokens
from llm_service.chat import ChatMessage
from llm_service.engine.request import PlaceholderRange


@dataclass(frozen=True, slots=True)
class EngineInput:
    """`positions` is int64 `[3, len(token_ids)]`; `placeholders` has one range for each image, in order."""

    token_ids: list[int]
    positions: Tensor
    next_position: int
    placeholders: list[PlaceholderRange]

    @property
    def num_image_tokens(self) -> int:
        return sum(placeholder.length for placeholder in self.placeholders)


class PromptProcessor:
    """Lays a conversation out in tokens, from text and image sizes alone."""

    def __init__(
        self, directory: Path, config: Any, geometry: ImageGeometry, mrope_rule: MropeRule, max_model_len: int
    ) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{directory} has no chat template")
        self._image_token_id: int = config.image_token_id
        self._geometry = geometry
        self._mrope_rule = mrope_rule
        self._max_model_len = max_model_len

    def __call__(self, messages: Sequence[ChatMessage], grids: Sequence[Grid]) -> EngineInput:
        """`grids` has one entry for each image, in order. Raises InvalidRequestError for a prompt that is too long."""
        # Control tokens that a user typed stay text.
        encoded = self.tokenizer.apply_chat_template(
            [message.for_template() for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
        )
        token_ids, placeholders = self._expand(encoded["input_ids"], grids)
        if len(token_ids) >= self._max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens, {sum(p.length for p in placeholders)} of them of images; "
                f"prompt and answer must fit into {self._max_model_len} (engine.max_model_len)",
                param="messages",
                code="context_length_exceeded",
            )
        items = [VisionItem(p.offset, grid) for p, grid in zip(placeholders, grids, strict=True)]
        positions, next_position = mrope_positions(
            token_ids, items, merge_size=self._geometry.merge_size, rule=self._mrope_rule
        )
        return EngineInput(token_ids, positions, next_position, placeholders)

    def _expand(self, template_ids: Sequence[int], grids: Sequence[Grid]) -> tuple[list[int], list[PlaceholderRange]]:
        """Repeats the one placeholder of each image as often as its size implies."""
        num_markers = list(template_ids).count(self._image_token_id)
        if num_markers != len(grids):
            raise InvalidRequestError(
                f"the chat template made {num_markers} image placeholders for {len(grids)} images", param="messages"
            )
        remaining = iter(grids)
        token_ids: list[int] = []
        placeholders = []
        for token_id in template_ids:
            length = 1
            if token_id == self._image_token_id:
                length = num_image_tokens(next(remaining), self._geometry.merge_size)
                placeholders.append(PlaceholderRange(len(token_ids), length))
            token_ids += [token_id] * length
        return token_ids, placeholders
