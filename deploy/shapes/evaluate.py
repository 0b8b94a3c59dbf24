"""Measure the embedded model on questions and pictures that training never saw.

    python -m deploy.shapes.evaluate --questions-per-category 300

Pictures are rendered, written as JPEG or PNG, read back, and go through transformers' own image processor, chat
template and model; an answer counts if it is exactly right. The right answer is drawn first, evenly among the
candidates, and a scene that has it afterwards. Every question is asked a second time with the pictures of another one:
what is still right then did not come from the picture. Exits with 1 if a bound of `BOUNDS` is missed.
"""

import argparse
import io
import json
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from deploy.shapes import CHECKPOINT
from deploy.shapes.batches import MAX_FRAMES, MIN_FRAMES
from deploy.shapes.questions import CATEGORIES, FORM_CATEGORIES, LANGUAGES, Language, Question, ask
from deploy.shapes.scenes import (
    MERGE_SIZE,
    Form,
    Scene,
    render,
    sample_clip,
    sample_images,
    sample_scene,
    sample_size,
)

logger = logging.getLogger(__name__)

BOUNDS = {"overall": 0.95, "category": 0.90, "language": 0.90, "swapped above chance": 0.10}
TEXT_FIRST_SHARE = 0.2  # of the questions come before their pictures
GENERATED_EVERY = 25  # questions; one is answered by `generate` too, to check the shortcut
MAX_ANSWER_TOKENS = 64
MAX_ATTEMPTS = 20_000


@dataclass(frozen=True, slots=True)
class Case:
    """A question with the pictures it is about, as they are before they become files."""

    form: Form
    question: Question
    pictures: tuple[Scene, ...]
    text_first: bool

    @property
    def category(self) -> str:
        """Clips are asked about in two forms, and count twice."""
        return f"{self.question.category}/{self.form}" if self.form in ("frames", "video") else self.question.category


@dataclass(frozen=True, slots=True)
class Outcome:
    category: str
    language: Language
    text_first: bool
    answer: str
    chance: float
    right: bool
    right_swapped: bool | None  # None if no other question has as many pictures
    agrees: bool | None  # whether `generate` says the same; None if it was not asked


# The questions


def sample_cases(seed: int, per_category: int) -> list[Case]:
    """`per_category` of every category and form, half in each language."""
    cases = []
    for form, categories in FORM_CATEGORIES.items():
        for category in categories:
            for language in LANGUAGES:
                for number in range(-(-per_category // len(LANGUAGES))):
                    rng = Random(f"evaluate-{seed}-{form}-{category}-{language}-{number}")
                    variants = list(CATEGORIES[category])
                    cases.append(sample_case(rng, form, category, language, variants[number % len(variants)]))
    return cases


def sample_case(rng: Random, form: Form, category: str, language: Language, variant: str) -> Case:
    """A case whose answer is drawn before its pictures; open questions take the answer that comes."""
    share = rng.random()
    text_first = rng.random() < TEXT_FIRST_SHARE
    for _ in range(MAX_ATTEMPTS):
        pictures = sample_pictures(rng, form)
        question = ask(rng, pictures, category, language, variant=variant)
        if question is None:
            continue
        candidates = question.candidates
        if not candidates or question.answer == candidates[int(share * len(candidates))]:
            return Case(form, question, pictures, text_first)
    raise RuntimeError(f"{MAX_ATTEMPTS} attempts gave no {variant} question about {form}")


def sample_pictures(rng: Random, form: Form) -> tuple[Scene, ...]:
    if form == "image":
        return (sample_scene(rng, *sample_size(rng)),)
    if form == "images":
        number = rng.choice((2, 2, 3))
        sizes = [sample_size(rng)] * number if rng.random() < 0.7 else [sample_size(rng) for _ in range(number)]
        return sample_images(rng, sizes)
    return sample_clip(rng, *sample_size(rng), rng.randint(MIN_FRAMES, MAX_FRAMES))


def swap_pictures(cases: Sequence[Case], seed: int) -> list[tuple[Scene, ...] | None]:
    """For each case the pictures of another one of its category that has as many, at random."""
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        groups[case.category, len(case.pictures)].append(index)
    swapped: list[tuple[Scene, ...] | None] = [None] * len(cases)
    rng = Random(f"swap-{seed}")
    for indices in groups.values():
        rng.shuffle(indices)
        for index, other in zip(indices, indices[1:] + indices[:1], strict=True):
            swapped[index] = cases[other].pictures if other != index else None
    return swapped


# The model


class Answerer:
    """The checkpoint as transformers runs it, in float32."""

    def __init__(self, checkpoint: Path, device: str = "cpu") -> None:
        self.model: Any = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        self.model.eval().to(device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
        self.device = device

    def inputs(self, images: Sequence[Image.Image], form: Form, text: str, text_first: bool = False) -> dict[str, Any]:
        """What `model.generate` takes for one user turn."""
        pixels = self.processor(list(images), return_tensors="pt")
        patches, grids = pixels["pixel_values"], pixels["image_grid_thw"]
        if form == "video":
            patches, grids = as_video(patches, grids)
        kind = "video" if form == "video" else "image"
        content = [{"type": kind}] * len(grids)
        question = {"type": "text", "text": text}
        content = [question, *content] if text_first else [*content, question]
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pad = f"<|{kind}_pad|>"
        parts = prompt.split(pad)
        counts = (grids.prod(-1) // MERGE_SIZE**2).tolist()
        prompt = parts[0] + "".join(pad * count + part for count, part in zip(counts, parts[1:], strict=True))
        return self.with_token_types(self.tokenizer(prompt, return_tensors="pt").input_ids) | {
            "pixel_values_videos" if form == "video" else "pixel_values": patches.to(self.device),
            f"{kind}_grid_thw": grids.to(self.device),
        }

    def with_token_types(self, token_ids: Tensor) -> dict[str, Tensor]:
        config = self.model.config
        types = (token_ids == config.image_token_id).int() + 2 * (token_ids == config.video_token_id).int()
        named = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), "mm_token_type_ids": types}
        return {name: value.to(self.device) for name, value in named.items()}

    @torch.no_grad()
    def would_answer(self, inputs: dict[str, Any], answer: str) -> bool:
        """Whether greedy decoding gives exactly this answer and stops: each of its tokens, and the end token after
        them, is the most likely one given those before. One forward pass instead of one for each token."""
        expected = self.tokenizer(answer, return_tensors="pt").input_ids[0].tolist()
        expected.append(self.tokenizer.eos_token_id)
        prompt = inputs["input_ids"]
        token_ids = torch.cat([prompt, torch.tensor([expected[:-1]], device=prompt.device, dtype=prompt.dtype)], dim=1)
        logits = self.model(**(inputs | self.with_token_types(token_ids))).logits[0, prompt.shape[1] - 1 :]
        return bool(logits.argmax(-1).tolist() == expected)

    @torch.no_grad()
    def generate(self, inputs: dict[str, Any]) -> str:
        output = self.model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS)
        text: str = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text


def as_video(patches: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of equal stills, each a doubled frame, as those of one clip of frame pairs.

    An odd clip repeats its last frame, as Qwen2-VL's video processor does.
    """
    _, rows, columns = grids[0].tolist()
    frames = patches.view(len(grids), rows * columns, 3, 2, -1)[:, :, :, 0]  # [frames, patches, 3, 14 * 14]
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])
    pairs = frames.view(-1, 2, *frames.shape[1:]).permute(0, 2, 3, 1, 4)  # [pairs, patches, 3, 2, 14 * 14]
    return pairs.reshape(-1, patches.shape[1]), torch.tensor([[len(pairs), rows, columns]])


def through_file(scene: Scene) -> Image.Image:
    """The picture after it was written and read back."""
    return Image.open(io.BytesIO(file_of(scene))).convert("RGB")


def file_of(scene: Scene) -> bytes:
    """The picture as JPEG (quality 90 to 95) or PNG."""
    rng = Random(scene.seed)
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        render(scene).save(buffer, "JPEG", quality=rng.randint(90, 95))
    else:
        render(scene).save(buffer, "PNG")
    return buffer.getvalue()


# Asking


def ask_all(
    checkpoint: Path, numbered: Sequence[tuple[int, Case, tuple[Scene, ...] | None]], device: str = "cpu"
) -> list[Outcome]:
    """One process's share of the cases."""
    torch.set_num_threads(1)
    answerer = Answerer(checkpoint, device)
    outcomes = []
    for number, case, swapped in numbered:
        question = case.question
        inputs = answerer.inputs(list(map(through_file, case.pictures)), case.form, question.text, case.text_first)
        right = answerer.would_answer(inputs, question.answer)
        agrees = None
        if number % GENERATED_EVERY == 0:
            agrees = (answerer.generate(inputs) == question.answer) == right
        right_swapped = None
        if swapped is not None:
            inputs = answerer.inputs(list(map(through_file, swapped)), case.form, question.text, case.text_first)
            right_swapped = answerer.would_answer(inputs, question.answer)
        chance = 1.0 / len(question.candidates) if question.candidates else 0.0
        outcomes.append(
            Outcome(
                case.category,
                question.language,
                case.text_first,
                question.answer,
                chance,
                right,
                right_swapped,
                agrees,
            )
        )
    return outcomes


def run(arguments: argparse.Namespace) -> list[Outcome]:
    cases = sample_cases(arguments.seed, arguments.questions_per_category)
    numbered = list(zip(range(len(cases)), cases, swap_pictures(cases, arguments.seed), strict=True))
    if arguments.processes == 1:
        return ask_all(arguments.checkpoint, numbered, arguments.device)
    shares = [numbered[start :: arguments.processes] for start in range(arguments.processes)]
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        futures = [pool.submit(ask_all, arguments.checkpoint, share, arguments.device) for share in shares]
        return [outcome for future in futures for outcome in future.result()]


# The report


@dataclass(frozen=True, slots=True)
class Row:
    """Shares of a set of outcomes. `most_frequent` is the share of the most frequent right answer."""

    questions: int
    accuracy: float
    chance: float
    swapped: float
    most_frequent: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Row":
        count = len(outcomes)
        swapped = [outcome.right_swapped for outcome in outcomes if outcome.right_swapped is not None]
        return cls(
            questions=count,
            accuracy=sum(outcome.right for outcome in outcomes) / count,
            chance=sum(outcome.chance for outcome in outcomes) / count,
            swapped=sum(swapped) / max(1, len(swapped)),
            most_frequent=Counter(outcome.answer for outcome in outcomes).most_common(1)[0][1] / count,
        )


def group_rows(outcomes: Sequence[Outcome], key: Callable[[Outcome], str]) -> dict[str, Row]:
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[key(outcome)].append(outcome)
    return {name: Row.of(group) for name, group in groups.items()}


def missed_bounds(outcomes: Sequence[Outcome]) -> list[str]:
    missed = []

    def demand(name: str, value: float, bound: float) -> None:
        if value < bound:
            missed.append(f"{name}: {value:.1%} is below {bound:.0%}")

    demand("overall", Row.of(outcomes).accuracy, BOUNDS["overall"])
    for name, row in group_rows(outcomes, lambda outcome: outcome.language).items():
        demand(f"language {name}", row.accuracy, BOUNDS["language"])
    for name, row in group_rows(outcomes, lambda outcome: outcome.category).items():
        demand(name, row.accuracy, BOUNDS["category"])
        if row.swapped > row.chance + BOUNDS["swapped above chance"]:
            missed.append(f"{name}: {row.swapped:.1%} with swapped pictures, but chance is {row.chance:.1%}")
    disagreeing = sum(outcome.agrees is False for outcome in outcomes)
    if disagreeing:
        missed.append(f"generate disagrees with the forward pass on {disagreeing} questions")
    return missed


def table(outcomes: Sequence[Outcome]) -> str:
    """Category by language, then the categories, the layouts, the languages and everything."""
    lines = [f"{'':28}{'questions':>10}{'accuracy':>10}{'chance':>10}{'swapped':>10}{'most frequent':>15}"]
    parts: list[Callable[[Outcome], str]] = [
        lambda outcome: f"{outcome.category} {outcome.language}",
        lambda outcome: outcome.category,
        lambda outcome: "question before pictures" if outcome.text_first else "pictures before question",
        lambda outcome: {"en": "English", "zh": "Chinese"}[outcome.language],
        lambda outcome: "all",
    ]
    for key in parts:
        for name, row in group_rows(outcomes, key).items():
            shares = f"{row.accuracy:>10.1%}{row.chance:>10.1%}{row.swapped:>10.1%}{row.most_frequent:>15.1%}"
            lines.append(f"{name:28}{row.questions:>10}{shares}")
        lines.append("")
    return "\n".join(lines)


def as_json(outcomes: Sequence[Outcome], arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    def plain(rows: dict[str, Row]) -> dict[str, dict[str, float]]:
        return {name: {field: getattr(row, field) for field in Row.__slots__} for name, row in rows.items()}

    return {
        "checkpoint": str(arguments.checkpoint),
        "seed": arguments.seed,
        "seconds": round(seconds, 1),
        "all": plain({"all": Row.of(outcomes)})["all"],
        "languages": plain(group_rows(outcomes, lambda outcome: outcome.language)),
        "categories": plain(group_rows(outcomes, lambda outcome: outcome.category)),
        "categories by language": plain(group_rows(outcomes, lambda outcome: f"{outcome.category} {outcome.language}")),
        "checked with generate": sum(outcome.agrees is not None for outcome in outcomes),
        "missed": missed_bounds(outcomes),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the embedded model on held-out questions.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--questions-per-category", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1_000_000, help="training and validation use other names")
    parser.add_argument("--processes", type=int, default=2, help="each uses one thread")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    begin = time.monotonic()
    outcomes = run(arguments)
    seconds = time.monotonic() - begin
    print(table(outcomes))
    checked = [outcome.agrees for outcome in outcomes if outcome.agrees is not None]
    print(f"{len(outcomes)} questions in {seconds:.0f} s; generate agrees on {sum(checked)} of {len(checked)}")
    missed = missed_bounds(outcomes)
    print("\n".join(missed) if missed else "every bound is met")
    if arguments.json is not None:
        result = json.dumps(as_json(outcomes, arguments, seconds), indent=2, ensure_ascii=False)
        arguments.json.write_text(result + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
