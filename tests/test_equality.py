"""The promises: separating, caching, company and interruption do not change what the model says.

Two services in one process, each with its half of a tiny model, sharing nothing but packed embeddings.
"""

import asyncio
import io
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from common.checkpoint import load_preprocessor_config, weights_digest
from common.embedding import VisionEmbedding, unpack
from common.media import MediaItem
from tests.conftest import picture
from tests.services import MAX_TOKENS, Services


class Reference:
    """transformers' one-piece model, its own image processor and `generate()`."""

    def __init__(self, checkpoint: Path, model: PreTrainedModel) -> None:
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.processor = Qwen2VLImageProcessorPil(**load_preprocessor_config(checkpoint))

    def inputs(self, text: str, images: list[bytes]) -> dict[str, torch.Tensor]:
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        message = {"role": "user", "content": content if images else text}
        ids = self.tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"]
        image_id = self.model.config.image_token_id
        pixels = {}
        if images:
            pixels = dict(self.processor([Image.open(io.BytesIO(image)) for image in images], return_tensors="pt"))
            counts = iter((pixels["image_grid_thw"].prod(-1) // 4).tolist())
            ids = [token for one in ids for token in [one] * (next(counts) if one == image_id else 1)]
        input_ids = torch.tensor([ids])
        mask = {"attention_mask": torch.ones_like(input_ids), "mm_token_type_ids": (input_ids == image_id).int()}
        return {"input_ids": input_ids, **mask, **pixels}

    @torch.inference_mode()
    def tokens(self, text: str, images: list[bytes], max_tokens: int = MAX_TOKENS) -> list[int]:
        inputs = self.inputs(text, images)
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
        return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path, one_piece: PreTrainedModel) -> Reference:
    return Reference(tiny_checkpoint, one_piece)


def workload(seed: int) -> tuple[str, list[bytes]]:
    rng = random.Random(seed)
    words = ["What", "is", "left", "of", "the", "circle", "图中", "有几个", "图形", "?", "\n"]
    images = [
        picture(rng.randint(40, 200), rng.randint(40, 200), rng.randrange(10**6)) for _ in range(rng.randrange(4))
    ]
    return " ".join(rng.choices(words, k=rng.randint(1, 30))), images


# 1. Separated is full


async def test_features_leave_the_logits_of_the_one_piece_model_unchanged(
    services: Services, reference: Reference
) -> None:
    text, images = "What is this?", [picture(90, 140, 1), picture(130, 60, 2)]
    prepared = await services.prepare(text, images)
    inputs = reference.inputs(text, images)
    assert prepared.request.prompt_token_ids == inputs["input_ids"][0].tolist()
    with torch.inference_mode():
        encoded = reference.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        full = reference.model(**inputs).logits
        alone = []
        for image in images:  # the reference, too, called with one image: company changes bits
            one = reference.inputs("", [image])
            rows = reference.model.get_image_features(one["pixel_values"], one["image_grid_thw"], return_dict=True)
            alone.append(rows.pooler_output[0])
        features = [feature.embedding.features for feature in prepared.request.mm_features]
        assert all(map(torch.equal, features, alone))
        text_only = {name: value for name, value in inputs.items() if name != "pixel_values"}
        logits = []
        for rows in (alone, features):
            encoded.pooler_output = [row.clone() for row in rows]
            reference.model.model.rope_deltas = None  # state that the last call left
            logits.append(reference.model(**text_only, mm_encoder_outputs={"image": encoded}).logits)
    assert torch.equal(*logits)
    torch.testing.assert_close(logits[0], full)


@pytest.mark.parametrize("seed", range(12))
async def test_greedy_tokens_are_those_of_the_one_piece_model(
    services: Services, reference: Reference, seed: int
) -> None:
    text, images = workload(seed)
    assert await services.tokens(text, images) == reference.tokens(text, images)


@pytest.mark.soak
async def test_greedy_tokens_are_those_of_the_one_piece_model_a_thousand_times(
    services: Services, reference: Reference
) -> None:
    for seed in range(1000, 2000):
        text, images = workload(seed)
        assert await services.tokens(text, images) == reference.tokens(text, images), seed


async def test_sixteen_at_once_are_those_of_the_one_piece_model(services: Services, reference: Reference) -> None:
    workloads = [workload(seed) for seed in range(100, 116)]
    answers = await asyncio.gather(*(services.tokens(*work) for work in workloads))
    assert answers == [reference.tokens(*work) for work in workloads]


async def test_the_two_halves_are_the_whole_and_nothing_else(services: Services, one_piece: PreTrainedModel) -> None:
    namespace = await services.encoder.describe()
    assert namespace.weights == weights_digest(one_piece, "vision")
    encoder_model = services.encoder._encoder.half.model
    names = [name for name, _ in encoder_model.named_parameters()]
    assert names and all(name.startswith("model.visual.") for name in names)
    assert not [name for name in vars(services.llm) if "visual" in name]


# 2. Hit is miss


async def test_logits_after_a_hit_are_those_after_the_miss(services: Services) -> None:
    image = picture(100, 100, 5)
    missed = await services.prepare("What?", [image])
    hit = await services.prepare("What?", [image])
    assert [receipt.source for receipt in (*missed.receipts, *hit.receipts)] == ["encoder", "local"]
    assert torch.equal(missed.request.mm_features[0].embedding.features, hit.request.mm_features[0].embedding.features)
    assert await services.tokens("What?", [image]) == await services.tokens("What?", [image])
    assert services.encoder.num_encoded == 1


async def test_evicted_embedding_is_encoded_again(services: Services, reference: Reference) -> None:
    image = picture(100, 120, 6)
    prepared = await services.prepare("What?", [image])
    services.cache.discard(prepared.request.mm_features[0].key)
    again = await services.prepare("What?", [image])
    assert [receipt.source for receipt in again.receipts] == ["encoder"]
    assert await services.tokens("What?", [image]) == reference.tokens("What?", [image])


# 3. Alone is in company (encoder): tests/encoder_service/test_server.py has the batch; this is the join


async def test_concurrent_requests_for_one_new_picture_encode_it_once(services: Services) -> None:
    image = picture(150, 90, 7)
    prepared = await asyncio.gather(*(services.prepare("What?", [image, image]) for _ in range(8)))
    assert services.encoder.num_encoded == 1
    features = [feature.embedding.features for one in prepared for feature in one.request.mm_features]
    assert all(torch.equal(features[0], other) for other in features)


# 6. Two images are two images


async def test_same_text_with_other_pixels_shares_no_block_from_the_image_on(tiny_checkpoint: Path) -> None:
    services = Services(tiny_checkpoint, block_size=4, prefill_chunk_size=16)
    text = "Describe the picture from left to right. " * 4
    first, other = picture(112, 112, 8), picture(112, 112, 9)
    before = await services.tokens(text, [first])
    prepared = await services.prepare(text, [other])
    outputs = [output async for output in services.llm.generate(prepared)]
    image_start = prepared.request.mm_features[0].position.offset
    assert outputs[-1].num_cached_tokens <= image_start
    repeated = await services.prepare(text, [first])
    outputs = [output async for output in services.llm.generate(repeated)]
    assert outputs[-1].num_cached_tokens > image_start
    assert [token for output in outputs for token in output.token_ids] == before
    services.llm.engine.shutdown()


async def test_embedding_under_the_wrong_key_is_encoded_again(services: Services, reference: Reference) -> None:
    right, wrong = picture(112, 112, 10), picture(112, 112, 11)
    prepared = [await services.prepare("What?", [image]) for image in (right, wrong)]
    key = prepared[0].request.mm_features[0].key
    item = MediaItem.of(wrong, services.llm.media.params)
    services.cache.put(key, await services.encoder.encode(item))
    again = await services.prepare("What?", [right])
    assert [receipt.source for receipt in again.receipts] == ["encoder"]
    assert await services.tokens("What?", [right]) == reference.tokens("What?", [right])


async def test_packed_reply_is_the_embedding(services: Services) -> None:
    item = MediaItem.of(picture(70, 90, 12), services.llm.media.params)
    key = (await services.encoder.describe()).key(item.mm_hash, str(item.params))
    embedding = unpack(await services.encoder.encode(item), key=key)
    assert isinstance(embedding, VisionEmbedding)
    assert embedding.features.shape == (embedding.num_tokens, 64)
