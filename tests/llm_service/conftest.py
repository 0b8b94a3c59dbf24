"""Tiny decoders with made-up image features, their one-piece reference, and engines that keep their logits."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures
from transformers.utils import logging as transformers_logging

from common.checkpoint import LoadedHalf, load_half
from common.config import ModelConfig
from common.embedding import Grid, VisionEmbedding, deepstack_names
from common.families import VisionItem, mrope_positions
from common.geometry import num_image_tokens
from llm_service.config import EngineConfig
from llm_service.engine.engine import LLMEngine
from llm_service.engine.model_runner import TransformersRunner
from llm_service.engine.request import MultiModalFeature, PlaceholderRange, Request, RequestOutput, SamplingParams
from llm_service.engine.sampler import SampledTokens
from llm_service.engine.scheduler import SchedulerOutput

transformers_logging.disable_progress_bar()

IMAGE, VIDEO, VISION_START, VISION_END = 300, 301, 302, 303
NUM_TEXT_TOKENS = 300
NUM_REFERENCE_TOKENS = 24
MODELS = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}


@dataclass(frozen=True)
class Picture:
    key: str
    embedding: VisionEmbedding

    @property
    def num_tokens(self) -> int:
        return self.embedding.num_tokens


def picture(seed: int, grid_thw: Grid, hidden: int, num_deepstack: int = 0) -> Picture:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_image_tokens(grid_thw, merge_size=2)
    names = ["features", *deepstack_names(num_deepstack)]
    tensors = {name: torch.randn(num_tokens, hidden, generator=generator) for name in names}
    return Picture(f"namespace:{seed:04d}:{grid_thw}", VisionEmbedding(tensors, grid_thw))


@dataclass(eq=False)
class Prompt:
    """Text tokens and pictures in order, and what the one-piece model answers to them."""

    parts: Sequence[int | Picture]
    reference_tokens: list[int] = field(default_factory=list)
    reference_logits: list[Tensor] = field(default_factory=list)

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def token_ids(self) -> list[int]:
        ids: list[int] = []
        for part in self.parts:
            ids += [part] if isinstance(part, int) else [VISION_START, *[IMAGE] * part.num_tokens, VISION_END]
        return ids

    def request(self, request_id: str = "r", *, cache_salt: str = "", **sampling: Any) -> Request:
        token_ids = self.token_ids
        mm_features = []
        start = 0
        for image in self.pictures:
            offset = token_ids.index(IMAGE, start)
            start = offset + image.num_tokens
            position = PlaceholderRange(offset, image.num_tokens)
            mm_features.append(MultiModalFeature(image.key, position, image.embedding))
        items = [VisionItem(feature.position.offset, feature.embedding.grid_thw) for feature in mm_features]
        positions, next_position = mrope_positions(token_ids, items, merge_size=2)
        return Request(
            request_id,
            token_ids,
            positions,
            next_position,
            SamplingParams(**{"max_tokens": NUM_REFERENCE_TOKENS, **sampling}),
            mm_features,
            cache_salt,
        )

    def check_tokens(self, answer: Sequence[int]) -> bool:
        """The answer is the reference's. False for a near tie: there, and only there, rounding may choose."""
        for index, token in enumerate(answer):
            expected = self.reference_tokens[index]
            if token != expected:
                logits = self.reference_logits[index]
                assert logits[expected] - logits[token] < 1e-3, (index, token, expected)
                return False
        return True


class AsynchronousRunner(TransformersRunner):
    """On the CPU what a GPU's runner is: the tokens of a step are on the device before the host reads them."""

    is_asynchronous = True

    def remember_tokens(self, token_ids_B: Tensor, requests: Sequence[Request]) -> None:
        self.remembered = dict(zip(map(id, requests), token_ids_B.tolist(), strict=True))

    def execute(self, output: SchedulerOutput) -> Tensor:
        pending = [item.request for item in output.scheduled if item.num_context_tokens > item.request.num_tokens]
        for request in pending:
            request.output_token_ids.append(self.remembered[id(request)])
        logits_BV = super().execute(output)
        for request in pending:
            request.output_token_ids.pop()
        return logits_BV


class RecordingEngine(LLMEngine):
    """Keeps every token's logits in `logits[request_id]`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logits: dict[str, list[Tensor]] = {}
        self.num_steps = 0
        self.num_forked = 0
        sample, fork = self.sampler.sample, self.kv_cache_manager.fork

        def counted(parent: Request, child: Request, num_tokens: int) -> None:
            self.num_forked += 1
            fork(parent, child, num_tokens)

        def recorded(logits_BV: Tensor, requests: Sequence[Request]) -> SampledTokens:
            for request, logits_V in zip(requests, logits_BV, strict=True):
                self.logits.setdefault(request.request_id, []).append(logits_V.clone())
            return sample(logits_BV, requests)

        self.sampler.sample = recorded  # type: ignore[method-assign]
        self.kv_cache_manager.fork = counted  # type: ignore[method-assign]

    def step(self) -> list[RequestOutput]:
        self.num_steps += 1
        outputs = super().step()
        if not self.has_unfinished_requests():
            self.kv_cache_manager.check_integrity()
        return outputs

    def serve(self, requests: Iterable[Request], arrivals: Iterable[int] | None = None) -> dict[str, list[int]]:
        """Runs all requests to their end, request i added before step arrivals[i]; returns their tokens."""
        requests = list(requests)
        pending = sorted(zip(arrivals or [0] * len(requests), range(len(requests)), strict=True))
        answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
        step = 0
        while pending or self.has_unfinished_requests():
            while pending and pending[0][0] <= step:
                self.add_request(requests[pending.pop(0)[1]])
            if self.has_unfinished_requests():
                for output in self.step():
                    answers[output.request_id] += output.token_ids
            step += 1
        return answers

    @property
    def num_preemptions(self) -> int:
        return self.scheduler.num_preemptions


@dataclass(frozen=True)
class TinyModel:
    full: PreTrainedModel
    loaded: LoadedHalf
    prompts: list[Prompt]

    def picture(self, seed: int, grid_thw: Grid = (1, 8, 10)) -> Picture:
        return picture(seed, grid_thw, self.full.config.text_config.hidden_size, num_deepstack(self.full.config))

    def prompt(self, *parts: int | Picture) -> Prompt:
        return Prompt(parts)

    def engine(
        self,
        numerics: Literal["exact", "fast"] = "exact",
        eos: Iterable[int] = (),
        *,
        asynchronous: bool = False,
        **config: Any,
    ) -> RecordingEngine:
        defaults = {"block_size": 8, "num_kv_blocks": 256, "prefill_chunk_size": 16, "max_model_len": 512}
        engine = RecordingEngine(
            self.loaded,
            EngineConfig(**{**defaults, **config}),
            numerics=numerics,
            eos_token_ids=frozenset(eos),
            mrope_rule="qwen",
        )
        if asynchronous:
            engine.model_runner = AsynchronousRunner(self.loaded, engine.config, exact=numerics == "exact")
        return engine

    @torch.inference_mode()
    def refer(self, prompt: Prompt) -> Prompt:
        """Lets the one-piece model answer, with the same features injected."""
        token_ids = torch.tensor([prompt.token_ids])
        images: dict[str, Any] = {}
        if prompt.pictures:
            embeddings = [image.embedding for image in prompt.pictures]
            output = BaseModelOutputWithDeepstackFeatures(
                pooler_output=[embedding.features for embedding in embeddings],
                deepstack_features=list(zip(*(embedding.deepstack for embedding in embeddings), strict=True)),
            )
            images = {
                "mm_encoder_outputs": {"image": output},
                "image_grid_thw": torch.tensor([embedding.grid_thw for embedding in embeddings]),
            }
        self.full.model.rope_deltas = None  # state of the last call
        generated = self.full.generate(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            mm_token_type_ids=(token_ids == IMAGE).int(),
            **images,
            do_sample=False,
            max_new_tokens=NUM_REFERENCE_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        prompt.reference_tokens = generated.sequences[0, token_ids.shape[1] :].tolist()
        prompt.reference_logits = [logits[0] for logits in generated.logits]
        return prompt


def num_deepstack(config: Any) -> int:
    return len(getattr(config.vision_config, "deepstack_visual_indexes", ()))


def random_prompts(rng: random.Random, config: Any) -> list[Prompt]:
    """Prompts of 1 to about 150 tokens with 0 to 3 pictures; some begin alike, so that prefixes can be shared."""
    sizes = config.text_config.hidden_size, num_deepstack(config)
    pictures = [picture(seed, (1, 2 * rng.randint(1, 6), 2 * rng.randint(1, 7)), *sizes) for seed in range(6)]

    def text(most: int) -> list[int]:
        return [rng.randrange(NUM_TEXT_TOKENS) for _ in range(rng.randint(1, most))]

    prompts = [Prompt(text(1)), Prompt(text(60)), Prompt(text(12))]
    for num_pictures in (0, 1, 1, 2, 2, 3):
        beginning = [part for _ in range(num_pictures) for part in (*text(20), rng.choice(pictures))]
        beginning += text(30)
        prompts += [Prompt(beginning + text(20)), Prompt(beginning + text(20))]
    return prompts


def tiny_model(model_type: str, path: Path, hidden: int = 32) -> TinyModel:
    half_head = hidden // 8
    config_class, model_class = MODELS[model_type]
    # What is added to images behind the last layer changes no logits, so there is one layer more than sets.
    deepstack = {"deepstack_visual_indexes": [0, 1]} if model_type == "qwen3_vl" else {}
    text = {"head_dim": hidden // 4, "num_hidden_layers": 3} if deepstack else {"num_hidden_layers": 2}
    config = config_class(
        text_config={
            "vocab_size": 320,
            "hidden_size": hidden,
            "intermediate_size": hidden * 11 // 4,
            **text,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 1.7 / hidden**0.5,  # with less, answers are one token repeated and prove nothing
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half_head // 4, half_head // 4, half_head - half_head // 4 * 2],
            },
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": hidden,
            "num_heads": 1,
            "out_hidden_size": hidden,
            **deepstack,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    full = model_class(config).eval()
    full.generation_config.eos_token_id = None  # the reference never stops; stopping is the engine's own affair
    full.save_pretrained(path)
    loaded = load_half(ModelConfig(path=str(path), device="cpu"), "language")
    model = TinyModel(full, loaded, random_prompts(random.Random(5), config))
    for prompt in model.prompts:
        model.refer(prompt)
    return model


@pytest.fixture(scope="session", params=sorted(MODELS))
def each_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny model of every family, one after the other."""
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model("qwen2_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session", params=sorted(MODELS))
def wide_gpu_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Wide enough for the kernels of a GPU."""
    return tiny_model(request.param, tmp_path_factory.mktemp("wide-gpu"), hidden=512)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Wide enough that a matrix product's bits do depend on its number of rows."""
    return tiny_model("qwen2_vl", tmp_path_factory.mktemp("wide"), hidden=256)


@pytest.fixture(scope="session")
def wide_deepstack_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """As `wide_model`, and images are added to behind the first layers, too."""
    return tiny_model("qwen3_vl", tmp_path_factory.mktemp("wide-deepstack"), hidden=256)
