"""The embedded model: its generator, its training layout against transformers' own forward, and the checkpoint."""

import math
from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from common.embedding import Grid
from deploy.shapes import CHECKPOINT
from deploy.shapes.batches import (
    IMAGE_PAD,
    MIXTURE,
    VIDEO_PAD,
    Layout,
    lay_out,
    picture_groups,
    sample_batch,
    sample_question,
    sample_sizes,
    vision_blocks,
)
from deploy.shapes.batches import sample_pictures as training_pictures
from deploy.shapes.drawing import draw, palette_on, patchify, resize
from deploy.shapes.evaluate import Answerer, as_video, sample_cases
from deploy.shapes.model import encode_equal, new_model
from deploy.shapes.questions import FORM_CATEGORIES, Question, questions_of
from deploy.shapes.scenes import (
    COLOURS,
    EXTENT,
    MAX_ASPECT_RATIO,
    MAX_SHAPES,
    MAX_SIDE,
    MIN_CONTRAST,
    MIN_RADIUS,
    MIN_SIDE,
    PATCH_SIZE,
    Form,
    Scene,
    grid_of,
    render,
    resize_scale,
    sample_clip,
    sample_scene,
    sample_size,
    sample_variation,
    scene_of,
)
from deploy.shapes.tokenizer import DEFAULT_SYSTEM
from deploy.shapes.train import forward, pixels_of

CPU = torch.device("cpu")
needs_checkpoint = pytest.mark.skipif(
    not (CHECKPOINT / "model.safetensors").exists(), reason="the embedded model is not trained yet"
)


@pytest.fixture(scope="module")
def random_model() -> Qwen2VLForConditionalGeneration:
    model = new_model(0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)  # the small initial weights would hide a wrong position or mask
    return model


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(CHECKPOINT)


# The generator


def test_scenes_keep_their_promises() -> None:
    rng = Random("scenes")
    for _ in range(300):
        width, height = sample_size(rng)
        assert min(width, height) >= MIN_SIDE and max(width, height) <= MAX_SIDE
        assert max(width, height) / min(width, height) <= MAX_ASPECT_RATIO + 0.05
        scene = sample_scene(rng, width, height)
        assert 1 <= len(scene.shapes) <= MAX_SHAPES
        for index, shape in enumerate(scene.shapes):
            extent = EXTENT * shape.radius
            assert extent <= shape.x <= width - extent and extent <= shape.y <= height - extent
            assert shape.radius * resize_scale(height, width) >= MIN_RADIUS - 1e-6
            assert math.dist(COLOURS[shape.colour], scene.background) >= MIN_CONTRAST
            for other in scene.shapes[:index]:
                assert math.hypot(shape.x - other.x, shape.y - other.y) > shape.radius + other.radius


def test_variations_differ_in_one_place() -> None:
    rng = Random("variations")
    for _ in range(200):
        scene = sample_scene(rng, *sample_size(rng))
        changed = set(scene.shapes) ^ set(sample_variation(rng, scene).shapes)
        assert 1 <= len(changed) <= 2


def test_scene_of_refuses_unknown_words() -> None:
    with pytest.raises(ValueError, match="pink"):
        scene_of(("pink circle", 0.5, 0.5, 0.2))


def test_the_answer_is_in_the_picture() -> None:
    scene = scene_of(("red circle", 0.25, 0.3, 0.2), ("blue square", 0.75, 0.7, 0.1))
    answers = {question.text: question.answer for question in questions_of([scene], "image")}
    assert answers["Describe the picture."] == "a red circle, a blue square"
    assert answers["描述这张图片。"] == "一个红色圆形，一个蓝色正方形"
    assert answers["有几个图形？"] == "两个"
    pixels = np.asarray(render(scene))
    assert tuple(pixels[67, 56]) == COLOURS["red"] and tuple(pixels[157, 168]) == COLOURS["blue"]


def test_evaluation_answers_are_balanced_and_complete() -> None:
    cases = sample_cases(seed=7, per_category=40)
    assert Counter(case.category for case in cases) == Counter(
        {
            f"{category}/{form}" if form in ("frames", "video") else category: 40
            for form, categories in FORM_CATEGORIES.items()
            for category in categories
        }
    )
    assert Counter(case.question.language for case in cases) == {"en": len(cases) // 2, "zh": len(cases) // 2}
    two_way: dict[str, Counter[int]] = {}
    for case in cases:
        question = case.question
        assert not question.candidates or question.answer in question.candidates
        if len(question.candidates) == 2:
            two_way.setdefault(question.category, Counter())[question.candidates.index(question.answer)] += 1
    for category, sides in two_way.items():
        assert min(sides.values()) > 0.25 * sides.total(), category


# Training sees what serving sees


def test_pictures_in_torch_equal_those_of_pil_and_the_processor() -> None:
    rng = Random("pictures")
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 112 * 112, "longest_edge": 224 * 224})
    for _ in range(20):
        width, height = sample_size(rng, max_side=400)
        scene = sample_scene(rng, width, height)
        scene = Scene(width, height, scene.shapes, scene.background)
        group = picture_groups(rng, "image", [(width, height)], [[scene]])[0]
        pixels = draw(group.shapes, group.backgrounds, palette_on(CPU), height, width)
        picture = render(scene)
        expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
        assert (pixels != expected).float().mean() < 1e-3
        output = processor(picture, return_tensors="pt")
        grid = grid_of(height, width)
        assert tuple(output["image_grid_thw"][0].tolist()) == grid
        resized = resize(expected, grid[1] * PATCH_SIZE, grid[2] * PATCH_SIZE)
        patches = patchify(resized[:, None].expand(-1, 2, -1, -1, -1))[0]
        assert (patches - output["pixel_values"]).abs().mean() < 0.01  # whole grey levels are 0.015 apart


@torch.no_grad()
def test_batched_vision_equals_transformers(random_model: Qwen2VLForConditionalGeneration) -> None:
    patches = torch.randn(3, 6 * 8, 3 * 2 * PATCH_SIZE**2, generator=torch.Generator().manual_seed(0))
    visual: Any = random_model.model.visual
    expected = visual(patches.flatten(0, 1), grid_thw=torch.tensor([[1, 6, 8]] * 3)).pooler_output
    actual = encode_equal(visual, patches, 6, 8).flatten(0, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("form", "layout"), MIXTURE)
@torch.no_grad()
def test_training_layout_equals_single_chats(
    random_model: Qwen2VLForConditionalGeneration, form: Form, layout: Layout
) -> None:
    """The masked blocks give the logits of transformers' own forward on each chat alone, features and positions too."""
    batch = sample_batch(Random("layout"), form, layout, max_rows=1).to(CPU)
    logits = forward(random_model, batch, torch.Generator().manual_seed(1)).logits
    generator = torch.Generator().manual_seed(1)
    row = 3
    patches, grids = [], []
    for group in batch.groups:
        frames = pixels_of(group, generator)
        frames = frames.view(len(batch.token_ids), -1, group.frames, *frames.shape[1:])[row]
        patches.append(patchify(frames.expand(-1, 2, -1, -1, -1)).flatten(0, 1))
        grids += [grid_of(group.height, group.width)] * len(frames)
    if form == "video":
        grids = [(len(grids), *grids[0][1:])]
    blocks = batch.block_ids[row]
    of_row = batch.predicting_index // batch.token_ids.shape[1] == row
    for block in range(1, int(blocks.max()) + 1) or [0]:
        kept = (blocks == 0) | (blocks == block)
        chat = batch.token_ids[row][kept][None]
        reference, positions = single_chat(random_model, chat, torch.cat(patches), grids, form)
        torch.testing.assert_close(batch.position_ids[:, row][:, kept], positions)
        places = batch.predicting_index[of_row] % batch.token_ids.shape[1]
        mine = kept[places]
        expected = reference[(kept.cumsum(0) - 1)[places[mine]]]
        torch.testing.assert_close(logits[of_row][mine], expected, rtol=1e-3, atol=1e-3)


def single_chat(
    model: Any, chat: torch.Tensor, patches: torch.Tensor, grids: list[Grid], form: Form
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own logits [tokens, vocab] and position ids [3, tokens]."""
    types = (chat == IMAGE_PAD).int() + 2 * (chat == VIDEO_PAD).int()
    kind = "video" if form == "video" else "image"
    grid_thw = {f"{kind}_grid_thw": torch.tensor(grids)}
    positions, _ = model.model.get_rope_index(chat, types, **grid_thw)
    pixels = {"pixel_values_videos" if form == "video" else "pixel_values": patches}
    output = model(input_ids=chat, mm_token_type_ids=types, **pixels, **grid_thw)
    return output.logits[0], positions[:, 0]


def test_as_video_pairs_frames_and_repeats_an_odd_last_one() -> None:
    frames = torch.randn(5, 3, 56, 84, generator=torch.Generator().manual_seed(0)) * 20 + 128
    stills = patchify(frames[:, None].expand(-1, 2, -1, -1, -1)).flatten(0, 1)
    patches, grid = as_video(stills, torch.tensor([[1, 4, 6]] * 5))
    assert grid.tolist() == [[3, 4, 6]]
    pairs = torch.cat([frames, frames[-1:]]).view(3, 2, 3, 56, 84)
    torch.testing.assert_close(patches, patchify(pairs).flatten(0, 1))


# The checkpoint


@needs_checkpoint
def test_training_tokens_are_those_of_the_chat_template() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(CHECKPOINT)
    rng = Random("chats")
    for form, layout in MIXTURE:
        sizes = sample_sizes(rng, form, layout)
        pictures = training_pictures(rng, form, sizes)
        turns = 2 if layout in ("dialogue", "new_picture") else 1
        questions = [sample_question(rng, form, pictures[:1] if form == "image" else pictures) for _ in range(turns)]
        visions = vision_blocks(form, sizes)
        chat = lay_out(layout, DEFAULT_SYSTEM, visions, questions)
        messages = conversation(form, layout, len(visions), questions)
        expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        pads = (IMAGE_PAD, VIDEO_PAD)
        collapsed = [
            token
            for token, before in zip(chat.token_ids, [-1, *chat.token_ids], strict=False)
            if not (token in pads and token == before)
        ]
        assert collapsed == expected[: len(collapsed)]
        assert tokenizer.decode(expected[len(collapsed) :]) == "\n"


def conversation(form: Form, layout: Layout, num_visions: int, questions: list[Question]) -> list[dict[str, Any]]:
    vision = {"type": "video" if form == "video" else "image"}
    messages: list[dict[str, Any]] = []
    for turn, question in enumerate(questions):
        shown = [vision] if layout == "new_picture" else [vision] * num_visions if turn == 0 else []
        text = [{"type": "text", "text": question.text}]
        messages.append({"role": "user", "content": text + shown if layout == "text_first" else shown + text})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


@needs_checkpoint
def test_tokenizer_round_trips_any_text() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = "你好 world!\n\tdef f(x): return 图像 \U0001f600 e\u0301t\u00e9<|vision_start|><|image_pad|><|vision_end|>"
    expected = text.replace("e\u0301", "\u00e9")  # NFC, as Qwen's tokenizer does
    assert tokenizer.decode(tokenizer(text).input_ids) == expected


@needs_checkpoint
def test_checkpoint_is_small_and_says_what_it_is(answerer: Answerer) -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 20e6
    assert 2e6 < sum(parameter.numel() for parameter in answerer.model.parameters()) < 8e6
    assert answerer.model.config.mrope_rule == "hf5"
    assert answerer.model.generation_config.do_sample is False


PICTURE = scene_of(("red circle", 0.25, 0.3, 0.2), ("blue square", 0.75, 0.7, 0.12), width=320, height=240)
OTHER = scene_of(("green circle", 0.75, 0.3, 0.2), ("yellow cross", 0.25, 0.7, 0.12), width=320, height=240)


@needs_checkpoint
@pytest.mark.parametrize(
    ("question", "answer", "answer_of_other"),
    [
        ("What colour is the circle?", "red", "green"),
        ("圆形是什么颜色？", "红色", "绿色"),
        ("How many squares are there?", "one", "zero"),
        ("Is the circle on the left or on the right?", "left", "right"),
        ("描述这张图片。", "一个红色圆形，一个蓝色正方形", "一个黄色十字形，一个绿色圆形"),
    ],
)
def test_checkpoint_answers_by_the_picture(
    answerer: Answerer, question: str, answer: str, answer_of_other: str
) -> None:
    for scene, expected in ((PICTURE, answer), (OTHER, answer_of_other)):
        inputs = answerer.inputs([render(scene)], "image", question)
        assert answerer.generate(inputs) == expected
        assert answerer.would_answer(inputs, expected)


@needs_checkpoint
def test_checkpoint_answers_about_several_pictures_and_clips(answerer: Answerer) -> None:
    pair = [render(PICTURE), render(OTHER)]
    assert answerer.generate(answerer.inputs(pair, "images", "Are the two images the same?")) == "no"
    assert answerer.generate(answerer.inputs([pair[0]] * 2, "images", "两张图片一样吗？")) == "一样"
    path = [scene_of(("purple diamond", x, 0.5, 0.2), width=168, height=168) for x in (0.25, 0.42, 0.58, 0.75)]
    frames = [render(scene) for scene in path]
    for form in ("frames", "video"):
        assert answerer.generate(answerer.inputs(frames, form, "Which way does it move?")) == "right"
        assert answerer.generate(answerer.inputs(frames[::-1], form, "它往哪边移动？")) == "向左"


def test_clips_show_one_thing_at_a_time() -> None:
    rng = Random("clips")
    for _ in range(100):
        clip = sample_clip(rng, 168, 168, 6)
        categories = {question.category for question in questions_of(clip, "video")}
        assert categories in ({"appeared"}, {"motion"})
