"""Train the embedded model from scratch.

    python -m deploy.shapes.train --minutes 20 --state DIR

With the same seed and number of steps, every picture, question and initial weight is the same; the arithmetic of a GPU is
not bitwise reproducible, so two runs end close to each other, not equal. A run that `--stop-after-s` cuts short is
continued by the same command.
"""

import argparse
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Qwen2VLForConditionalGeneration

from deploy.shapes.batches import MAX_ROWS, MIXTURE, Batch, Batches, PictureGroup, sample_batch, unchanged
from deploy.shapes.drawing import add_noise, draw, imitate_jpeg, palette_on, patchify, resize
from deploy.shapes.model import (
    PLAIN_FUNCTIONS,
    BlockFunctions,
    compiled_functions,
    count_parameters,
    decode,
    encode_equal,
    new_model,
    write_checkpoint,
)
from deploy.shapes.scenes import PATCH_SIZE, grid_of

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 500
PEAK_LEARNING_RATE = 1e-3
FINAL_LEARNING_RATE = 1e-5
WEIGHT_DECAY = 0.05
MAX_GRADIENT_NORM = 1.0
VALIDATION_EVERY_S = 60.0
SPEED_STEPS = (400, 800)  # between these steps the speed is measured that turns `--minutes` into a number of steps

Drawing = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions that are worth compiling on a GPU."""

    draw: Drawing = draw
    blocks: BlockFunctions = PLAIN_FUNCTIONS


PLAIN = Kernels()


@dataclass(slots=True)
class Progress:
    """`total_steps` is 0 until it is known."""

    seed: int
    step: int = 0
    total_steps: int = 0
    seconds: float = 0.0


def learning_rate(progress: Progress, peak: float) -> float:
    """Linear warm-up, then a cosine; constant while the number of steps is not known yet."""
    warm_up = min(1.0, (progress.step + 1) / WARM_UP_STEPS)
    done = min(1.0, progress.step / progress.total_steps) if progress.total_steps else 0.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    return warm_up * (FINAL_LEARNING_RATE + (peak - FINAL_LEARNING_RATE) * cosine)


def pixels_of(group: PictureGroup, generator: torch.Generator, kernels: Kernels = PLAIN) -> Tensor:
    """The pictures of a group as the image processor leaves them: [P, 3, H', W'], whole grey levels."""
    pixels = kernels.draw(group.shapes, group.backgrounds, palette_on(group.shapes.device), group.height, group.width)
    pixels = add_noise(pixels, group.noise, generator)
    if group.jpeg is not None:
        pixels = imitate_jpeg(pixels, group.jpeg, generator)
    _, rows, columns = grid_of(group.height, group.width)
    return resize(pixels, rows * PATCH_SIZE, columns * PATCH_SIZE)


def answer_logits(
    model: Qwen2VLForConditionalGeneration, batch: Batch, generator: torch.Generator, kernels: Kernels = PLAIN
) -> Tensor:
    """Logits [N, vocab] of the tokens that the batch predicts."""
    num_rows, length = batch.token_ids.shape
    use_bf16 = batch.token_ids.is_cuda
    features = []
    for group in batch.groups:
        with torch.no_grad():
            frames = pixels_of(group, generator, kernels)
            frames = frames.view(-1, group.frames, *frames.shape[1:])
            patches = patchify(frames.expand(-1, 2, -1, -1, -1))
        _, rows, columns = grid_of(group.height, group.width)
        with torch.autocast(batch.token_ids.device.type, torch.bfloat16, enabled=use_bf16):
            encoded = encode_equal(model.model.visual, patches, rows, columns, kernels.blocks)
        features.append(encoded.reshape(num_rows, -1, encoded.shape[-1]))
    language_model = model.model.language_model
    with torch.autocast(batch.token_ids.device.type, torch.bfloat16, enabled=use_bf16):
        embeddings = language_model.embed_tokens(batch.token_ids).flatten(0, 1)
        vision = torch.cat(features, dim=1).flatten(0, 1).to(embeddings.dtype)
        embeddings = embeddings.index_copy(0, batch.vision_index, vision).view(num_rows, length, -1)
        mask = attention_mask(batch.block_ids)
        hidden = decode(language_model, embeddings, batch.position_ids, mask, kernels.blocks)
        logits: Tensor = model.lm_head(hidden.flatten(0, 1)[batch.predicting_index])
    return logits.float()


def attention_mask(block_ids: Tensor) -> Tensor:
    """[B, 1, L, L], True where the row's token sees the column's: causal, and only the shared part and its own block."""
    length = block_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=block_ids.device).tril()
    shared = block_ids[:, None, :] == 0
    own = block_ids[:, None, :] == block_ids[:, :, None]
    return (causal & (shared | own))[:, None]


@torch.no_grad()
def validate(
    model: Qwen2VLForConditionalGeneration, batches: Iterable[Batch], device: torch.device, kernels: Kernels = PLAIN
) -> dict[str, float]:
    """Share of questions whose whole answer is the most likely token by token, by form and category."""
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    generator = torch.Generator(device).manual_seed(0)
    for batch in batches:
        batch = batch.to(device)
        correct = answer_logits(model, batch, generator, kernels).argmax(-1) == batch.labels
        wrong = torch.zeros(len(batch.questions), device=device).index_add(0, batch.question_of, (~correct).float())
        for (form, question), mistakes in zip(batch.questions, wrong.tolist(), strict=True):
            right[f"{form}/{question.category}/{question.language}"].append(mistakes == 0)
    model.train()
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}


def validation_batches(seed: int, max_rows: int) -> list[Batch]:
    """Two batches of every form and layout, of sizes and pictures that training does not use."""
    batches = []
    for form, layout in MIXTURE:
        for number in range(2):
            batches.append(sample_batch(Random(f"validate-{seed}-{form}-{layout}-{number}"), form, layout, max_rows))
    return batches


def report(accuracy: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {100 * value:.1f}" for name, value in accuracy.items())


def train(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state_file = arguments.state / "state.pt"
    progress = Progress(arguments.seed, total_steps=arguments.steps)
    model = new_model(arguments.seed)
    state = torch.load(state_file, weights_only=True) if state_file.exists() else None
    if state is not None:
        progress = Progress(**state["progress"])
        progress.total_steps = arguments.steps or progress.total_steps
        model.load_state_dict(state["model"])
    # Workers are forked here, before CUDA is in use.
    last_step = progress.total_steps or 10**9
    namespace = f"train-{progress.seed}"
    loader = DataLoader(
        Batches(namespace, progress.step, last_step, arguments.rows),
        batch_size=None,
        collate_fn=unchanged,
        num_workers=arguments.workers,
        prefetch_factor=8 if arguments.workers else None,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    validation = validation_batches(progress.seed, arguments.rows)
    model.to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    torch.backends.cuda.enable_cudnn_sdp(False)  # gave NaN with masks (torch 2.11)
    kernels = PLAIN
    if arguments.compile:
        torch._dynamo.config.recompile_limit = 64  # with and without gradients, one picture and many, ...
        kernels = Kernels(torch.compile(draw, dynamic=True), compiled_functions())
    logger.info(
        "%.2f M parameters on %s, step %d of %s, ready after %.0f s",
        count_parameters(model) / 1e6,
        device,
        progress.step,
        progress.total_steps or "a number to be measured",
        time.monotonic() - started,
    )
    generator = torch.Generator(device)
    seconds_before = progress.seconds
    begin = reported = speed_begin = time.monotonic()
    steps_reported = progress.step
    losses: list[Tensor] = []
    left_out = torch.zeros((), device=device)
    while not progress.total_steps or progress.step < progress.total_steps:
        batch = next(batches).to(device)
        rate = learning_rate(progress, arguments.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator.manual_seed(progress.seed * 10**9 + progress.step)
        logits = answer_logits(model, batch, generator, kernels)
        loss = (F.cross_entropy(logits, batch.labels, reduction="none") * batch.weights).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        # The fused optimizer leaves a step out by itself, so that the host need not wait to look at the norm.
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        losses.append(loss.detach())
        left_out += optimizer.found_inf
        progress.step += 1
        now = time.monotonic()
        progress.seconds = seconds_before + now - begin
        if progress.step == SPEED_STEPS[0]:
            speed_begin = now
        if not progress.total_steps and progress.step == SPEED_STEPS[1]:
            per_step = (now - speed_begin) / (SPEED_STEPS[1] - SPEED_STEPS[0])
            progress.total_steps = progress.step + int((60 * arguments.minutes - progress.seconds) / per_step)
            logger.info("%.1f ms a step, so %d steps", 1000 * per_step, progress.total_steps)
        if now - reported > VALIDATION_EVERY_S:
            speed = (progress.step - steps_reported) / (now - reported)
            mean = torch.stack(losses).mean().item()
            accuracy = validate(model, validation, device, kernels)
            logger.info(
                "%.0f s, step %d, %.1f steps/s, loss %.4f, %d left out, accuracy %.2f %%: %s",
                progress.seconds,
                progress.step,
                speed,
                mean,
                left_out.item(),
                100 * sum(accuracy.values()) / len(accuracy),
                report(accuracy),
            )
            reported, steps_reported, losses = time.monotonic(), progress.step, []
        if now - started > arguments.stop_after_s:
            break
    accuracy = validate(model, validation, device, kernels)
    logger.info("stop at step %d after %.0f s: %s", progress.step, progress.seconds, report(accuracy))
    arguments.state.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}, state_file
    )
    write_checkpoint(model.cpu(), arguments.state / "checkpoint")


def parameter_groups(model: Qwen2VLForConditionalGeneration) -> list[dict[str, object]]:
    """Matrices decay, vectors (biases and norms) do not."""
    parameters = list(model.parameters())
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded model from scratch.")
    parser.add_argument("--state", type=Path, required=True, help="directory of the training state and the checkpoint")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, default=0.0, help="how long; the number of steps is measured")
    length.add_argument("--steps", type=int, default=0, help="how many steps")
    parser.add_argument("--stop-after-s", type=float, default=math.inf, help="save and stop; run again to continue")
    parser.add_argument("--learning-rate", type=float, default=PEAK_LEARNING_RATE, help="the peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=MAX_ROWS, help="chats in a batch, at most")
    parser.add_argument("--workers", type=int, default=14, help="processes that sample batches")
    parser.add_argument("--compile", action="store_true", help="compile the drawing and the layers (CUDA)")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    train(parse_arguments())
