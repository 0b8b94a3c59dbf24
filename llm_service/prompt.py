"""Messages -> what the engine takes: chat template, tokens, expanded placeholders, position ids. No pixels."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.config import TokenReduction
from common.embedding import Grid
from common.errors import InvalidRequestError
from common.families import MropeRule, family_of, mrope_positions
from common.geometry import ImageGeometry, PatchGeometry
from llm_service.chat import ChatMessage, Tool, VisualPart
from llm_service.engine.request import PlaceholderRange
from llm_service.placeholders import ClipShape, PlaceholderExpander


@dataclass(frozen=True, slots=True)
class EngineInput:
    """`positions` is int64 `[3, len(token_ids)]`, with equal axes for a family without M-RoPE.

    `placeholders` has for each image, and for each temporal grid of a clip, in order, the ranges of its rows, in order:
    several where text parts an image's tiles. `intervals` are the steps between temporal grids, 1 for images.
    Where a part of the rows is kept only, `whole` is the prompt with all of them. How many are kept follows from the
    size of an image, which ones is known when it is encoded; until then positions are those of the first.
    """

    token_ids: list[int]
    positions: Tensor
    next_position: int
    placeholders: list[list[PlaceholderRange]]
    intervals: list[float]
    whole: "EngineInput | None" = None

    @property
    def num_positions(self) -> int:
        """What the prompt takes of the model's length: more than its tokens where the seconds of a clip are more."""
        return max(len(self.token_ids), self.next_position)

    @property
    def num_tokens_of_images(self) -> list[int]:
        return [sum(placeholder.length for placeholder in ranges) for ranges in self.placeholders]


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """What the chat template is given beside the messages. With `continue_final_message` the answer goes on in it."""

    tools: tuple[Tool, ...] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, bool] = field(default_factory=dict)


PLAIN = TemplateOptions()


def keep_rows(whole: EngineInput, kept: Sequence[Tensor], *, uses_mrope: bool) -> EngineInput:
    """The prompt with `kept` rows of each image only, ascending indices among its rows.

    With M-RoPE the rows and the text after them stay at the positions of the whole; others count what is there.
    """
    stays = torch.ones(len(whole.token_ids), dtype=torch.bool)
    placeholders = []
    num_dropped = 0
    for ranges, rows in zip(whole.placeholders, kept, strict=True):
        left = []
        first = 0  # row of the image at the start of a range
        for place in ranges:
            within = rows[(rows >= first) & (rows < first + place.length)] - first
            stays[place.offset : place.offset + place.length] = False
            stays[place.offset + within] = True
            left.append(PlaceholderRange(place.offset - num_dropped, len(within)))
            num_dropped += place.length - len(within)
            first += place.length
        placeholders.append(left)
    token_ids = torch.tensor(whole.token_ids)[stays].tolist()
    if uses_mrope:
        positions, next_position = whole.positions[:, stays], whole.next_position
    else:
        positions, next_position = torch.arange(len(token_ids)).expand(3, -1), len(token_ids)
    return dataclasses.replace(
        whole,
        token_ids=token_ids,
        positions=positions,
        next_position=next_position,
        placeholders=placeholders,
        whole=whole,
    )


def first_rows(ranges: Sequence[PlaceholderRange], reduction: TokenReduction | None) -> Tensor:
    """As many rows of an image as will be kept of each range."""
    lengths = [place.length for place in ranges]
    numbers = lengths if reduction is None else map(reduction.num_kept, lengths)
    starts = accumulate([0, *lengths[:-1]])
    return torch.cat([start + torch.arange(number) for start, number in zip(starts, numbers, strict=True)])


class PromptProcessor:
    """Lays a conversation out in tokens, from text and image sizes alone."""

    def __init__(
        self,
        directory: Path,
        config: Any,
        geometry: ImageGeometry,
        mrope_rule: MropeRule,
        max_model_len: int,
        reduction: TokenReduction | None = None,
    ) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
        self.family = family_of(config)
        self._chat_template = chat_template(directory, self.tokenizer, self.family.chat_template)
        self._beginning = beginning_of_text(self.tokenizer)
        self._expander = PlaceholderExpander(self.tokenizer, config, geometry)
        self.end_token_id: int = self.tokenizer.eos_token_id  # of a turn
        self._vocab_size: int = config.get_text_config().vocab_size
        self._geometry = geometry
        self._mrope_rule = mrope_rule
        self._max_model_len = max_model_len
        self._reduction = reduction

    def __call__(
        self, messages: Sequence[ChatMessage], shapes: Sequence[Grid | ClipShape], template: TemplateOptions = PLAIN
    ) -> EngineInput:
        """`shapes` has the grid of each image and the shape of each clip, in order. Raises InvalidRequestError for a
        prompt that is too long."""
        return self.lay_out(self._render(messages, template), shapes)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Plain text, in which control tokens are what they are."""
        token_ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return token_ids

    def tokenize_as_text(self, text: str) -> list[int]:
        """Text in which control tokens are text, too."""
        token_ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return token_ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Raises InvalidRequestError for an id that is none."""
        self._check_ids(token_ids, "tokens")
        text: str = self.tokenizer.decode(list(token_ids))
        return text

    def lay_out_text(self, token_ids: Sequence[int], param: str = "prompt") -> EngineInput:
        """Tokens without images. Raises InvalidRequestError for those that are no prompt."""
        if not token_ids:
            raise InvalidRequestError("the prompt has no tokens", param=param)
        self._check_ids(token_ids, param)
        return self.lay_out(token_ids)

    def lay_out(self, template_ids: Sequence[int], shapes: Sequence[Grid | ClipShape] = ()) -> EngineInput:
        """Tokens in which each image or clip is one placeholder still."""
        found = self._expander(template_ids, shapes)
        num_image_tokens = sum(place.length for ranges in found.placeholders for place in ranges)
        kept = [first_rows(ranges, self._reduction) for ranges in found.placeholders]
        num_dropped = num_image_tokens - sum(map(len, kept))
        num_tokens = len(found.token_ids) - num_dropped
        if num_tokens >= self._max_model_len:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens, {num_image_tokens - num_dropped} of them of images; "
                f"prompt and answer must fit into {self._max_model_len} (engine.max_model_len)",
                param="messages",
                code="context_length_exceeded",
            )
        if self.family.uses_mrope:
            assert isinstance(self._geometry, PatchGeometry)
            positions, next_position = mrope_positions(
                found.token_ids, found.items, merge_size=self._geometry.merge_size, rule=self._mrope_rule
            )
        else:
            next_position = len(found.token_ids)
            positions = torch.arange(next_position).expand(3, -1)
        prompt = EngineInput(found.token_ids, positions, next_position, found.placeholders, found.intervals)
        if num_dropped:
            prompt = self.with_rows(prompt, kept)
        if prompt.next_position >= self._max_model_len:
            raise InvalidRequestError(
                f"the time of the clips takes the prompt to position {prompt.next_position}; prompt and answer must "
                f"fit into {self._max_model_len} (engine.max_model_len)",
                param="messages",
                code="context_length_exceeded",
            )
        return prompt

    def with_rows(self, prompt: EngineInput, kept: Sequence[Tensor]) -> EngineInput:
        """See `keep_rows()`."""
        return keep_rows(prompt.whole or prompt, kept, uses_mrope=self.family.uses_mrope)

    def instruction(self, messages: Sequence[ChatMessage]) -> str:
        """The text that features depend on; empty for most families."""
        return "\n".join(message.text for message in messages) if self.family.needs_instruction else ""

    def _check_ids(self, token_ids: Sequence[int], param: str) -> None:
        if not all(0 <= token_id < self._vocab_size for token_id in token_ids):
            raise InvalidRequestError(f"token ids are from 0 to {self._vocab_size - 1}", param=param)

    def _render(self, messages: Sequence[ChatMessage], template: TemplateOptions) -> list[int]:
        """With one placeholder for each image. Control tokens that a user typed stay text."""
        if template.tools and "tools" not in self._chat_template:
            raise InvalidRequestError(
                "this model was not taught to call tools: its chat template has no place for them",
                param="tools",
                code="unsupported_parameter",
            )
        try:
            encoded = self.tokenizer.apply_chat_template(
                [
                    (space_text_after_images(message) if self.family.spaces_text else message).for_template(
                        string_content=self.family.string_content
                    )
                    for message in messages
                ],
                chat_template=self._chat_template,
                tools=[tool.for_template() for tool in template.tools] or None,
                add_generation_prompt=template.add_generation_prompt,
                continue_final_message=template.continue_final_message,
                tokenize=True,
                return_dict=True,
                sanitize_control_tokens=True,
                **template.variables,
            )
        except (TemplateError, ValueError, TypeError) as exc:
            raise InvalidRequestError(
                "the model's chat template does not take these messages", param="messages", code="template_error"
            ) from exc
        token_ids: list[int] = encoded["input_ids"]
        return token_ids if set(self._beginning) & set(token_ids) else self._beginning + token_ids


def chat_template(directory: Path, tokenizer: PreTrainedTokenizerBase, default: str | None) -> str:
    """The processor's template before the tokenizer's, which may know no images; raises ValueError without any."""
    path = directory / "chat_template.json"
    if path.exists():
        template: str = json.loads(path.read_text())["chat_template"]
        return template
    found = tokenizer.chat_template or default
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str):
        raise ValueError(f"{directory} has no chat template")
    return found


def beginning_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer itself puts first, if it does; chat templates may leave it out."""
    is_added = tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if is_added else []


def space_text_after_images(message: ChatMessage) -> ChatMessage:
    """Equal to transformers' Idefics2 processor, which parts a word from the image before it."""
    content: list[str | VisualPart] = []
    for part in message.content:
        if isinstance(part, str) and content and not isinstance(content[-1], str):
            part = re.sub(r"^(?=[^\s<])", " ", part)
        content.append(part)
    return dataclasses.replace(message, content=content)
