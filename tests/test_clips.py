"""Clips: features of each temporal grid, positions and answers are the one-piece model's, and grids are reused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from common.cache import LocalTier, TieredCache
from common.config import ImageLimits, ModelConfig
from common.errors import InvalidRequestError
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.answer_cache import AnswerCache
from llm_service.api.app import create_app
from llm_service.chat import parse_messages
from llm_service.config import EngineConfig
from llm_service.server import GenerationOptions, LLMServer, PreparedRequest
from tests.clips import FFV1, LOSSLESS, frames, frames_part, png, video, video_part
from tests.common.test_cache import DictTier
from tests.conftest import write_tiny_checkpoint
from tests.services import URL, Services, body, image_part
from tests.test_equality import Reference
from tests.tiny_families import write_tiny_family

MAX_TOKENS = 12
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


class ClipReference(Reference):
    """The one-piece model given a clip: transformers' own pixels of each frame, two of which are in a patch."""

    def clip(self, shown: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixel values and grid of the whole clip."""
        stills = self.processor([*shown, *shown[-1:] * (len(shown) % 2)], return_tensors="pt")
        _, rows, columns = stills["image_grid_thw"][0].tolist()
        # A still is doubled; of each frame one of the two is taken. [grids, frames, patches, colours, P * P]
        single = stills["pixel_values"].view(-1, 2, rows * columns, 3, 2, self.processor.patch_size**2)[:, :, :, :, 0]
        patches = single.permute(0, 2, 3, 1, 4).reshape(-1, stills["pixel_values"].shape[1])
        return patches, torch.tensor([[len(single), rows, columns]])

    def features(self, shown: list[Image.Image]) -> list[torch.Tensor]:
        """Of a clip: the rows, and those of deepstack."""
        pixels, grid = self.clip(shown)
        with torch.inference_mode():
            output = self.model.get_video_features(pixels, grid, return_dict=True)
        return [output.pooler_output[0], *(rows[0] for rows in output.get("deepstack_features") or ())]

    def clip_inputs(self, text: str, shown: list[Image.Image], fps: float, before: str = "") -> dict[str, Any]:
        """What `generate()` takes for a clip between texts."""
        pixels, grid = self.clip(shown)
        num_grids, num_tokens = int(grid[0, 0]), int(grid[0].prod()) // 4 // int(grid[0, 0])
        placeholders = f"{VISION_START}{VIDEO_PAD * num_tokens * num_grids}{VISION_END}"
        if self.model.config.model_type == "qwen3_vl":
            last = len(shown) - 1
            times = [(2 * index + min(2 * index + 1, last)) / 2 / fps for index in range(num_grids)]
            one = f"{VISION_START}{VIDEO_PAD * num_tokens}{VISION_END}"
            placeholders = "".join(f"<{time:.1f} seconds>{one}" for time in times)
        content = [{"type": "text", "text": before}, {"type": "video"}, {"type": "text", "text": text}]
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        prompt = prompt.replace(f"{VISION_START}{VIDEO_PAD}{VISION_END}", placeholders)
        input_ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": 2 * (input_ids == self.model.config.video_token_id).int(),
            "pixel_values_videos": pixels,
            "video_grid_thw": grid,
        }
        if self.model.config.model_type == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([2 / fps])
        return inputs

    @torch.inference_mode()
    def clip_tokens(self, text: str, shown: list[Image.Image], fps: float) -> list[int]:
        inputs = self.clip_inputs(text, shown, fps)
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
        return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its configuration names the rule of the transformers that it is compared with. Its tokenizer joins ':<', as
    Qwen's do."""
    directory = write_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"mrope_rule": "hf5"}))
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    vocab[":<"] = vocab.pop("".join(merges[-1]))
    merges[-1] = [":", "<"]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> ClipReference:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return ClipReference(checkpoint, model)


@pytest.fixture(scope="module")
def both(checkpoint: Path) -> Iterator[Services]:
    found = Services(checkpoint)
    yield found
    found.llm.engine.shutdown()


async def prepare(services: Services, *content: Any) -> PreparedRequest:
    messages = parse_messages(body(*content)["messages"], ImageLimits())
    return await services.llm.prepare(messages, GenerationOptions(max_tokens=MAX_TOKENS), "request")


async def tokens_of(services: Services, prepared: PreparedRequest) -> list[int]:
    return [token async for output in services.llm.generate(prepared) for token in output.token_ids]


@pytest.mark.parametrize("number", [1, 2, 5, 8])
async def test_features_of_a_grid_are_get_video_features_of_that_grid_alone(
    both: Services, reference: ClipReference, number: int
) -> None:
    shown = frames(number, first=100)
    prepared = await prepare(both, frames_part(shown), "What?")
    embeddings = [feature.embedding for feature in prepared.request.mm_features]
    assert len(embeddings) == -(-number // 2)
    for index, embedding in enumerate(embeddings):
        expected = reference.features(shown[2 * index : 2 * index + 2])
        assert len(expected) == len(embedding.tensors)
        assert all(map(torch.equal, [embedding.features, *embedding.deepstack], expected))
    whole = [torch.cat(rows) for rows in zip(*([one.features, *one.deepstack] for one in embeddings), strict=True)]
    for rows, expected_rows in zip(whole, reference.features(shown), strict=True):
        torch.testing.assert_close(rows, expected_rows)


@pytest.mark.parametrize(("number", "fps"), [(2, 2.0), (7, 1.0), (12, 3.0), (24, 0.7)])
async def test_greedy_tokens_about_a_clip_are_those_of_generate(
    both: Services, reference: ClipReference, number: int, fps: float
) -> None:
    shown = frames(number, first=200)
    prepared = await prepare(both, frames_part(shown, fps=fps), "Which way does it move?")
    inputs = reference.clip_inputs("Which way does it move?", shown, fps)
    assert prepared.request.prompt_token_ids == inputs["input_ids"][0].tolist()
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    positions, _ = reference.model.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})
    assert torch.equal(prepared.request.positions, positions[:, 0])
    assert await tokens_of(both, prepared) == reference.clip_tokens("Which way does it move?", shown, fps)


@pytest.mark.parametrize("before", ["Look at this:", "看：", "What? ", "a<|im_end|>:"])
async def test_text_before_a_clip_is_tokenized_with_what_follows_it(
    both: Services, reference: ClipReference, before: str
) -> None:
    shown = frames(4, first=250)
    prepared = await prepare(both, before, frames_part(shown, fps=2), "What?")
    written = before.replace("<|im_end|>", "<|im_\0end|>")  # which the service takes as text
    expected = reference.clip_inputs("What?", shown, 2, written)["input_ids"][0].tolist()
    nothing = reference.tokenizer.encode("\0")
    assert prepared.request.prompt_token_ids == [token for token in expected if [token] != nothing]


async def test_clip_from_a_lossless_file_is_its_frames(both: Services, reference: ClipReference) -> None:
    shown = frames(9, first=300)
    prepared = await prepare(both, video_part(video(shown, fps=5, **LOSSLESS), fps=5), "What moves?")
    assert await tokens_of(both, prepared) == reference.clip_tokens("What moves?", shown, 5)


GROWN, SHIFTED = slice(0, 62), slice(2, 62)


@pytest.mark.parametrize(("later", "seed"), [(GROWN, 400), (SHIFTED, 500)])
async def test_clip_of_60_frames_that_grows_or_shifts_by_two_encodes_one_grid(
    both: Services, later: slice, seed: int
) -> None:
    shown = frames(62, seed)
    counts = []
    for span in (slice(0, 60), later):
        before = both.encoder.num_encoded
        receipt = (await prepare(both, frames_part(shown[span], fps=30), "What?")).receipts[0]
        counts.append(both.encoder.num_encoded - before)
        assert receipt.grids - receipt.cached_grids == counts[-1]
    assert counts == [30, 1]


@pytest.mark.parametrize(("later", "seed"), [(GROWN, 600), (SHIFTED, 800)])
@pytest.mark.parametrize("encoding", [LOSSLESS, FFV1], ids=["mp4", "matroska"])
async def test_lossless_file_of_60_samples_that_grows_or_shifts_by_two_encodes_one_grid(
    both: Services, encoding: dict[str, Any], later: slice, seed: int
) -> None:
    """Sampled at half of its rate."""
    shown = frames(124, seed + 1000 * (encoding is FFV1))
    counts = []
    for span in (slice(0, 60), later):
        file = video(shown[2 * span.start : 2 * span.stop], fps=30, **encoding)
        before = both.encoder.num_encoded
        receipt = (await prepare(both, video_part(file, fps=15), "What?")).receipts[0]
        assert receipt.frames == span.stop - span.start
        counts.append(both.encoder.num_encoded - before)
    assert counts == [30, 1]


async def test_growing_clip_computes_only_what_is_new(checkpoint: Path) -> None:
    services = Services(checkpoint, block_size=4, prefill_chunk_size=16)
    cached = []
    for number in (20, 24):
        prepared = await prepare(services, frames_part(frames(number, 600), fps=2), "What?")
        outputs = [output async for output in services.llm.generate(prepared)]
        cached.append(outputs[-1].num_cached_tokens)
    kept = prepared.request.mm_features[10].position.offset
    assert cached[0] == 0 and kept - 32 < cached[1] <= kept + 16
    services.llm.engine.shutdown()


async def test_same_frames_at_another_rate_share_no_block_where_positions_follow_from_it(checkpoint: Path) -> None:
    services = Services(checkpoint, block_size=4, prefill_chunk_size=16)
    for fps in (2, 1):
        prepared = await prepare(services, frames_part(frames(8, 650), fps=fps), "What?")
        outputs = [output async for output in services.llm.generate(prepared)]
    start = prepared.request.mm_features[0].position.offset
    shares_all = "qwen2_vl" in str(checkpoint)
    assert (outputs[-1].num_cached_tokens > start + 16) == shares_all
    services.llm.engine.shutdown()


async def test_clip_among_images_keeps_their_order(both: Services, reference: ClipReference) -> None:
    first, *clip, last = frames(6, first=700)
    prepared = await prepare(both, image_part(png(first)), "then", frames_part(clip), image_part(png(last)), "What?")
    assert [receipt.grids for receipt in prepared.receipts] == [0, 2, 0]
    features = [feature.embedding.features for feature in prepared.request.mm_features]
    assert torch.equal(
        torch.cat(features[1:3]), torch.cat([reference.features(clip[:2])[0], reference.features(clip[2:])[0]])
    )
    for features_of_still, still in ((features[0], first), (features[3], last)):
        assert torch.equal(features_of_still, reference.features([still])[0])  # a still is a frame twice


async def test_budget_of_a_frame_is_its_own_whatever_the_length_of_its_clip(checkpoint: Path) -> None:
    budget = 28 * 28 * 4
    model = ModelConfig(path=str(checkpoint), served_name="tiny", max_frame_pixels=budget)
    encoder = EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(2**26), None))
    llm = LLMServer(model, EngineConfig(), TieredCache(LocalTier(2**26), None), encoder)
    lengths = set()
    for number in (2, 40):
        messages = parse_messages(body(frames_part(frames(number, 900, 112, 112)), "What?")["messages"], llm.limits)
        prepared = await llm.prepare(messages, GenerationOptions(max_tokens=2), "request")
        lengths |= {feature.position.length for feature in prepared.request.mm_features}
    assert len(lengths) == 1 and lengths.pop() <= 4 and encoder.num_encoded == 20
    llm.engine.shutdown()


async def test_seconds_of_a_clip_count_against_the_length_of_the_model(checkpoint: Path) -> None:
    """Where positions follow from them: by the rule `qwen` the text after a clip goes on behind its last second."""
    model = ModelConfig(path=str(checkpoint), served_name="tiny", mrope_rule="qwen")
    encoder = EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(2**26), None))
    llm = LLMServer(model, EngineConfig(max_model_len=256), TieredCache(LocalTier(2**26), None), encoder)
    follows_time = "qwen2_5_vl" in str(checkpoint)
    for fps, fits in ((2, True), (0.02, not follows_time)):
        messages = parse_messages(body(frames_part(frames(4, 950), fps=fps), "What?")["messages"], llm.limits)
        if fits:
            prompt, _ = await llm.count(messages)
            assert prompt.next_position <= prompt.num_positions == len(prompt.token_ids)
        else:
            with pytest.raises(InvalidRequestError, match=r"to position \d+; .* into 256 \(engine.max_model_len\)"):
                await llm.count(messages)
    llm.engine.shutdown()


async def test_kept_answer_is_not_given_for_another_rate_where_positions_follow_from_it(checkpoint: Path) -> None:
    model = ModelConfig(path=str(checkpoint), served_name="tiny")
    encoder = EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(2**26), None))
    answers = AnswerCache(DictTier(), 2**20)
    llm = LLMServer(model, EngineConfig(), TieredCache(LocalTier(2**26), None), encoder, answers=answers)
    known = []
    for fps in (2, 1, 2):
        messages = parse_messages(body(frames_part(frames(6, 970), fps=fps), "What?")["messages"], llm.limits)
        prepared = await llm.prepare(messages, GenerationOptions(max_tokens=2), "request")
        known.append(prepared.known_answer is not None)
        async for _ in llm.generate(prepared):
            pass
    assert known == [False, "qwen2_vl" in str(checkpoint), True]
    llm.engine.shutdown()


async def test_family_without_clips_refuses_them_by_name(tmp_path: Path) -> None:
    services = Services(write_tiny_family("llava", tmp_path))
    with pytest.raises(InvalidRequestError, match="takes no clips") as raised:
        await prepare(services, frames_part(frames(2)), "What?")
    assert raised.value.param == "messages[0].content[0].video"
    services.llm.engine.shutdown()


async def test_receipt_of_a_clip_says_what_of_it_was_cached(both: Services) -> None:
    transport = httpx2.ASGITransport(create_app(both.llm))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        part = frames_part(frames(5, 800))
        plans = [(await http.post("/v1/plan", json=body(part, "What?"))).raise_for_status().json()]
        answers = [
            (await http.post(URL, json=body(part, text))).raise_for_status().json() for text in ("What?", "Why?")
        ]
        plans.append((await http.post("/v1/plan", json=body(part, "What?"))).raise_for_status().json())
    (first,), (second,) = (answer["usage"]["images"] for answer in answers)
    assert (first["frames"], first["grids"], first["cached_grids"], first["source"]) == (5, 3, 0, "encoder")
    assert (second["cached_grids"], second["source"], second["id"]) == (3, "local", first["id"])
    details = answers[0]["usage"]["prompt_tokens_details"]
    assert details["video_tokens"] == first["tokens"] == 18
    assert details["text_tokens"] == answers[0]["usage"]["prompt_tokens"] - 18
    assert [plan["images"][0]["cached_grids"] for plan in plans] == [0, 3]
    assert [plan["images"][0]["source"] for plan in plans] == ["encoder", "local"]
    assert plans[0]["video_tokens"] == 18 and plans[0]["images"][0]["grid"] == [3, 4, 6]
