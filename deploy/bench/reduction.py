"""`fovea bench reduction`: what the embedded model still answers right when a part of each picture's tokens is kept.

The questions are those of `python -m deploy.shapes.evaluate` about one or several pictures; the whole transformers
model is given the rows that the encoder service would keep, at their places in the picture. An answer counts if greedy
decoding would give exactly it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from common.config import TokenReduction
from common.embedding import VisionEmbedding, deepstack_names
from deploy.bench import report
from deploy.shapes.evaluate import Answerer, Case, sample_cases, through_file
from encoder_service.reduction import reduce_tokens

_FORMS = ("image", "images")
_SEED = 1_000_000  # as evaluate's: of no question that training saw

Setting = TokenReduction | None


class ReducedModel:
    """One of Qwen's models as transformers runs it, to which a part of the images' rows is shown."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def embeddings(self, pixel_values: Tensor, grids: Tensor) -> list[VisionEmbedding]:
        """Each image encoded alone, as `exact` numerics does."""
        patches = torch.split(pixel_values, grids.prod(-1).tolist())
        return [self._embedding(own, grid[None]) for own, grid in zip(patches, grids, strict=True)]

    def logits(
        self, token_ids: Tensor, token_types: Tensor, grids: Tensor, embeddings: Sequence[VisionEmbedding], to: Setting
    ) -> Tensor:
        """`[rows, vocabulary]`: of the tokens `[1, T]` without the placeholders of what is dropped."""
        core = self._model.model
        positions, _ = core.get_rope_index(token_ids, token_types, image_grid_thw=grids)
        embeds = self._model.get_input_embeddings()(token_ids)[0]
        shown = [one if to is None else reduce_tokens(one, to, [one.num_tokens]) for one in embeddings]
        stays = torch.ones(token_ids.shape[1], dtype=torch.bool)
        place = (token_ids[0] == self._model.config.image_token_id).nonzero().flatten()
        for whole, part in zip(embeddings, shown, strict=True):
            own, place = place[: whole.num_tokens], place[whole.num_tokens :]
            stays[own] = False
            rows = own if part.kept is None else own[part.kept]
            stays[rows] = True
            embeds[rows] = part.features
        is_image = token_ids[0, stays] == self._model.config.image_token_id
        layers = [torch.cat(rows) for rows in zip(*(one.deepstack for one in shown), strict=True)]
        deepstack = {"visual_pos_masks": is_image[None], "deepstack_visual_embeds": layers} if layers else {}
        hidden = core.language_model(
            inputs_embeds=embeds[stays][None], position_ids=positions[:, :, stays], use_cache=False, **deepstack
        ).last_hidden_state[0]
        logits: Tensor = self._model.lm_head(hidden)
        return logits

    def _embedding(self, pixel_values: Tensor, grid: Tensor) -> VisionEmbedding:
        output = self._model.get_image_features(pixel_values, grid, return_dict=True)
        layers = output.get("deepstack_features") or []
        sets = dict(zip(deepstack_names(len(layers)), [rows[0] for rows in layers], strict=True))
        t, h, w = grid[0].tolist()
        return VisionEmbedding({"features": output.pooler_output[0], **sets}, (t, h, w))


@dataclass(frozen=True, slots=True)
class Outcome:
    category: str
    setting: Setting
    right: bool


def run(checkpoint: Path, ratios: Sequence[float], per_category: int, processes: int, output: Path) -> None:
    methods = get_args(TokenReduction.model_fields["method"].annotation)
    reductions = [TokenReduction(method=method, ratio=ratio) for ratio in ratios for method in methods]
    settings: list[Setting] = [None, *reductions]
    cases = [case for case in sample_cases(_SEED, per_category) if case.form in _FORMS]
    shares = [cases[start::processes] for start in range(processes)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        futures = [pool.submit(ask_all, checkpoint, share, settings) for share in shares]
        outcomes = [outcome for future in futures for outcome in future.result()]
    shares_of = {_name(setting): accuracy(one for one in outcomes if one.setting == setting) for setting in settings}
    rows = [
        {"questions": category} | {name: shares[category] for name, shares in shares_of.items()}
        for category in shares_of[_name(None)]
    ]
    report.show(f"{len(cases)} questions about pictures: share of right answers", rows)
    report.write(output, {"circumstances": report.circumstances(), "checkpoint": str(checkpoint), "rows": rows})


@torch.inference_mode()
def ask_all(checkpoint: Path, cases: Sequence[Case], settings: Sequence[Setting]) -> list[Outcome]:
    """One process's share."""
    torch.set_num_threads(1)
    answerer = Answerer(checkpoint)
    model = ReducedModel(answerer.model)
    outcomes = []
    for case in cases:
        images = [through_file(scene) for scene in case.pictures]
        inputs = answerer.inputs(images, case.form, case.question.text, case.text_first)
        embeddings = model.embeddings(inputs["pixel_values"], inputs["image_grid_thw"])
        answer = answerer.tokenizer(case.question.answer, return_tensors="pt").input_ids[0].tolist()
        expected = [*answer, answerer.tokenizer.eos_token_id]
        tokens = answerer.with_token_types(torch.cat([inputs["input_ids"], torch.tensor([expected[:-1]])], dim=1))
        for setting in settings:
            logits = model.logits(
                tokens["input_ids"], tokens["mm_token_type_ids"], inputs["image_grid_thw"], embeddings, setting
            )
            right = logits[-len(expected) :].argmax(-1).tolist() == expected
            outcomes.append(Outcome(case.category, setting, right))
    return outcomes


def accuracy(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """The share of right answers of each category, and of all."""
    right: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        for group in ("all", outcome.category):
            right[group].append(outcome.right)
    return {group: sum(one) / len(one) for group, one in right.items()}


def _name(setting: Setting) -> str:
    return "all kept" if setting is None else str(setting).replace(":", " ")
