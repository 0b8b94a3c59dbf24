"""`fovea verify`: the one-piece transformers model and the split service over the same pictures and prompts.

Greedy, and every answer must be the same text. The reference shares no code with the service but the tokenizer's
files: transformers' own image processor, model class and `generate()`.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from common.checkpoint import (
    LoadedHalf,
    checkpoint_directory,
    choose_device,
    choose_dtype,
    load_config,
    load_image_processor,
    load_preprocessor_config,
    weights_digest,
)
from common.config import ImageBackend, ModelConfig
from common.families import family_of
from common.identity import system_fingerprint
from common.media import FORMATS
from deploy import service
from deploy.app import EMBEDDED_MODEL, resolve_model
from deploy.client import Answer, Client
from deploy.progress import track
from encoder_service.encoder import VisionEncoder, load_preprocessor
from llm_service.config import EngineConfig
from llm_service.server import decoder_description, library_versions, position_rule

Report = Callable[[str], None]

PROMPTS = (
    "What colour is the shape?",
    "How many shapes are there?",
    "Describe the picture from left to right.",
    "图中有几个图形？",
    "描述这张图片。",
)
NUM_CONCURRENT = 16


@dataclass(frozen=True, slots=True)
class Case:
    """One question about one picture, and what the one-piece model answers."""

    name: str
    image: bytes
    prompt: str
    expected: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ModeResult:
    """`first_difference` is None if every answer is the same text."""

    mode: str
    num_answers: int
    num_equal: int
    hashes_equal: bool
    mean_length_difference: float
    seconds_per_answer: float
    reference_seconds_per_answer: float
    sources: dict[str, int]
    first_difference: dict[str, str] | None


def run(
    *,
    url: str | None,
    model: str | None,
    images: Path | None,
    prompts: Path | None,
    modes: Sequence[str],
    max_tokens: int,
    output: Path,
    report: Report,
) -> bool:
    """Prints a table, writes `output`, and says whether everything matched."""
    config = resolve_model(ModelConfig(path=model or EMBEDDED_MODEL))
    pictures = reference_pictures() if images is None else read_pictures(images)
    questions = PROMPTS if prompts is None else [line for line in prompts.read_text().splitlines() if line.strip()]
    if not pictures or not questions:
        raise service.ServiceError("there is nothing to compare: no pictures or no prompts were found")
    report(f"answering {len(pictures)} pictures x {len(questions)} prompts with the one-piece model")
    reference = OnePieceModel(config)
    started = time.perf_counter()
    cases = [
        Case(name, image, prompt, *reference.answer(image, prompt, max_tokens))
        for (name, image), prompt in track(list(product(pictures.items(), questions)), "the one-piece model")
    ]
    reference_seconds = (time.perf_counter() - started) / len(cases)
    with _service(url, config, report) as running:
        client = Client(running)
        results = []
        for mode in modes:
            report(f"asking the service: {mode}")
            results.append(compare(client, cases, mode, max_tokens, reference_seconds))
        fingerprint = client.fingerprint()
    expected = reference.fingerprint()
    passed = fingerprint == expected and all(result.num_equal == result.num_answers for result in results)
    document = {
        "passed": passed,
        "fingerprint": expected,
        "service_fingerprint": fingerprint,
        "model": config.served_name or config.path,
        "max_tokens": max_tokens,
        "results": [dataclasses.asdict(result) for result in results],
    }
    output.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    show(results, expected, fingerprint)
    report(f"{'everything matches' if passed else 'NOT EQUAL'}; the report is {output}")
    return passed


def compare(client: Client, cases: Sequence[Case], mode: str, max_tokens: int, reference_seconds: float) -> ModeResult:
    """Asks every case in one of the modes `cold`, `warm` and `batched`."""

    def ask(case: Case) -> Answer:
        # Bytes after the end of a picture change its digest and no pixel: the picture is new to every cache.
        image = case.image + os.urandom(16) if mode == "cold" else case.image
        return client.ask([image], case.prompt, max_tokens=max_tokens, temperature=0)

    if mode == "warm":
        for case in cases:
            ask(case)
    started = time.perf_counter()
    if mode == "batched":
        cases = [*cases, *cases]  # so that the default cases fill the pool
        with ThreadPoolExecutor(NUM_CONCURRENT) as pool:
            answers = list(track(pool.map(ask, cases), mode, total=len(cases)))
    else:
        answers = [ask(case) for case in track(cases, mode)]
    seconds = (time.perf_counter() - started) / len(cases)
    different = [
        {"picture": case.name, "prompt": case.prompt, "expected": case.expected, "answer": answer.text}
        for case, answer in zip(cases, answers, strict=True)
        if answer.text != case.expected
    ]
    sources = [receipt["source"] for answer in answers for receipt in answer.images]
    lengths = [answer.num_tokens - case.num_tokens for case, answer in zip(cases, answers, strict=True)]
    return ModeResult(
        mode=mode,
        num_answers=len(cases),
        num_equal=len(cases) - len(different),
        hashes_equal=_digest(answer.text for answer in answers) == _digest(case.expected for case in cases),
        mean_length_difference=sum(lengths) / len(lengths),
        seconds_per_answer=seconds,
        reference_seconds_per_answer=reference_seconds,
        sources={source: sources.count(source) for source in sorted(set(sources))},
        first_difference=different[0] if different else None,
    )


def show(results: Sequence[ModeResult], expected: str, fingerprint: str) -> None:
    table = Table(title="one-piece transformers model = split service")
    for column in ("mode", "equal", "hashes", "mean length difference", "s/answer", "one-piece s/answer", "embeddings"):
        table.add_column(column)
    for result in results:
        table.add_row(
            result.mode,
            f"{result.num_equal}/{result.num_answers}",
            "equal" if result.hashes_equal else "DIFFERENT",
            f"{result.mean_length_difference:.2f}",
            f"{result.seconds_per_answer:.3f}",
            f"{result.reference_seconds_per_answer:.3f}",
            ", ".join(f"{count} {source}" for source, count in result.sources.items()),
        )
    console = Console()
    console.print(table)
    for result in results:
        if result.first_difference is not None:
            console.print(f"first difference ({result.mode}): {result.first_difference}")
    agree = "agree" if expected == fingerprint else f"DIFFER: the one-piece model's is {expected}"
    console.print(f"system fingerprint {fingerprint}: service and one-piece model {agree}")


class OnePieceModel:
    """transformers' whole model, as its documentation uses it."""

    def __init__(self, config: ModelConfig) -> None:
        torch.set_num_threads(config.num_threads)
        self._directory = directory = checkpoint_directory(config)
        self._config = config
        self._hf_config = load_config(directory)
        self._device = choose_device(config)
        self._dtype = choose_dtype(config, self._hf_config, self._device)
        model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(self._hf_config)]
        self._model = model_class.from_pretrained(directory, dtype=self._dtype).eval().to(self._device)
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._makes_pixels = family_of(self._hf_config).own_pixels
        self._processor: Any = (
            qwen_processor(directory, config.image_backend) if self._makes_pixels else whole_processor(directory)
        )

    @torch.inference_mode()
    def answer(self, image: bytes, prompt: str, max_tokens: int) -> tuple[str, int]:
        """The greedy text and its number of tokens, the end token included."""
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
        inputs = self._qwen_inputs(upright, prompt) if self._makes_pixels else self._inputs(upright, prompt)
        on_device = {
            name: tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }
        ends = self._model.generation_config.eos_token_id
        generated = self._model.generate(
            **on_device,
            do_sample=False,
            max_new_tokens=max_tokens,
            **({} if ends is None else {"eos_token_id": ends}),  # BLIP-2's text model would not look there
        )[0].tolist()
        ids = inputs["input_ids"][0].tolist()
        tokens = generated[len(ids) :] if generated[: len(ids)] == ids else generated
        # An answer cut inside a character ends in U+FFFD; the service leaves such a character out.
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")
        return text, len(tokens)

    def _qwen_inputs(self, image: Image.Image, prompt: str) -> dict[str, Tensor]:
        """Without Qwen's whole processor, which needs torchvision."""
        pixels = self._processor([image], return_tensors="pt")
        ids = self._tokenizer.apply_chat_template([_question(prompt)], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        image_id = self._hf_config.image_token_id
        num_tokens = int(pixels.image_grid_thw.prod()) // self._hf_config.vision_config.spatial_merge_size**2
        at = ids.index(image_id)
        input_ids = torch.tensor([ids[:at] + [image_id] * num_tokens + ids[at + 1 :]])
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == image_id).int(),
            **pixels,
        }

    def _inputs(self, image: Image.Image, prompt: str) -> dict[str, Tensor]:
        text = prompt
        if self._processor.chat_template is not None:
            text = self._processor.apply_chat_template([_question(prompt)], add_generation_prompt=True)
        # A text begins with this token once, be it written by the template or by the tokenizer.
        beginning = self._tokenizer.bos_token
        is_written = beginning is not None and text.startswith(beginning)
        return dict(
            self._processor(images=[[image]], text=[text], return_tensors="pt", add_special_tokens=not is_written)
        )

    def fingerprint(self) -> str:
        """The fingerprint a service over these very weights and this software must have, with the default engine."""
        digest = weights_digest(self._model, "vision")
        vision = LoadedHalf(self._model, self._hf_config, self._device, self._dtype, digest)
        preprocessor = load_preprocessor(
            self._directory, self._hf_config, self._config.limits, self._config.image_backend
        )
        return system_fingerprint(
            vision=VisionEncoder(vision, preprocessor, self._config.numerics).namespace,
            language_weights=weights_digest(self._model, "language"),
            mrope_rule=position_rule(self._config, self._hf_config),
            decoder=decoder_description(self._config, self._device, EngineConfig()),
            versions=library_versions(),
        )


def qwen_processor(directory: Path, image_backend: ImageBackend) -> Any:
    """transformers' own, for that backend. Raises ServiceError."""
    if image_backend == "pil":
        return Qwen2VLImageProcessorPil(**load_preprocessor_config(directory))
    if not is_torchvision_available():  # transformers would take the one for PIL in its place
        raise service.ServiceError(
            "model.image_backend is 'torchvision': the reference, transformers' processor, needs torchvision installed"
        )
    return AutoImageProcessor.from_pretrained(directory, backend=image_backend)


def whole_processor(directory: Path) -> Any:
    """transformers' own, with the image processor for PIL whatever else is installed. Raises ServiceError."""
    try:
        processor = AutoProcessor.from_pretrained(directory)
    except ImportError as exc:
        raise service.ServiceError(
            f"transformers' processor of this model, the reference, cannot be had: {exc}"
        ) from exc
    processor.image_processor = load_image_processor(directory)
    return processor


def reference_pictures() -> dict[str, bytes]:
    """Three drawn pictures as PNG: a red square, a blue circle and rainbow stripes."""
    size = 224
    square, circle, stripes = (Image.new("RGB", (size, size), "lightgray") for _ in range(3))
    ImageDraw.Draw(square).rectangle((62, 62, 162, 162), fill=(220, 30, 30))
    ImageDraw.Draw(circle).ellipse((52, 52, 172, 172), fill=(40, 70, 220))
    rainbow = ("red", "orange", "yellow", "green", "blue", "indigo", "violet")
    for index, colour in enumerate(rainbow):
        ImageDraw.Draw(stripes).rectangle((0, index * 32, size, index * 32 + 31), fill=colour)
    return {"red square": _png(square), "blue circle": _png(circle), "rainbow stripes": _png(stripes)}


def read_pictures(directory: Path) -> dict[str, bytes]:
    """The files of a directory that hold pictures, by name."""
    pictures = {}
    for path in sorted(directory.iterdir()):
        with contextlib.suppress(OSError), Image.open(path, formats=FORMATS):
            pictures[path.name] = path.read_bytes()
    return pictures


def _question(prompt: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _digest(texts: Iterator[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@contextlib.contextmanager
def _service(url: str | None, model: ModelConfig, report: Report) -> Iterator[str]:
    """The service at `url`, or one of our own on a free port."""
    if url is not None:
        yield url
        return
    config: dict[str, Any] = service.application_config(model=model.path, port=service.free_port())
    with service.running_service(config, report) as running:
        yield running.url
