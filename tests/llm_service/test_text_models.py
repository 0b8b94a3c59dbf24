"""Text models other than Qwen-VL's: in `exact` no bit of a logit depends on company, chunks or preemption."""

import random
from typing import Any

import pytest
import torch

from common.checkpoint import load_half
from common.config import ModelConfig
from common.embedding import VisionEmbedding
from llm_service.config import EngineConfig
from llm_service.engine.request import MultiModalFeature, PlaceholderRange, Request, SamplingParams
from tests.llm_service.conftest import RecordingEngine
from tests.tiny_families import write_tiny_family

HIDDEN = 256  # wide enough that a matrix product's bits do depend on its number of rows
NUM_ANSWER_TOKENS = 24


@pytest.fixture(scope="module", params=["llava", "llava-siglip", "internvl", "blip-2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Llama, Mistral, Qwen2 and OPT."""
    directory = write_tiny_family(request.param, tmp_path_factory.mktemp(request.param), hidden=HIDDEN)
    return load_half(ModelConfig(path=str(directory), device="cpu"), "language")


def engine(loaded: Any, **config: int) -> RecordingEngine:
    sizes = {"block_size": 8, "num_kv_blocks": 256, "prefill_chunk_size": 16, "max_model_len": 256, **config}
    return RecordingEngine(
        loaded, EngineConfig(**sizes), numerics="exact", eos_token_ids=frozenset(), mrope_rule="qwen"
    )


def prompt(seed: int) -> Request:
    """Text, an image of random features, text."""
    rng = random.Random(seed)
    before, image, after = (rng.randint(1, 40) for _ in range(3))
    token_ids = [rng.randrange(300) for _ in range(before + image + after)]
    features = torch.randn(image, HIDDEN, generator=torch.Generator().manual_seed(seed))
    feature = MultiModalFeature(
        f"namespace:{seed}:", PlaceholderRange(before, image), VisionEmbedding({"features": features}, (1, 1, 1))
    )
    positions = torch.arange(len(token_ids)).expand(3, -1)
    sampling = SamplingParams(max_tokens=NUM_ANSWER_TOKENS)
    return Request(str(seed), token_ids, positions, len(token_ids), sampling, [feature])


def test_exact_logits_do_not_depend_on_company_chunks_or_preemption(loaded: Any) -> None:
    alone = {}
    for seed in range(6):
        single = engine(loaded)
        single.serve([prompt(seed)])
        alone |= {request_id: torch.stack(logits) for request_id, logits in single.logits.items()}
    together = engine(loaded, num_kv_blocks=20, max_num_batched_tokens=24)
    together.serve([prompt(seed) for seed in range(6)], arrivals=[0, 0, 1, 2, 3, 4])
    assert together.num_preemptions > 0
    for request_id, logits in together.logits.items():
        assert torch.equal(torch.stack(logits), alone[request_id]), request_id
