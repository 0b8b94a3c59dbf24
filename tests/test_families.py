"""Every family from an ordinary checkpoint directory: separated equals one-piece."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.conftest import picture, write_tiny_checkpoint
from tests.test_equality import Reference, Services, workload


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return Reference(checkpoint, model)


@pytest.fixture
def services(checkpoint: Path) -> Iterator[Services]:
    found = Services(checkpoint)
    yield found
    found.llm.engine.shutdown()


async def test_embedding_is_get_image_features_of_that_one_image(services: Services, reference: Reference) -> None:
    images = [picture(90, 140, 1), picture(130, 60, 2)]
    prepared = await services.prepare("What?", images)
    for image, feature in zip(images, prepared.request.mm_features, strict=True):
        inputs = reference.inputs("", [image])
        with torch.inference_mode():
            output = reference.model.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
            )
        expected = [output.pooler_output[0], *(rows[0] for rows in output.get("deepstack_features") or ())]
        embedding = feature.embedding
        assert all(map(torch.equal, [embedding.features, *embedding.deepstack], expected))
        assert len(expected) == len(embedding.tensors)


@pytest.mark.parametrize("seed", range(5))
async def test_greedy_tokens_are_those_of_generate(services: Services, reference: Reference, seed: int) -> None:
    text, images = workload(seed)
    assert await services.tokens(text, images) == reference.tokens(text, images)
