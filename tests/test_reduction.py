"""A part of an image's tokens: which rows stay, what names them, and that the decoder sees them at their places."""

import io
from pathlib import Path

import httpx2
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from common.config import ImageLimits, ModelConfig, TokenReduction
from common.embedding import EmbeddingFormatError, EmbeddingSpecError, Grid, VisionEmbedding, check, pack, unpack
from common.errors import InvalidRequestError
from common.geometry import PatchGeometry
from common.media import MediaParams, reduction_of
from deploy.app import AppConfig
from deploy.bench.reduction import ReducedModel
from encoder_service.encoder import rows_of_images
from encoder_service.reduction import reduce_tokens
from llm_service.api.app import create_app
from llm_service.chat import parse_messages
from llm_service.server import GenerationOptions
from tests.clips import frames, frames_part
from tests.conftest import picture, write_tiny_checkpoint
from tests.services import URL, Services, body, image_part
from tests.test_equality import Reference as QwenReference
from tests.tiny_families import Reference, write_tiny_family

METHODS = ("divprune", "random")
GRID = (1, 8, 12)
MAX_TOKENS = 10


def half(method: str, ratio: float = 0.5) -> TokenReduction:
    return TokenReduction(method=method, ratio=ratio)


def embedding(num_rows: int = 24, grid: Grid = GRID) -> VisionEmbedding:
    rows = torch.randn(3, num_rows, 16, generator=torch.Generator().manual_seed(7))
    return VisionEmbedding({"features": rows[0], "deepstack_0": rows[1], "deepstack_1": rows[2]}, grid, encode_ms=2.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.9])
def test_rows_that_stay_are_exact_rows_in_their_order_in_every_set(method: str, ratio: float) -> None:
    whole = embedding()
    part = reduce_tokens(whole, half(method, ratio), [10, 14])
    assert part.kept is not None and bool((part.kept.diff() > 0).all())
    assert [int((part.kept < 10).sum()), part.num_tokens] == [half(method, ratio).num_kept(10), len(part.kept)]
    assert torch.equal(part.features, whole.features[part.kept])
    assert all(map(torch.equal, part.deepstack, (rows[part.kept] for rows in whole.deepstack)))
    assert (part.grid_thw, len(part.deepstack)) == (GRID, 2) and part.encode_ms >= whole.encode_ms


def test_number_of_rows_is_the_share_of_each_run_rounded_up() -> None:
    assert [half("random", 0.1).num_kept(rows) for rows in (1, 10, 30, 31)] == [1, 1, 3, 4]


def test_diverse_rows_are_those_that_the_definition_gives() -> None:
    """Beside a plain search: the pair's rule for the first row, then the largest smallest distance to the chosen."""
    rows = embedding(40).features
    similarity = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    distance = (1 - similarity).tolist()
    others = range(40)
    chosen = [max(others, key=lambda one: min(distance[one][other] for other in others if other != one))]
    while len(chosen) < 12:
        left = [row for row in others if row not in chosen]
        chosen.append(max(left, key=lambda one: min(distance[one][other] for other in chosen)))
    part = reduce_tokens(VisionEmbedding({"features": rows}, GRID), half("divprune", 0.3), [40])
    assert part.kept is not None and part.kept.tolist() == sorted(chosen)


def test_diverse_rows_have_one_of_each_kind_before_a_second_one() -> None:
    kinds = torch.eye(6, 16)
    rows = kinds.repeat_interleave(torch.tensor([20, 1, 1, 5, 1, 2]), dim=0)
    part = reduce_tokens(VisionEmbedding({"features": rows}, GRID), half("divprune", 0.2), [30])
    assert sorted(part.features.argmax(1).tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_rows_travel_with_their_indices(dtype: torch.dtype) -> None:
    geometry = PatchGeometry(
        patch_size=14, merge_size=2, hidden_size=16, min_pixels=3136, max_pixels=50176, num_deepstack=2
    )
    whole = embedding()
    whole = VisionEmbedding({name: rows.to(dtype) for name, rows in whole.tensors.items()}, GRID)
    part = reduce_tokens(whole, half("divprune"), [24])
    spec = geometry.embedding_spec(GRID, dtype, half("divprune"))
    found = unpack(pack(part, key="k"), key="k", spec=spec)
    assert found.kept is not None and part.kept is not None and torch.equal(found.kept, part.kept)
    assert torch.equal(found.features, part.features) and spec.num_bytes == found.num_bytes
    with pytest.raises(EmbeddingFormatError):
        unpack(pack(part, key="k"), key="k", spec=geometry.embedding_spec(GRID, dtype))
    with pytest.raises(EmbeddingFormatError):
        unpack(pack(whole, key="k"), key="k", spec=spec)


@pytest.mark.parametrize("kept", [[3, 2], [2, 2], [-1, 2], [2, 24]])
def test_indices_that_are_no_rows_of_the_image_are_refused(kept: list[int]) -> None:
    geometry = PatchGeometry(patch_size=14, merge_size=2, hidden_size=16, min_pixels=3136, max_pixels=50176)
    indices = torch.tensor([[row] for row in kept], dtype=torch.int32)
    wrong = VisionEmbedding({"features": torch.zeros(2, 16), "kept": indices}, GRID)
    with pytest.raises(EmbeddingSpecError, match="not ascending ones of 24"):
        check(wrong, geometry.embedding_spec(GRID, torch.float32, half("random", 1 / 12)))


def test_params_name_method_and_ratio_and_are_what_they_were_without() -> None:
    plain = MediaParams(min_pixels=1, max_pixels=2)
    reductions = [None, *(half(method, ratio) for method in METHODS for ratio in (0.25, 0.5))]
    params = [str(MediaParams(min_pixels=1, max_pixels=2, reduction=one)) for one in reductions]
    assert params[0] == str(plain) == "max_pixels=2,min_pixels=1"
    assert len(set(params)) == 5
    assert [reduction_of(one) for one in params] == reductions


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def greedy(
    reference: QwenReference, text: str, images: list[bytes], reduction: TokenReduction, max_tokens: int
) -> list[int]:
    """The one-piece model shown the same rows at the same places, computed anew for every token."""
    inputs = reference.inputs(text, images)
    model = ReducedModel(reference.model)
    tokens: list[int] = []
    ends = reference.model.generation_config.eos_token_id
    with torch.inference_mode():
        embeddings = model.embeddings(inputs["pixel_values"], inputs["image_grid_thw"])
        while len(tokens) < max_tokens and not set(tokens[-1:]) & set(ends):
            ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], dim=1)
            types = (ids == reference.model.config.image_token_id).int()
            logits = model.logits(ids, types, inputs["image_grid_thw"], embeddings, reduction)
            tokens.append(int(logits[-1].argmax()))
    return tokens


@pytest.mark.parametrize("method", METHODS)
async def test_greedy_tokens_are_those_of_the_one_piece_model_shown_the_same_rows(
    checkpoint: Path, method: str
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    reference = QwenReference(checkpoint, model)
    services = Services(checkpoint, reduction=half(method, 0.3))
    workloads = [("What is left?", [picture(120, 150, 1)]), ("Which?", [picture(90, 60, 2), picture(200, 150, 3)])]
    for text, images in workloads:
        expected = greedy(reference, text, images, half(method, 0.3), MAX_TOKENS)
        for _ in range(2):  # encoded, then found; the second time with its KV blocks
            assert await services.tokens(text, images, MAX_TOKENS) == expected
    services.llm.engine.shutdown()


async def test_rows_of_clips_and_images_keep_the_positions_that_they_have_in_the_whole(checkpoint: Path) -> None:
    plain, reduced = Services(checkpoint), Services(checkpoint, reduction=half("divprune", 0.3))
    clip, image = frames_part(frames(5, height=112, width=168), fps=2), image_part(picture(90, 60, 2))
    messages = parse_messages(body(clip, "And", image, "Where?")["messages"], ImageLimits())
    whole, part = [
        await services.llm.prepare(messages, GenerationOptions(max_tokens=4), "x") for services in (plain, reduced)
    ]
    assert len(part.request.mm_features) == 4  # three temporal grids and an image
    assert [receipt.whole_tokens for receipt in part.receipts] == [receipt.tokens for receipt in whole.receipts]
    assert {receipt.reduction for receipt in part.receipts} == {"divprune:0.3"}
    dropped: list[int] = []
    for one, other in zip(whole.request.mm_features, part.request.mm_features, strict=True):
        kept = other.embedding.kept
        assert kept is not None and torch.equal(one.embedding.features[kept], other.embedding.features)
        rows = set(range(one.position.length)) - set(kept.tolist())
        dropped += [one.position.offset + row for row in rows]
    stays = torch.ones(whole.num_prompt_tokens, dtype=torch.bool)
    stays[dropped] = False
    assert torch.equal(part.request.positions, whole.request.positions[:, stays])
    assert part.request.next_position == whole.request.next_position
    assert part.num_prompt_tokens == whole.num_prompt_tokens - len(dropped)
    for services in (plain, reduced):
        services.llm.engine.shutdown()


@pytest.mark.parametrize("name", ["llava", "idefics3"])
async def test_family_without_mrope_gets_fewer_rows_and_no_gaps(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Idefics3 has text between its tiles, each of which is reduced for itself."""
    checkpoint = write_tiny_family(name, tmp_path_factory.mktemp(name))
    reference = Reference(name, checkpoint)
    reduction = half("divprune", 0.4)
    services = Services(checkpoint, reduction=reduction)
    image = picture(90, 140, 1)
    prepared = await services.prepare("What is this?", [image], MAX_TOKENS)
    found = [token async for output in services.llm.generate(prepared) for token in output.token_ids]
    services.llm.engine.shutdown()

    inputs = reference.inputs("What is this?", [Image.open(io.BytesIO(image))])
    ids = inputs["input_ids"][0]
    is_image = ids == reference.model.config.image_token_id
    with torch.inference_mode():
        (rows,) = rows_of_images(
            reference.model.get_image_features(
                **{key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")},
                return_dict=True,
            ).pooler_output
        )
        embeds = reference.model.get_input_embeddings()(ids)
        embeds[is_image] = rows
        part = reduce_tokens(VisionEmbedding({"features": rows}, (1, 1, 1)), reduction, runs_of(is_image))
        assert part.kept is not None
        stays = ~is_image
        stays[is_image.nonzero().flatten()[part.kept]] = True
        text_model = reference.model.model.get_decoder() if name == "idefics3" else reference.model.model.language_model
        sequence = embeds[stays]
        expected: list[int] = []
        ends = reference.model.generation_config.eos_token_id
        while len(expected) < MAX_TOKENS and not set(expected[-1:]) & set(ends):
            hidden = text_model(inputs_embeds=sequence[None], use_cache=False).last_hidden_state[0, -1]
            expected.append(int(reference.model.lm_head(hidden).argmax()))
            sequence = torch.cat([sequence, reference.model.get_input_embeddings()(torch.tensor(expected[-1:]))])
    assert found == expected
    assert prepared.request.prompt_token_ids == ids[stays].tolist()
    assert torch.equal(prepared.request.positions[0], torch.arange(int(stays.sum())))


def runs_of(mask: Tensor) -> list[int]:
    """Lengths of the runs of True."""
    lengths = [0]
    for one in mask.tolist():
        lengths[-1] += one
        if not one and lengths[-1]:
            lengths.append(0)
    return [length for length in lengths if length]


async def test_ratio_of_one_is_no_reduction_to_the_last_bit(tiny_checkpoint: Path) -> None:
    plain, everything = Services(tiny_checkpoint), Services(tiny_checkpoint, reduction=half("divprune", 1.0))
    prepared = [await services.prepare("What?", [picture(120, 150, 1)]) for services in (plain, everything)]
    first, second = (one.request.mm_features[0] for one in prepared)
    assert first.key == second.key and prepared[0].fingerprint == prepared[1].fingerprint
    assert first.embedding.tensors.keys() == second.embedding.tensors.keys() == {"features"}
    assert torch.equal(first.embedding.features, second.embedding.features)
    for services in (plain, everything):
        services.llm.engine.shutdown()


async def test_usage_says_what_was_kept_and_of_how_many(tiny_checkpoint: Path) -> None:
    services = Services(tiny_checkpoint, reduction=half("divprune", 0.25))
    plain = Services(tiny_checkpoint)
    assert await services.llm.fingerprint() != await plain.llm.fingerprint()
    plain.llm.engine.shutdown()
    transport = httpx2.ASGITransport(create_app(services.llm))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        answer = (await http.post(URL, json=body(image_part(picture(112, 168)), "What?"))).json()
    services.llm.engine.shutdown()
    (receipt,) = answer["usage"]["images"]
    assert (receipt["tokens"], receipt["whole_tokens"], receipt["reduction"]) == (6, 24, "divprune:0.25")
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 6


async def test_reduced_embedding_is_exported_and_taken_back_for_its_own_key_only(tiny_checkpoint: Path) -> None:
    services = Services(tiny_checkpoint, reduction=half("divprune"))
    media = services.llm.media
    key = (await media.warm(picture(112, 168))).key
    frame = await media.export(key)
    assert frame is not None and key.endswith("reduction=divprune:0.5")
    await media.import_frame(key, bytes(frame))
    for other in (
        key.replace(":0.5", ":0.25"),
        key.replace(",reduction=divprune:0.5", ""),
        key.replace("divprune:0.5", "x"),
    ):
        with pytest.raises(InvalidRequestError, match="damaged or not of this model"):
            await media.import_frame(other, pack(unpack(frame, key=key), key=other))
    services.llm.engine.shutdown()


async def test_prompt_may_be_as_long_as_what_is_kept(tiny_checkpoint: Path) -> None:
    services = Services(tiny_checkpoint, reduction=half("random", 0.25), max_model_len=80)
    assert len(await services.tokens("What?", [picture(200, 200)], 4)) <= 4  # 49 tokens, and about 45 of text
    services.llm.engine.shutdown()


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5])
def test_ratio_outside_of_0_to_1_is_refused_by_its_name(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"token_reduction.ratio"):
        ModelConfig.model_validate({"path": "x", "token_reduction": {"method": "random", "ratio": ratio}})


def test_one_piece_backend_refuses_what_it_does_not_do(tiny_checkpoint: Path) -> None:
    model = ModelConfig(path=str(tiny_checkpoint), token_reduction=half("random"))
    with pytest.raises(ValueError, match=r"model.token_reduction is for the split service"):
        AppConfig(model=model, backend="transformers")


async def test_prompt_that_is_too_long_with_what_is_kept_says_both_numbers(tiny_checkpoint: Path) -> None:
    services = Services(tiny_checkpoint, reduction=half("random"), max_model_len=40)
    with pytest.raises(InvalidRequestError, match=r"the prompt has \d+ tokens, 25 of them of images"):
        await services.prepare("What?", [picture(200, 200)])
    services.llm.engine.shutdown()
