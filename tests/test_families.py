"""Every family from an ordinary checkpoint directory: separated equals one-piece."""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from encoder_service.encoder import rows_of_images
from tests.conftest import picture, write_tiny_checkpoint
from tests.test_equality import Reference as QwenReference
from tests.test_equality import Services, workload
from tests.tiny_families import TINY_FAMILIES, Reference, write_tiny_family

MAX_TOKENS = 12


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def qwen_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen_reference(qwen_checkpoint: Path) -> QwenReference:
    model = AutoModelForImageTextToText.from_pretrained(qwen_checkpoint, dtype=torch.float32).eval()
    return QwenReference(qwen_checkpoint, model)


@pytest.fixture(scope="module")
def qwen_services(qwen_checkpoint: Path) -> Iterator[Services]:
    found = Services(qwen_checkpoint)
    yield found
    found.llm.engine.shutdown()


async def test_embedding_of_a_qwen_is_get_image_features_of_that_one_image(
    qwen_services: Services, qwen_reference: QwenReference
) -> None:
    images = [picture(90, 140, 1), picture(130, 60, 2)]
    prepared = await qwen_services.prepare("What?", images)
    for image, feature in zip(images, prepared.request.mm_features, strict=True):
        inputs = qwen_reference.inputs("", [image])
        with torch.inference_mode():
            output = qwen_reference.model.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
            )
        expected = [output.pooler_output[0], *(rows[0] for rows in output.get("deepstack_features") or ())]
        embedding = feature.embedding
        assert all(map(torch.equal, [embedding.features, *embedding.deepstack], expected))
        assert len(expected) == len(embedding.tensors)


@pytest.mark.parametrize("seed", range(5))
async def test_greedy_tokens_of_a_qwen_are_those_of_generate(
    qwen_services: Services, qwen_reference: QwenReference, seed: int
) -> None:
    text, images = workload(seed)
    assert await qwen_services.tokens(text, images) == qwen_reference.tokens(text, images)


@pytest.fixture(scope="module", params=list(TINY_FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_family(name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def reference(name: str, checkpoint: Path) -> Reference:
    return Reference(name, checkpoint)


@pytest.fixture
def services(checkpoint: Path) -> Iterator[Services]:
    found = Services(checkpoint)
    yield found
    found.llm.engine.shutdown()


def opened(images: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(image)) for image in images]


SIZES = [(90, 140), (130, 60), (56, 56), (300, 40), (33, 200)]


@pytest.mark.parametrize("size", SIZES)
async def test_features_are_those_of_get_image_features_of_that_one_image(
    services: Services, reference: Reference, size: tuple[int, int]
) -> None:
    image = picture(*size, seed=1)
    prepared = await services.prepare("What is this?", [image])
    inputs = reference.inputs("What is this?", opened([image]))
    of_text = ("input_ids", "attention_mask", "token_type_ids")
    with torch.inference_mode():
        output = reference.model.get_image_features(
            **{name: value for name, value in inputs.items() if name not in of_text}, return_dict=True
        )
    (expected,) = rows_of_images(output.pooler_output)
    assert prepared.request.prompt_token_ids == inputs["input_ids"][0].tolist()
    assert torch.equal(torch.cat([part.embedding.features for part in prepared.request.mm_features]), expected)


@pytest.mark.parametrize("seed", range(6))
async def test_greedy_tokens_are_those_of_generate(services: Services, reference: Reference, seed: int) -> None:
    rng = random.Random(seed)
    text, _ = workload(seed)
    images = [picture(*rng.choice(SIZES), seed=rng.randrange(10**6)) for _ in range(seed % 4)]
    images = images[: reference.family.max_images]
    prepared = await services.prepare(text, images, MAX_TOKENS)
    assert prepared.request.prompt_token_ids == reference.inputs(text, opened(images))["input_ids"][0].tolist()
    assert await services.tokens(text, images, MAX_TOKENS) == reference.tokens(text, opened(images), MAX_TOKENS)
