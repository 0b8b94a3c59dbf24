"""POST /v1/decisions: OpenAI's decisions, with images: up to 400 questions about one input, answered in probabilities.

The probability of an answer is that of the model saying exactly this text and nothing after it, among the answers that
are allowed. A predicate's are yes and no. Descriptions of choices and levels are told to the model; the values
themselves are not, so instructions should say what may be answered.
"""

import math
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from common.config import ImageLimits
from common.errors import InvalidRequestError
from llm_service.api.door import context_of, parse
from llm_service.api.fields import CLIENT_FIELDS, ApiRequest, name_ignored
from llm_service.api.generation import image_receipts
from llm_service.api.items import parse_input, parse_part
from llm_service.chat import VisualPart, checked, parse_content
from llm_service.scoring import Question, score
from llm_service.server import LLMServer

_MAX_ANSWERS = 4096  # of all questions together; each is a fork of its prompt
_YES = ("yes", "Yes")
_NO = ("no", "No")

Instructions = str | list[dict[str, Any]]
Text = Annotated[str, Field(min_length=1, max_length=1024)]


class Predicate(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["predicate"]
    instructions: Instructions
    name: str | None = None

    def answers(self) -> list[str]:
        return [*_YES, *_NO]

    def descriptions(self) -> list[str]:
        return []

    def answer(self, likelihoods: Sequence[float]) -> dict[str, Any]:
        return {"type": "predicate", "probability": sum(likelihoods[: len(_YES)])}


class Choice(BaseModel):
    """`confidence` is 0 where all choices are equally likely and 1 where one is certain."""

    class Option(BaseModel):
        model_config = ConfigDict(extra="ignore")

        value: StrictBool | Annotated[StrictStr, Field(min_length=1, max_length=1024)]
        description: Text | None = None

    model_config = ConfigDict(extra="ignore")

    type: Literal["choice"]
    instructions: Instructions
    choices: Annotated[list[Option], Field(min_length=2, max_length=255)]
    name: str | None = None

    def answers(self) -> list[str]:
        return [_text(option.value) for option in self.choices]

    def descriptions(self) -> list[str]:
        return [f"{_text(option.value)}: {option.description}" for option in self.choices if option.description]

    def answer(self, likelihoods: Sequence[float]) -> dict[str, Any]:
        best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        chance = 1 / len(likelihoods)
        return {
            "type": "choice",
            "choice": self.choices[best].value,
            "confidence": max(0.0, (likelihoods[best] - chance) / (1 - chance)),
            "probabilities": [
                {"value": option.value, "probability": likelihood}
                for option, likelihood in zip(self.choices, likelihoods, strict=True)
            ],
        }


class Score(BaseModel):
    """Levels count from 0; `score` is their mean. `confidence` is 1 where one level is certain."""

    class Level(BaseModel):
        model_config = ConfigDict(extra="ignore")

        label: Text
        description: Text | None = None

    model_config = ConfigDict(extra="ignore")

    type: Literal["score"]
    instructions: Instructions
    levels: Annotated[list[Level], Field(min_length=2, max_length=255)]
    name: str | None = None

    def answers(self) -> list[str]:
        return [level.label for level in self.levels]

    def descriptions(self) -> list[str]:
        return [f"{level.label}: {level.description}" for level in self.levels if level.description]

    def answer(self, likelihoods: Sequence[float]) -> dict[str, Any]:
        levels = range(len(likelihoods))
        best = max(levels, key=likelihoods.__getitem__)
        distance = sum(likelihood * abs(level - best) for level, likelihood in enumerate(likelihoods))
        chance = sum(abs(level - (len(levels) - 1) / 2) for level in levels) / len(levels)
        return {
            "type": "score",
            "score": sum(level * likelihood for level, likelihood in enumerate(likelihoods)),
            "confidence": max(0.0, 1 - distance / chance),
            "probabilities": [
                {"label": level.label, "probability": likelihood, "value": value}
                for value, (level, likelihood) in enumerate(zip(self.levels, likelihoods, strict=True))
            ],
        }


AnyQuestion = Annotated[Predicate | Choice | Score, Field(discriminator="type")]


class DecisionRequest(ApiRequest):
    """The fields that are honoured. Others are harmless, or ignored and named in a header."""

    model: str
    input: str | list[dict[str, Any]]
    questions: Annotated[list[AnyQuestion], Field(min_length=1, max_length=400)]

    harmless: ClassVar[frozenset[str]] = CLIENT_FIELDS

    def asked(self, limits: ImageLimits) -> list[Question]:
        """Raises InvalidRequestError with the path of the first field that is wrong."""
        num_answers = sum(len(question.answers()) for question in self.questions)
        if num_answers > _MAX_ANSWERS:
            raise InvalidRequestError(
                f"the questions have {num_answers} answers together, the limit is {_MAX_ANSWERS}", param="questions"
            )
        return [_asked(question, f"questions[{index}]", limits) for index, question in enumerate(self.questions)]


def create_router(server: LLMServer) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/decisions")
    async def decisions(body: DecisionRequest, http: Request, response: Response) -> dict[str, Any]:
        name_ignored(response, body.check())
        server.check_model(body.model)
        messages = checked(await parse(http, parse_input, body.input, server.limits), server.limits, "input")
        questions = await parse(http, body.asked, server.limits)
        request_id = f"dec_{uuid.uuid4().hex}"
        scores = await score(server, messages, questions, request_id, context_of(http))
        answers = [
            question.answer(normalized(logprobs)) | {"name": question.name}
            for question, logprobs in zip(body.questions, scores.logprobs, strict=True)
        ]
        return {
            "id": request_id,
            "object": "decision",
            "model": body.model,
            "answers": answers,
            "usage": {
                "input_tokens": scores.num_prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": scores.num_cached_tokens,
                    "cache_write_tokens": scores.num_prompt_tokens - scores.num_cached_tokens,
                },
                "output_tokens": scores.num_answer_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": scores.num_prompt_tokens + scores.num_answer_tokens,
                "images": image_receipts(scores.receipts),
            },
        }

    return router


def normalized(logprobs: Sequence[float]) -> list[float]:
    """Probabilities among these alone."""
    best = max(logprobs)
    weights = [math.exp(logprob - best) for logprob in logprobs]
    return [weight / sum(weights) for weight in weights]


def _asked(question: Predicate | Choice | Score, field: str, limits: ImageLimits) -> Question:
    answers = tuple(question.answers())
    if isinstance(question, Choice) and len({(type(option.value), option.value) for option in question.choices}) < len(
        answers
    ):
        raise InvalidRequestError("two choices are the same", param=f"{field}.choices")
    if isinstance(question, Score) and len(set(answers)) < len(answers):
        raise InvalidRequestError("two levels are the same", param=f"{field}.levels")
    content: list[str | VisualPart] = parse_content(
        question.instructions, f"{field}.instructions", lambda part, where: parse_part(part, where, limits)
    )
    if not content:
        raise InvalidRequestError("instructions must not be empty", param=f"{field}.instructions")
    return Question([*content, *("\n" + line for line in question.descriptions())], answers)


def _text(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()
