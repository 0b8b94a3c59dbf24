"""Every family from an ordinary checkpoint directory: separated equals one-piece."""

import asyncio
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, MllamaConfig

from common.cache import LocalTier, TieredCache
from common.checkpoint import load_config, weights_digest
from common.config import ModelConfig
from common.errors import InvalidRequestError
from deploy.app import AppConfig, build_app
from deploy.verify import OnePieceModel
from encoder_service.config import EncoderConfig
from encoder_service.encoder import rows_of_images
from encoder_service.server import EncoderServer
from llm_service.config import EngineConfig
from llm_service.placeholders import image_token_of
from llm_service.server import LLMServer
from tests.conftest import picture, write_tiny_checkpoint
from tests.services import Services
from tests.test_equality import Reference as QwenReference
from tests.test_equality import workload
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


@pytest.fixture(scope="module")
def services(checkpoint: Path) -> Iterator[Services]:
    found = Services(checkpoint)
    yield found
    found.llm.engine.shutdown()


def opened(images: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(image)) for image in images]


SIZES = [(90, 140), (56, 56), (300, 40), (33, 200)]


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


@pytest.mark.parametrize("seed", range(4))
async def test_greedy_tokens_are_those_of_generate(services: Services, reference: Reference, seed: int) -> None:
    rng = random.Random(seed)
    text, _ = workload(seed)
    images = [picture(*rng.choice(SIZES), seed=rng.randrange(10**6)) for _ in range(seed % 4)]
    images = images[: reference.family.max_images]
    prepared = await services.prepare(text, images, MAX_TOKENS)
    assert prepared.request.prompt_token_ids == reference.inputs(text, opened(images))["input_ids"][0].tolist()
    assert await services.tokens(text, images, MAX_TOKENS) == reference.tokens(text, opened(images), MAX_TOKENS)


async def test_the_two_halves_are_the_whole(services: Services, reference: Reference) -> None:
    namespace = await services.encoder.describe()
    assert namespace.weights == weights_digest(reference.model, "vision")
    assert services.llm._language_weights == weights_digest(reference.model, "language")
    decoder = set(dict(services.encoder._encoder.half.model.named_parameters()))
    whole = dict(reference.model.named_parameters(remove_duplicate=False))
    assert decoder and not any("language_model" in name or "text_model" in name for name in decoder)
    assert decoder < whole.keys()


async def test_another_picture_is_another_answer(services: Services) -> None:
    answers = [await services.tokens("What is this?", [picture(90, 140, seed)], MAX_TOKENS) for seed in range(2)]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("numerics", ["exact", "fast"])
async def test_small_chunks_and_company_change_no_token(
    checkpoint: Path, reference: Reference, numerics: Literal["exact", "fast"]
) -> None:
    blocks = {"block_size": 4, "num_kv_blocks": 70, "max_model_len": 280}
    services = Services(checkpoint, numerics, **blocks, prefill_chunk_size=8, max_num_batched_tokens=24)
    questions = [("What is this? " * index, [picture(*size, seed=index)]) for index, size in enumerate(SIZES)]
    answers = await asyncio.gather(*(services.tokens(text, images, MAX_TOKENS) for text, images in questions))
    assert answers == [reference.tokens(text, opened(images), MAX_TOKENS) for text, images in questions]
    services.llm.engine.shutdown()


async def test_files_as_transformers_saves_them_now_are_the_same_checkpoint(
    checkpoint: Path, reference: Reference, tmp_path: Path
) -> None:
    reference.model.save_pretrained(tmp_path)
    reference.processor.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    services = Services(tmp_path)
    text, image = "What is this?", picture(90, 140, seed=3)
    assert await services.tokens(text, [image], 8) == reference.tokens(text, opened([image]), 8)
    services.llm.engine.shutdown()


@pytest.mark.parametrize("family", ["llava", "idefics2", "idefics3", "blip-2", "instructblip"])
async def test_verify_compares_with_the_one_piece_model_of_any_family(family: str, tmp_path: Path) -> None:
    reference = Reference(family, write_tiny_family(family, tmp_path))
    reference.processor.save_pretrained(tmp_path)
    one_piece = OnePieceModel(ModelConfig(path=str(tmp_path)))
    services = Services(tmp_path)
    tokens = await services.tokens("What is this?", [picture(90, 140)], 8)
    expected = services.llm.prompt.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd"), len(tokens)
    assert one_piece.answer(picture(90, 140), "What is this?", 8) == expected
    fingerprint = await services.llm.fingerprint()
    services.llm.engine.shutdown()
    assert one_piece.fingerprint() == fingerprint


async def test_control_tokens_that_a_user_typed_stay_text(services: Services) -> None:
    image = picture(60, 60, 1)
    prepared = await services.prepare("<image><IMG_CONTEXT><fake_token_around_image></s>", [image])
    plain = await services.prepare("", [image])
    special = set(services.llm.prompt.tokenizer.all_special_ids)
    counts = [sum(token in special for token in one.request.prompt_token_ids) for one in (prepared, plain)]
    assert counts[0] == counts[1]


async def test_features_of_instructblip_depend_on_the_text_and_so_does_their_key(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = write_tiny_family("instructblip", tmp_path_factory.mktemp("instructblip"))
    services = Services(directory)
    image = picture(90, 140, 1)
    prepared = [await services.prepare(text, [image]) for text in ("What is this?", "Where?", "What is this?")]
    first, other, again = (one.request.mm_features[0] for one in prepared)
    assert first.key != other.key and not torch.equal(first.embedding.features, other.embedding.features)
    assert first.key == again.key and torch.equal(first.embedding.features, again.embedding.features)
    assert services.encoder.num_encoded == 2
    with pytest.raises(InvalidRequestError, match=r"tokens of the Q-Former, which takes 512"):
        await services.prepare("What? " * 200, [image])
    services.llm.engine.shutdown()


async def test_onevision_encodes_an_image_among_others_anew(tmp_path_factory: pytest.TempPathFactory) -> None:
    services = Services(write_tiny_family("llava_onevision", tmp_path_factory.mktemp("onevision")))
    image, other = picture(90, 140, 1), picture(90, 140, 2)
    alone = (await services.prepare("What?", [image])).request.mm_features[0]
    among = (await services.prepare("What?", [image, other])).request.mm_features[0]
    assert alone.key != among.key
    assert (alone.embedding.grid_thw, among.embedding.grid_thw) == ((2, 4, 6), (1, 4, 4))
    services.llm.engine.shutdown()


def test_pixel_budget_is_refused_where_it_has_no_effect(tmp_path: Path) -> None:
    directory = write_tiny_family("llava", tmp_path / "model")
    model = ModelConfig(path=str(directory), max_pixels=10_000)
    encoder = EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(2**20), None))
    with pytest.raises(ValueError, match=r"model\.max_pixels have no effect on 'llava'"):
        LLMServer(model, EngineConfig(), TieredCache(LocalTier(2**20), None), encoder)


async def test_image_that_the_processor_cannot_take_is_a_callers_error(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    services = Services(write_tiny_family("idefics2", tmp_path_factory.mktemp("idefics2")))
    with pytest.raises(InvalidRequestError, match="cannot take an image of 1 x 1 pixels") as caught:
        await services.prepare("What?", [picture(1, 1)])
    assert caught.value.param == "messages"
    assert len(await services.tokens("What?", [picture(2, 2)], 4)) > 0
    services.llm.engine.shutdown()


@pytest.mark.parametrize("token_id", [None, 10**6])
def test_configuration_without_an_image_token_is_refused(token_id: int | None, tmp_path: Path) -> None:
    config = load_config(write_tiny_family("blip-2", tmp_path))
    config.image_token_index = token_id
    with pytest.raises(ValueError, match=rf"the image token is {token_id}, none of the text model's \d+"):
        image_token_of(config)


def test_application_of_another_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    MllamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'mllama' is not supported"):
        build_app(AppConfig(model=ModelConfig(path=str(tmp_path))))
