"""/v1/decisions: many questions about one input from one encode, answered as each would be alone."""

import io
import math
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deploy.demo import PICTURES
from deploy.shapes import CHECKPOINT
from deploy.shapes.scenes import render
from llm_service.config import ApiConfig, FetchConfig
from llm_service.fetch import ImageFetcher
from llm_service.server import GenerationOptions
from tests.api.conftest import Service
from tests.conftest import picture, serving
from tests.services import data_url

URL = "/v1/decisions"
CHOICE = {"type": "choice", "instructions": "What colour?", "choices": [{"value": "red"}, {"value": "dark blue"}]}
PREDICATE = {"type": "predicate", "instructions": "Is there a circle?", "name": "circle"}
SCORE = {
    "type": "score",
    "instructions": "How many?",
    "levels": [{"label": "none"}, {"label": "one"}, {"label": "two"}],
}


def request_of(*questions: dict[str, Any], image: bytes | None = None, **fields: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "input_text", "text": "Look."}]
    if image is not None:
        content.append({"type": "input_image", "image_url": data_url(image)})
    return {"model": "tiny", "input": [{"role": "user", "content": content}], "questions": list(questions)} | fields


async def test_answers_have_the_form_of_the_official_client(sdk: openai.AsyncOpenAI) -> None:
    decision = await sdk.decisions.create(**request_of(CHOICE, PREDICATE, SCORE, image=picture()))
    choice, predicate, score = decision.answers
    assert (choice.type, choice.choice in ("red", "dark blue")) == ("choice", True)
    assert math.isclose(sum(one.probability for one in choice.probabilities), 1)
    assert (predicate.name, 0 <= predicate.probability <= 1) == ("circle", True)
    assert [one.value for one in score.probabilities] == [0, 1, 2]
    assert math.isclose(score.score, sum(one.value * one.probability for one in score.probabilities))
    assert decision.usage.total_tokens == decision.usage.input_tokens + decision.usage.output_tokens


async def test_probabilities_are_those_of_each_question_alone(serve: Callable[..., Service]) -> None:
    questions = [
        {"type": "choice", "instructions": f"Which {word}?", "choices": [{"value": value} for value in values]}
        for word, values in (
            ("colour", ["red", "blue", "green"]),
            ("shape", ["a circle", "a square"]),
            ("side", ["a", "b"]),
        )
    ] + [PREDICATE, SCORE]
    image = picture(112, 112)
    together = (await serve().http.post(URL, json=request_of(*questions, image=image))).json()["answers"]
    for question, answer in zip(questions, together, strict=True):
        alone = (await serve().http.post(URL, json=request_of(question, image=image))).json()["answers"][0]
        assert flat(answer) == pytest.approx(flat(alone), abs=1e-5)


def flat(answer: dict[str, Any]) -> list[float]:
    return (
        [answer["probability"]] if "probability" in answer else [one["probability"] for one in answer["probabilities"]]
    )


async def test_probability_of_an_answer_is_that_of_its_tokens(serve: Callable[..., Service]) -> None:
    """Said greedily by chat completions under a grammar, with log probabilities."""
    service = serve()
    answer = (await service.http.post(URL, json=request_of(CHOICE))).json()["answers"][0]
    totals = []
    for value in ("red", "dark blue"):
        messages = [{"role": "user", "content": "Look.\n\nWhat colour?"}]
        prompt = (await service.http.post("/tokenize", json={"messages": messages})).json()["tokens"]
        tokens = [*service.llm.prompt.tokenize_as_text(value), service.llm.prompt.end_token_id]
        total = 0.0
        for index, token in enumerate(tokens):
            total += await logprob_of(service, prompt + tokens[:index], token)
        totals.append(total)
    weights = [math.exp(total) for total in totals]
    assert flat(answer) == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-5)


async def logprob_of(service: Service, prompt: list[int], token: int) -> float:
    options = GenerationOptions(logprobs=0, logit_bias=((token, 100.0),), max_tokens=1)
    prepared = await service.llm.prepare_text(prompt, options, "alone")
    [output] = [output async for output in service.llm.generate(prepared)]
    assert output.token_ids == [token]
    return output.logprobs[0].logprob


async def test_fifty_questions_take_one_encode_and_share_the_input(serve: Callable[..., Service]) -> None:
    service = serve()
    questions = [CHOICE | {"instructions": f"Question {index}: what colour?"} for index in range(50)]
    content = "Look at this picture carefully. " * 12
    request = request_of(*questions, image=picture(200, 200))
    request["input"][0]["content"].insert(0, {"type": "input_text", "text": content})
    usage = (await service.http.post(URL, json=request)).json()["usage"]
    assert service.encoder.num_encoded == 1
    per_question = usage["input_tokens"] / 50
    assert usage["input_tokens_details"]["cached_tokens"] > 49 * (per_question - 128)
    assert [image["source"] for image in usage["images"]] == ["encoder"]
    manager = service.llm.engine._engine.kv_cache_manager  # type: ignore[attr-defined]
    manager.check_integrity()
    assert not any(held.amount for held in service.llm.admission.held.values())


async def test_images_behind_urls_are_fetched_once_for_all_questions(serve: Callable[..., Service]) -> None:
    service = serve(ApiConfig(fetch=FetchConfig(allowed_hosts=("example.org",))))
    fetched: list[str] = []

    async def web(scope: Scope, receive: Receive, send: Send) -> None:
        fetched.append(scope["path"])
        await Response(picture())(scope, receive, send)

    def request_with(image_url: str) -> dict[str, Any]:
        parts = [{"type": "input_image", "image_url": image_url}] * 2
        return request_of(CHOICE, PREDICATE, SCORE, input=[{"role": "user", "content": parts}])

    with serving(web) as address:
        service.llm.media._fetcher = ImageFetcher(service.llm.api.fetch, 2**20, public, calling(address))
        named = await service.http.post(URL, json=request_with("https://example.org/a.png"))
    sent = await service.http.post(URL, json=request_with(data_url(picture())))
    assert named.json()["answers"] == sent.json()["answers"]
    assert fetched == ["/a.png"] * 2


async def public(host: str, port: int) -> list[str]:
    return ["93.184.215.14"]


def calling(address: str) -> httpx2.MockTransport:
    """Calls one address of this machine, whichever it is told to call."""

    async def call(request: httpx2.Request) -> httpx2.Response:
        async with httpx2.AsyncClient(base_url=address) as client:
            return await client.get(request.url.path)

    return httpx2.MockTransport(call)


async def test_answers_about_a_drawn_picture_are_right() -> None:
    """On the embedded model, which really sees."""
    scene = PICTURES["two-shapes.png"]
    image = png(render(scene))
    service = Service(CHECKPOINT)
    colours = ["red", "blue", "green", "yellow", "black"]
    questions = [
        {
            "type": "choice",
            "instructions": f"What colour is the {kind}?",
            "choices": [{"value": colour} for colour in colours],
        }
        for kind in ("circle", "square")
    ] + [{"type": "predicate", "instructions": f"Is there a {what}?"} for what in ("red circle", "green triangle")]
    request = {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": data_url(image)}]}]}
    answer = await service.http.post(URL, json=request | {"model": "tiny", "questions": questions})
    circle, square, present, absent = answer.json()["answers"]
    await service.aclose()
    assert (circle["choice"], square["choice"]) == ("red", "blue")
    assert circle["confidence"] > 0.9 and square["confidence"] > 0.9
    assert present["probability"] > 0.9 > 0.1 > absent["probability"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [PREDICATE] * 401}, "questions"),
        ({"questions": [CHOICE | {"choices": [{"value": "a"}]}]}, "questions[0].choice.choices"),
        ({"questions": [CHOICE | {"choices": [{"value": "a"}, {"value": "a"}]}]}, "questions[0].choices"),
        ({"questions": [CHOICE | {"choices": [{"value": str(n)} for n in range(256)]}]}, "questions[0].choice.choices"),
        ({"questions": [CHOICE | {"choices": [{"value": str(n)} for n in range(255)]}] * 17}, "questions"),
        ({"questions": [SCORE | {"levels": [{"label": "a"}] * 2}]}, "questions[0].levels"),
        ({"questions": [{"type": "essay"}]}, "questions[0]"),
        ({"questions": [PREDICATE | {"instructions": []}]}, "questions[0].instructions"),
        ({"input": []}, "input"),
    ],
    ids=["none", "too many", "one choice", "twice", "choices", "answers", "levels", "type", "instructions", "input"],
)
async def test_bad_questions_are_refused_by_name(http: httpx2.AsyncClient, fields: dict[str, Any], param: str) -> None:
    answer = await http.post(URL, json=request_of(PREDICATE) | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_question_stands_alone_in_a_message_without_content(http: httpx2.AsyncClient) -> None:
    answer = await http.post(URL, json=request_of(CHOICE, input=[{"role": "user", "content": []}]))
    prompt = await http.post("/tokenize", json={"messages": [{"role": "user", "content": CHOICE["instructions"]}]})
    assert answer.json()["usage"]["input_tokens"] == prompt.json()["count"]


async def test_a_string_and_a_boolean_are_two_choices(http: httpx2.AsyncClient) -> None:
    question = CHOICE | {"choices": [{"value": "true"}, {"value": True}, {"value": False}]}
    answer = (await http.post(URL, json=request_of(question))).json()["answers"][0]
    assert [one["value"] for one in answer["probabilities"]] == ["true", True, False]


def png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
