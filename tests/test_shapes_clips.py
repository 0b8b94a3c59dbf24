"""The embedded model over HTTP: questions about clips and about several pictures, answered as its model card says."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from PIL import Image

from deploy.shapes import CHECKPOINT
from deploy.shapes.evaluate import BOUNDS, Answerer, Case, file_of, sample_cases, through_file
from deploy.shapes.scenes import render, scene_of
from llm_service.api.app import create_app
from llm_service.clips import ClipDecoder
from tests.clips import FFV1, WEBM, animation, frames_part, video, video_part
from tests.services import URL, Services, body, data_url, image_part

pytestmark = pytest.mark.skipif(not (CHECKPOINT / "model.safetensors").exists(), reason="the model is not trained yet")

FORMS = ("images", "frames", "video")


@pytest.fixture
async def shapes() -> AsyncIterator[httpx2.AsyncClient]:
    services = Services(CHECKPOINT)
    transport = httpx2.ASGITransport(create_app(services.llm))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=600) as client:
        yield client
    services.llm.engine.shutdown()


def content_of(case: Case) -> list[Any]:
    """As a client sends it: pictures one by one, or as the frames of a clip."""
    files = [file_of(scene) for scene in case.pictures]
    shown: list[Any] = [image_part(file) for file in files]
    if case.form == "video":
        shown = [{"type": "video", "video": list(map(data_url, files))}]
    return [case.question.text, *shown] if case.text_first else [*shown, case.question.text]


async def answer(http: httpx2.AsyncClient, *content: Any) -> str:
    response = await http.post(URL, json=body(*content, max_tokens=64))
    text: str = response.raise_for_status().json()["choices"][0]["message"]["content"]
    return text


async def check_accuracy(http: httpx2.AsyncClient, per_category: int) -> None:
    """That of the model card, and on each case the one-piece model's own verdict."""
    cases = [case for case in sample_cases(seed=3, per_category=per_category) if case.form in FORMS]
    at_once = asyncio.Semaphore(16)

    async def ask(case: Case) -> str:
        async with at_once:
            return await answer(http, *content_of(case))

    answers = await asyncio.gather(*map(ask, cases))
    verdicts = [given == case.question.answer for given, case in zip(answers, cases, strict=True)]
    answerer = Answerer(CHECKPOINT)
    for case, is_right in zip(cases, verdicts, strict=True):
        inputs = answerer.inputs(list(map(through_file, case.pictures)), case.form, case.question.text, case.text_first)
        assert answerer.would_answer(inputs, case.question.answer) == is_right, case.question
    shares: dict[str, list[bool]] = defaultdict(list)
    for case, is_right in zip(cases, verdicts, strict=True):
        shares[case.category].append(is_right)
    accuracy = {category: sum(right) / len(right) for category, right in shares.items()}
    print(len(cases), accuracy)
    assert len(accuracy) == 7 and sum(verdicts) / len(verdicts) >= BOUNDS["overall"]
    assert min(accuracy.values()) >= BOUNDS["category"] - 0.5 / per_category


async def test_answers_about_clips_and_several_pictures_are_as_right_as_the_model_card_says(
    shapes: httpx2.AsyncClient,
) -> None:
    await check_accuracy(shapes, 10)


@pytest.mark.soak
async def test_the_same_for_200_questions_of_each_category(shapes: httpx2.AsyncClient) -> None:
    await check_accuracy(shapes, 200)


def path(*places: tuple[float, float]) -> list[Image.Image]:
    return [render(scene_of(("purple diamond", x, y, 0.2), width=168, height=168)) for x, y in places]


TO_THE_RIGHT = path((0.25, 0.5), (0.42, 0.5), (0.58, 0.5), (0.75, 0.5))
DOWNWARDS = path((0.5, 0.25), (0.5, 0.42), (0.5, 0.58), (0.5, 0.75))


@pytest.mark.parametrize(
    ("shown", "english", "chinese"),
    [(TO_THE_RIGHT, "right", "向右"), (TO_THE_RIGHT[::-1], "left", "向左"), (DOWNWARDS, "down", "向下")],
    ids=["right", "left", "down"],
)
async def test_direction_is_right_whatever_the_clip_is_sent_as(
    shapes: httpx2.AsyncClient, shown: list[Image.Image], english: str, chinese: str
) -> None:
    parts = [
        frames_part(shown),
        video_part(video(shown, fps=2, **FFV1)),
        video_part(video(shown, fps=2, **WEBM), "video/webm"),
        video_part(video(shown, format="mp4", codec="libx264", pixel_format="yuv420p", fps=2)),
        video_part(animation(shown, "GIF", duration_ms=500), "image/gif"),
        video_part(animation(shown, "WEBP", duration_ms=500, lossless=True), "image/webp"),
    ]
    assert {await answer(shapes, part, "Which way does it move?") for part in parts} == {english}
    assert await answer(shapes, parts[-1], "它往哪边移动？") == chinese


async def test_decisions_about_a_clip_decode_it_once(
    shapes: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = ClipDecoder.__call__
    monkeypatch.setattr(ClipDecoder, "__call__", lambda *asked: decoded.append(1) or decode(*asked))
    choices = [{"value": value} for value in ("left", "right", "up", "down")]
    question = {"type": "choice", "instructions": "Which way does it move?", "choices": choices, "name": "way"}
    message = {"type": "message", "role": "user", "content": [video_part(video(TO_THE_RIGHT, fps=2, **FFV1))]}
    body = {"model": "tiny", "input": [message], "questions": [question, question | {"name": "again"}]}
    found = (await shapes.post("/v1/decisions", json=body)).raise_for_status().json()
    assert [one["choice"] for one in found["answers"]] == ["right", "right"]
    assert len(decoded) == 1
