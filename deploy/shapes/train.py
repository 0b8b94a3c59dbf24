"""Train the embedded model from scratch.

    python -m deploy.shapes.train --minutes 20 --state DIR

With the same seed, every picture, question and initial weight is the same, and with `--steps` the learning rates are
too; the arithmetic of a GPU is not bitwise reproducible, so two runs end close to each other, not equal. A run that
`--stop-after-s` cuts short is continued by the same command. `--finish CHECKPOINT` goes on from a checkpoint with what
is learned last: new optimizer, no auxiliary losses, batches from LATE_STEP on.
"""

import argparse
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Qwen2VLForConditionalGeneration

from deploy.shapes.batches import LATE_STEP, MAX_ROWS, MIXTURE, Batch, Batches, PictureGroup, sample_batch, unchanged
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
from deploy.shapes.supervision import AuxiliaryHeads

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 300
PEAK_LEARNING_RATE = 1e-3
FINAL_LEARNING_RATE = 1e-5
WEIGHT_DECAY = 0.05
MAX_GRADIENT_NORM = 1.0
AUXILIARY_WEIGHT = 1.0  # at first; it falls to 0 by the end
EARLY_LAYER = 1  # of the language model, where places are asked for
VALIDATION_EVERY_S = 60.0

Drawing = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions that are worth compiling on a GPU."""

    draw: Drawing = draw
    blocks: BlockFunctions = PLAIN_FUNCTIONS


PLAIN = Kernels()


@dataclass(slots=True)
class Progress:
    seed: int
    step: int = 0
    seconds: float = 0.0


def learning_rate(peak: float, step: int, done: float) -> float:
    """Linear warm-up, then a cosine over the share of the run that is `done`."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return warm_up * (FINAL_LEARNING_RATE + (peak - FINAL_LEARNING_RATE) * cosine)


def pixels_of(group: PictureGroup, generator: torch.Generator, kernels: Kernels = PLAIN) -> Tensor:
    """The pictures of a group as the image processor leaves them: [P, 3, H', W'], whole grey levels."""
    pixels = kernels.draw(group.shapes, group.backgrounds, palette_on(group.shapes.device), group.height, group.width)
    pixels = add_noise(pixels, group.noise, generator)
    if group.jpeg is not None:
        pixels = imitate_jpeg(pixels, group.jpeg, generator)
    _, rows, columns = grid_of(group.height, group.width)
    return resize(pixels, rows * PATCH_SIZE, columns * PATCH_SIZE)


@dataclass(frozen=True, slots=True)
class Activations:
    logits: Tensor  # [N, vocab], of the tokens that the batch predicts
    features: list[Tensor]  # for each group [U, V, hidden], from the vision tower
    early: Tensor  # [B * vision tokens of a row, hidden], after layer EARLY_LAYER of the language model


def forward(
    model: Qwen2VLForConditionalGeneration, batch: Batch, generator: torch.Generator, kernels: Kernels = PLAIN
) -> Activations:
    num_rows, length = batch.token_ids.shape
    device_type, use_bf16 = batch.token_ids.device.type, batch.token_ids.is_cuda
    features = []
    for group in batch.groups:
        with torch.no_grad():
            frames = pixels_of(group, generator, kernels)
            frames = frames.view(-1, group.frames, *frames.shape[1:])
            patches = patchify(frames.expand(-1, 2, -1, -1, -1))
        _, rows, columns = grid_of(group.height, group.width)
        with torch.autocast(device_type, torch.bfloat16, enabled=use_bf16):
            features.append(encode_equal(model.model.visual, patches, rows, columns, kernels.blocks))
    language_model = model.model.language_model
    with torch.autocast(device_type, torch.bfloat16, enabled=use_bf16):
        embeddings = language_model.embed_tokens(batch.token_ids).flatten(0, 1)
        vision = torch.cat([encoded.reshape(num_rows, -1, encoded.shape[-1]) for encoded in features], dim=1)
        embeddings = embeddings.index_copy(0, batch.vision_index, vision.flatten(0, 1).to(embeddings.dtype))
        embeddings = embeddings.view(num_rows, length, -1)
        mask = attention_mask(batch.block_ids)
        states = decode(language_model, embeddings, batch.position_ids, mask, kernels.blocks)
        logits = model.lm_head(states[-1].flatten(0, 1)[batch.predicting_index])
    early = states[EARLY_LAYER].flatten(0, 1)[batch.vision_index]
    return Activations(logits.float(), features, early)


def attention_mask(block_ids: Tensor) -> Tensor:
    """[B, 1, L, L], True where the row's token sees the column's: causal, the shared part and its own block."""
    length = block_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=block_ids.device).tril()
    shared = block_ids[:, None, :] == 0
    own = block_ids[:, None, :] == block_ids[:, :, None]
    return (causal & (shared | own))[:, None]


def validate(
    model: Qwen2VLForConditionalGeneration, batches: Iterable[Batch], device: torch.device, kernels: Kernels = PLAIN
) -> dict[str, float]:
    """Share of questions whose whole answer is the most likely token by token, by form and category.

    Gradients stay on, so that the functions compiled for training serve here too. There is no dropout to turn off.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    generator = torch.Generator(device).manual_seed(0)
    for batch in batches:
        batch = batch.to(device)
        correct = forward(model, batch, generator, kernels).logits.detach().argmax(-1) == batch.labels
        wrong = torch.zeros(len(batch.questions), device=device).index_add(0, batch.question_of, (~correct).float())
        for (form, question), mistakes in zip(batch.questions, wrong.tolist(), strict=True):
            right[f"{form}/{question.category}/{question.language}"].append(mistakes == 0)
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}


def validation_batches(seed: int, max_rows: int) -> list[Batch]:
    """A batch of every form and layout, and one of single shapes, with pictures that training does not use."""
    batches = [
        sample_batch(Random(f"validate-{seed}-{form}-{layout}"), form, layout, max_rows) for form, layout in MIXTURE
    ]
    single = sample_batch(Random(f"validate-{seed}-single"), "image", "blocks", max_rows // 2, most_shapes=1)
    return [replace(single, questions=[("single", question) for _, question in single.questions]), *batches]


def report(accuracy: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {100 * value:.1f}" for name, value in accuracy.items())


def train(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state_file = arguments.state / "state.pt"
    progress = Progress(arguments.seed)
    model = new_model(arguments.seed)
    auxiliary_weight = AUXILIARY_WEIGHT
    if arguments.finish is not None:
        model = Qwen2VLForConditionalGeneration.from_pretrained(arguments.finish, dtype=torch.float32)
        progress.step, auxiliary_weight = LATE_STEP, 0.0
    heads = AuxiliaryHeads(model.config.text_config.hidden_size)
    state = torch.load(state_file, weights_only=True) if state_file.exists() else None
    if state is not None:
        progress = Progress(**state["progress"])
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
    # Workers are forked here, before CUDA is in use.
    last_step = arguments.steps or 10**9
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
    model.to(device)
    heads.to(device)
    trained = [*model.parameters(), *heads.parameters()]
    optimizer: Any = torch.optim.AdamW(parameter_groups(trained), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    torch.backends.cuda.enable_cudnn_sdp(False)  # gave NaN with masks (torch 2.11)
    kernels = PLAIN
    if arguments.compile:
        torch._dynamo.config.recompile_limit = 64  # with and without gradients, one picture and many, ...
        kernels = Kernels(torch.compile(draw, dynamic=True), compiled_functions())
    logger.info(
        "%.2f M parameters on %s, step %d, ready after %.0f s",
        count_parameters(model) / 1e6,
        device,
        progress.step,
        time.monotonic() - started,
    )
    generator = torch.Generator(device)
    seconds_before, first_step = progress.seconds, LATE_STEP if arguments.finish is not None else 0
    begin = reported = time.monotonic()
    steps_reported = progress.step
    losses: list[Tensor] = []
    left_out = torch.zeros((), device=device)
    while True:
        done = progress.step / arguments.steps if arguments.steps else progress.seconds / (60 * arguments.minutes)
        if done >= 1.0:
            break
        batch = next(batches).to(device)
        rate = learning_rate(arguments.learning_rate, progress.step - first_step, done)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        generator.manual_seed(progress.seed * 10**9 + progress.step)
        activations = forward(model, batch, generator, kernels)
        loss = (F.cross_entropy(activations.logits, batch.labels, reduction="none") * batch.weights).sum()
        auxiliary = heads.place_loss(batch, activations.early)
        for group, features in zip(batch.groups, activations.features, strict=True):
            auxiliary = auxiliary + heads.shape_loss(group, features) / len(batch.groups)
        optimizer.zero_grad(set_to_none=True)
        (loss + auxiliary_weight * (1.0 - done) * auxiliary).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        # The fused optimizer leaves a step out by itself, so that the host need not wait to look at the norm.
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        losses.append(torch.stack([loss.detach(), auxiliary.detach()]))
        left_out += optimizer.found_inf
        progress.step += 1
        now = time.monotonic()
        progress.seconds = seconds_before + now - begin
        if now - reported > VALIDATION_EVERY_S:
            speed = (progress.step - steps_reported) / (now - reported)
            mean, mean_auxiliary = torch.stack(losses).mean(0).tolist()
            accuracy = validate(model, validation, device, kernels)
            logger.info(
                "%.0f s, step %d, %.1f steps/s, loss %.4f, auxiliary %.4f, %d left out, accuracy %.2f %%: %s",
                progress.seconds,
                progress.step,
                speed,
                mean,
                mean_auxiliary,
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
    saved = {"model": model.state_dict(), "heads": heads.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved | {"progress": asdict(progress)}, state_file)
    write_checkpoint(model.cpu(), arguments.state / "checkpoint")


def parameter_groups(parameters: Sequence[Tensor]) -> list[dict[str, object]]:
    """Matrices decay, vectors (biases and norms) do not."""
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded model from scratch.")
    parser.add_argument("--state", type=Path, required=True, help="directory of the training state and the checkpoint")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, default=0.0, help="how long; its speed decides the steps")
    length.add_argument("--steps", type=int, default=0, help="how many steps")
    parser.add_argument("--stop-after-s", type=float, default=math.inf, help="save and stop; run again to continue")
    parser.add_argument("--finish", type=Path, metavar="CHECKPOINT", help="weights to go on from, with --minutes")
    parser.add_argument("--learning-rate", type=float, default=PEAK_LEARNING_RATE, help="the peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=MAX_ROWS, help="chats in a batch, at most")
    parser.add_argument("--workers", type=int, default=14, help="processes that sample batches")
    parser.add_argument("--compile", action="store_true", help="compile the drawing and the layers (CUDA)")
    arguments = parser.parse_args()
    if arguments.finish is not None and not arguments.minutes:
        parser.error("--finish counts its time from its beginning: give --minutes, not --steps")
    return arguments


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    train(parse_arguments())
