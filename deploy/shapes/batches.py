"""Training batches: pictures and questions about them, laid out as chats, as tensors. No device is needed.

Batch `i` of a namespace depends on `i` alone, so a run can stop, resume, and use any number of workers. To ask several
questions about pictures that are drawn and encoded once, a row holds one shared beginning (system message, pictures)
and then independent blocks of question and answer. A block sees the beginning and itself, and its positions continue
the beginning, so each is computed as the single-turn chat it stands for.

Shapes: B rows, L tokens in a row, P pictures of a group, K shapes of a picture, N predicted tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from random import Random
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from common.embedding import Grid
from common.families import VisionItem, mrope_positions
from common.geometry import num_image_tokens
from deploy.shapes.model import MROPE_RULE
from deploy.shapes.questions import FORM_CATEGORIES, LANGUAGES, LEXICONS, Question, ask
from deploy.shapes.scenes import (
    COLOURS,
    KINDS,
    MAX_SHAPES,
    MERGE_SIZE,
    Form,
    Scene,
    Size,
    grid_of,
    sample_clip,
    sample_images,
    sample_scene,
    sample_size,
)
from deploy.shapes.tokenizer import DEFAULT_SYSTEM, SYSTEM_MESSAGES, TOKEN_IDS, train_tokenizer

IM_START, IM_END = TOKEN_IDS["<|im_start|>"], TOKEN_IDS["<|im_end|>"]
VISION_START, VISION_END = TOKEN_IDS["<|vision_start|>"], TOKEN_IDS["<|vision_end|>"]
IMAGE_PAD, VIDEO_PAD, PADDING = TOKEN_IDS["<|image_pad|>"], TOKEN_IDS["<|video_pad|>"], TOKEN_IDS["<|endoftext|>"]

MAX_ROWS = 256
MAX_VISION_TOKENS = 16384  # of a batch
MAX_CLIP_SIDE = 448
MIN_FRAMES, MAX_FRAMES = 4, 6
STEPS_PER_SHAPE = 800
FIRST_STEPS = 3000  # with more single pictures, from which the rest is learned faster
LATE_STEP = 13_293  # from here on half of the chats ask before they show, which is learned last

# `blocks`: pictures, then independent questions. `text_first`: the question, then the pictures. `dialogue`: one
# conversation of several turns about one picture. `new_picture`: another picture comes in the second turn.
Layout = Literal["blocks", "text_first", "dialogue", "new_picture"]
MIXTURE: dict[tuple[Form, Layout], float] = {
    ("image", "blocks"): 0.42,
    ("image", "text_first"): 0.06,
    ("image", "dialogue"): 0.03,
    ("image", "new_picture"): 0.04,
    ("images", "blocks"): 0.21,
    ("images", "text_first"): 0.03,
    ("frames", "blocks"): 0.08,
    ("frames", "text_first"): 0.015,
    ("video", "blocks"): 0.09,
    ("video", "text_first"): 0.015,
    ("video", "dialogue"): 0.01,
}
TEXT_FIRST: dict[tuple[Form, Layout], float] = {
    ("image", "text_first"): 0.5,
    ("images", "text_first"): 0.35,
    ("frames", "text_first"): 0.08,
    ("video", "text_first"): 0.07,
}
QUESTIONS_PER_ROW: dict[Layout, int] = {"blocks": 6, "text_first": 1, "dialogue": 4, "new_picture": 4}
IMAGE_CATEGORIES: dict[str, float] = {
    "colour": 1.0,
    "shape": 1.0,
    "count": 3.0,
    "exists": 1.5,
    "where": 3.5,
    "size": 8.0,
    "describe": 3.0,
}


@dataclass(frozen=True, slots=True)
class PictureGroup:
    """Pictures of one size, to be drawn together: [B * units * frames], row by row.

    `frames` is 2 where a unit of the vision tower is a pair of frames, 1 where it is a still that is doubled.
    """

    shapes: Tensor  # float32 [P, K, 5]: kind, colour, x, y, radius
    backgrounds: Tensor  # float32 [P, 3]
    noise: Tensor  # float32 [P]
    jpeg: Tensor | None  # float32 [P], the strength of imitated JPEG
    height: int
    width: int
    frames: int


@dataclass(frozen=True, slots=True)
class Batch:
    groups: list[PictureGroup]
    token_ids: Tensor  # int16 [B, L]
    position_ids: Tensor  # int16 [3, B, L]
    block_ids: Tensor  # int8 [B, L]: 0 is seen by all that follows, n > 0 by block n, -1 is padding
    vision_index: Tensor  # int32 [B * vision tokens of a row], places in the flattened token_ids
    predicting_index: Tensor  # int32 [N], places whose next token is learned
    labels: Tensor  # int16 [N]
    weights: Tensor  # float32 [N], sums to 1
    question_of: Tensor  # int16 [N], index into `questions`
    questions: list[tuple[str, Question]]  # with the form, or the name of what it validates

    def packed(self) -> "Batch":
        """With numpy arrays, which travel between processes as plain bytes. A tensor would be handed over as an open
        file, and those dozens of small negotiations take longer than a training step."""
        return with_arrays(self, lambda tensor: tensor.numpy())

    def pin_memory(self) -> "Batch":
        """For DataLoader: unpacked and page-locked, so that the copy to the device does not make the host wait."""
        return with_arrays(self, lambda array: torch.as_tensor(array).pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """Unpacked on the device, integers as int64."""

        def move(array: Any) -> Tensor:
            tensor = torch.as_tensor(array).to(device, non_blocking=True)
            return tensor if tensor.is_floating_point() else tensor.long()

        return with_arrays(self, move)


DataclassT = TypeVar("DataclassT", PictureGroup, Batch)


def with_arrays(value: DataclassT, change: Callable[[Any], Any]) -> DataclassT:
    """A copy with every tensor or array changed, those of the groups of a batch too."""
    changed: dict[str, Any] = {}
    for field in fields(value):
        content = getattr(value, field.name)
        if isinstance(content, Tensor | np.ndarray):
            changed[field.name] = change(content)
        elif field.name == "groups":
            changed[field.name] = [with_arrays(group, change) for group in content]
    return replace(value, **changed)


class Batches(Dataset[Batch]):
    """The batches of a namespace from number `start` on; different namespaces share no pictures."""

    def __init__(self, namespace: str, start: int, stop: int, max_rows: int = MAX_ROWS) -> None:
        self.namespace, self.start, self.stop, self.max_rows = namespace, start, stop, max_rows

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self):
            raise IndexError(index)
        rng = Random(f"{self.namespace}-{self.start + index}")
        form, layout = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
        if self.start + index < FIRST_STEPS and rng.random() < 0.5:
            form, layout = "image", "blocks"
        if self.start + index >= LATE_STEP and rng.random() < 0.5:
            form, layout = rng.choices(list(TEXT_FIRST), list(TEXT_FIRST.values()))[0]
        batch = sample_batch(rng, form, layout, self.max_rows, max_shapes(self.start + index))
        return replace(batch, questions=[]).packed()  # training needs the tokens of the questions only


def max_shapes(number: int) -> int:
    """How many shapes the pictures of batch `number` have at most: one at first, then more and more.

    One shape alone teaches what the kinds and colours look like; with many from the start the answers hang on which
    shape is meant.
    """
    return min(MAX_SHAPES, 1 + number // STEPS_PER_SHAPE)


def unchanged(batch: Any) -> Any:
    """For DataLoader, which otherwise makes tensors of all arrays."""
    return batch


@lru_cache(maxsize=1)
def shared_tokenizer() -> Tokenizer:
    return train_tokenizer()


@lru_cache(maxsize=200_000)
def encode(text: str) -> tuple[int, ...]:
    return tuple(shared_tokenizer().encode(text, add_special_tokens=False).ids)


# What is in a batch


def sample_batch(
    rng: Random, form: Form, layout: Layout, max_rows: int = MAX_ROWS, most_shapes: int = MAX_SHAPES
) -> Batch:
    """All rows show pictures of the same sizes, so that they can be drawn and encoded together."""
    sizes = sample_sizes(rng, form, layout)
    vision_tokens = sum(num_image_tokens(grid_of(height, width), MERGE_SIZE) for width, height in sizes)
    num_rows = max(4, min(max_rows, MAX_VISION_TOKENS // vision_tokens))
    system = sample_system(rng)
    shown, rows = [], []
    for _ in range(num_rows):
        pictures = sample_pictures(rng, form, sizes, most_shapes)
        questions = [
            sample_question(rng, form, pictures if layout != "new_picture" else pictures[min(turn, 1) :][:1])
            for turn in range(QUESTIONS_PER_ROW[layout])
        ]
        shown.append(pictures)
        rows.append((form, questions))
    visions = vision_blocks(form, sizes)
    chats = [lay_out(layout, system, visions, questions) for _, questions in rows]
    return collate(rng, form, sizes, shown, chats)


def sample_sizes(rng: Random, form: Form, layout: Layout) -> list[Size]:
    if form == "image":
        return [sample_size(rng) for _ in range(2 if layout == "new_picture" else 1)]
    if form == "images":
        number = rng.choice((2, 2, 3))
        return [sample_size(rng)] * number if rng.random() < 0.7 else [sample_size(rng) for _ in range(number)]
    return [sample_size(rng, MAX_CLIP_SIDE)] * rng.randint(MIN_FRAMES, MAX_FRAMES)


def sample_pictures(rng: Random, form: Form, sizes: Sequence[Size], most_shapes: int = MAX_SHAPES) -> tuple[Scene, ...]:
    if form == "image":
        return tuple(sample_scene(rng, *size, max_shapes=most_shapes) for size in sizes)
    if form == "images":
        return sample_images(rng, sizes, most_shapes)
    return sample_clip(rng, *sizes[0], len(sizes))


def sample_question(rng: Random, form: Form, pictures: Sequence[Scene]) -> Question:
    """A question in either language, the categories weighted by how hard they are to learn."""
    while True:
        if form == "image":
            category = rng.choices(list(IMAGE_CATEGORIES), list(IMAGE_CATEGORIES.values()))[0]
        elif form == "images":
            alike = len({scene.background for scene in pictures}) == 1
            category = rng.choices(("compare", "same", "indexed"), (0.2, 0.5, 0.3) if alike else (0.55, 0.05, 0.4))[0]
        else:
            category = rng.choices((*FORM_CATEGORIES[form], "colour", "shape"), (0.4, 0.4, 0.1, 0.1))[0]
        seen = pictures[-1:] if category in IMAGE_CATEGORIES else pictures  # the last frame has every shape of a clip
        question = ask(rng, seen, category, rng.choice(LANGUAGES))
        if question is not None:
            return question


def sample_system(rng: Random) -> str:
    """Mostly the default; some others, also senseless ones, so that the answers do not hang on it."""
    choice = rng.random()
    if choice < 0.55:
        return DEFAULT_SYSTEM
    if choice < 0.85:
        return rng.choice(SYSTEM_MESSAGES)
    words = [word for text in LEXICONS[rng.choice(LANGUAGES)].templates.values() for word in text[0].split()]
    return " ".join(rng.choices(words, k=rng.randint(1, 12))).replace("{", "").replace("}", "")


# How it becomes tokens


@dataclass(frozen=True, slots=True)
class Vision:
    """The tokens of one picture or clip in a chat, with its grid."""

    token_ids: tuple[int, ...]
    grid: Grid


@dataclass(slots=True)
class Chat:
    """A row before it is padded. `answers` are (start of the answer, its length with the end token, the question)."""

    token_ids: list[int]
    items: list[VisionItem]
    blocks: list[tuple[int, int]]  # (start, end) of the independent blocks
    answers: list[tuple[int, int, Question]]

    def add(self, token_ids: Sequence[int]) -> None:
        self.token_ids.extend(token_ids)

    def add_vision(self, vision: Vision) -> None:
        self.items.append(VisionItem(len(self.token_ids) + 1, vision.grid))
        self.add(vision.token_ids)

    def add_reply(self, question: Question) -> None:
        """The end of the user's turn and the assistant's answer."""
        self.add((IM_END, *encode("\n"), IM_START, *encode("assistant\n")))
        answer = (*encode(question.answer), IM_END)
        self.answers.append((len(self.token_ids), len(answer), question))
        self.add(answer)


def vision_blocks(form: Form, sizes: Sequence[Size]) -> list[Vision]:
    width, height = sizes[0]
    if form == "video":
        _, rows, columns = grid_of(height, width)
        grid = ((len(sizes) + 1) // 2, rows, columns)
        return [Vision((VISION_START, *[VIDEO_PAD] * num_image_tokens(grid, MERGE_SIZE), VISION_END), grid)]
    grids = [grid_of(height, width) for width, height in sizes]
    return [
        Vision((VISION_START, *[IMAGE_PAD] * num_image_tokens(grid, MERGE_SIZE), VISION_END), grid) for grid in grids
    ]


def lay_out(layout: Layout, system: str, visions: Sequence[Vision], questions: Sequence[Question]) -> Chat:
    """The chat template's format, token for token."""
    chat = Chat([], [], [], [])
    chat.add((IM_START, *encode("system\n" + system), IM_END, *encode("\n"), IM_START))
    if layout == "text_first":
        chat.add(encode("user\n" + questions[0].text))
        for vision in visions:
            chat.add_vision(vision)
        chat.add_reply(questions[0])
        return chat
    chat.add(encode("user\n"))
    for vision in visions[:1] if layout == "new_picture" else visions:
        chat.add_vision(vision)
    for turn, question in enumerate(questions):
        start = len(chat.token_ids)
        if layout != "blocks" and turn > 0:
            chat.add((*encode("\n"), IM_START, *encode("user\n")))
        if layout == "new_picture" and turn == 1:
            chat.add_vision(visions[1])
        chat.add(encode(question.text))
        chat.add_reply(question)
        if layout == "blocks":
            chat.blocks.append((start, len(chat.token_ids)))
    return chat


def chat_positions(chat: Chat) -> Tensor:
    """[3, tokens]: M-RoPE positions, those of each block continuing the shared beginning."""
    shared = chat.blocks[0][0] if chat.blocks else len(chat.token_ids)
    positions, following = mrope_positions(chat.token_ids[:shared], chat.items, merge_size=MERGE_SIZE, rule=MROPE_RULE)
    blocks = [torch.arange(following, following + end - start).expand(3, -1) for start, end in chat.blocks]
    return torch.cat([positions, *blocks], dim=1)


def collate(
    rng: Random, form: Form, sizes: Sequence[Size], shown: Sequence[Sequence[Scene]], chats: Sequence[Chat]
) -> Batch:
    num_rows = len(chats)
    length = -(-max(len(chat.token_ids) for chat in chats) // 8) * 8
    token_ids = torch.full((num_rows, length), PADDING)
    position_ids = torch.zeros(3, num_rows, length, dtype=torch.long)
    block_ids = torch.full((num_rows, length), -1)
    predicting: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    question_of: list[int] = []
    questions: list[tuple[str, Question]] = []
    for row, chat in enumerate(chats):
        end = len(chat.token_ids)
        token_ids[row, :end] = torch.tensor(chat.token_ids)
        position_ids[:, row, :end] = chat_positions(chat)
        block_ids[row, :end] = 0
        for number, (start, stop) in enumerate(chat.blocks, start=1):
            block_ids[row, start:stop] = number
        for start, count, question in chat.answers:
            predicting.extend(range(row * length + start - 1, row * length + start - 1 + count))
            labels.extend(chat.token_ids[start : start + count])
            weights.extend([count**-0.25] * count)  # a description counts more than a word, but less than its length
            question_of.extend([len(questions)] * count)
            questions.append((form, question))
    is_vision = (token_ids == IMAGE_PAD) | (token_ids == VIDEO_PAD)
    return Batch(
        groups=picture_groups(rng, form, sizes, shown),
        token_ids=token_ids.short(),
        position_ids=position_ids.short(),
        block_ids=block_ids.to(torch.int8),
        vision_index=is_vision.flatten().nonzero()[:, 0].int(),
        predicting_index=torch.tensor(predicting, dtype=torch.int32),
        labels=torch.tensor(labels, dtype=torch.int16),
        weights=torch.tensor(weights) / sum(weights),
        question_of=torch.tensor(question_of, dtype=torch.int16),
        questions=questions,
    )


def picture_groups(
    rng: Random, form: Form, sizes: Sequence[Size], shown: Sequence[Sequence[Scene]]
) -> list[PictureGroup]:
    """One group if all pictures have one size, else one for each picture of a row."""
    slots = [slice(None)] if len(set(sizes)) == 1 else [slice(index, index + 1) for index in range(len(sizes))]
    jpeg = rng.random() < 0.5
    groups = []
    for slot in slots:
        scenes = [scene for row in shown for scene in padded_to_pairs(form, row[slot])]
        width, height = sizes[slot][0]
        groups.append(
            PictureGroup(
                shapes=torch.tensor([shape_rows(scene) for scene in scenes]),
                backgrounds=torch.tensor([scene.background for scene in scenes], dtype=torch.float32),
                noise=torch.tensor([scene.noise for scene in scenes]),
                jpeg=torch.tensor([rng.uniform(0.5, 3.0) for _ in scenes]) if jpeg else None,
                height=height,
                width=width,
                frames=2 if form == "video" else 1,
            )
        )
    return groups


def padded_to_pairs(form: Form, pictures: Sequence[Scene]) -> Sequence[Scene]:
    """A clip of an odd number of frames repeats its last one, as the video processor does."""
    return [*pictures, pictures[-1]] if form == "video" and len(pictures) % 2 else pictures


def shape_rows(scene: Scene) -> list[list[float]]:
    rows = [
        [float(KINDS.index(shape.kind)), float(COLOUR_INDEX[shape.colour]), shape.x, shape.y, shape.radius]
        for shape in scene.shapes
    ]
    return rows + [[0.0] * 5] * (MAX_SHAPES - len(rows))


COLOUR_INDEX = {name: index for index, name in enumerate(COLOURS)}
