"""The one-piece model behind the same API gives the answers of the split service, one at a time and without a cache."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config import CacheConfig, ModelConfig
from deploy.client import Client, ClientError
from deploy.one_piece import one_piece_server
from deploy.service import application_config, application_of
from llm_service.api.app import create_app
from llm_service.chat import ChatMessage
from llm_service.config import EngineConfig
from llm_service.server import GenerationOptions, LLMServer
from tests.clips import animation, frames
from tests.conftest import picture, serving
from tests.services import Services


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path) -> Iterator[LLMServer]:
    model = ModelConfig(path=str(tiny_checkpoint), served_name="tiny")
    server = one_piece_server(model, EngineConfig(), CacheConfig())
    yield server
    server.engine.shutdown()


@pytest.fixture(scope="module")
def split(tiny_checkpoint: Path) -> Iterator[LLMServer]:
    services = Services(tiny_checkpoint)
    yield services.llm
    services.llm.engine.shutdown()


@pytest.fixture(scope="module")
def clients(whole: LLMServer, split: LLMServer) -> Iterator[tuple[Client, Client]]:
    with (
        serving(create_app(whole)) as one,
        serving(create_app(split)) as other,
        Client(one) as asks_whole,
        Client(other) as asks_split,
    ):
        yield asks_whole, asks_split


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_answers_and_fingerprint_are_those_of_the_split_service(
    clients: tuple[Client, Client], num_images: int
) -> None:
    images = [picture(70, 84 + 28 * index, 60 + index) for index in range(num_images)]
    one, other = (client.ask(images, "Describe.", max_tokens=12, temperature=0) for client in clients)
    assert (one.text, one.num_tokens, one.finish_reason) == (other.text, other.num_tokens, other.finish_reason)
    assert one.fingerprint == other.fingerprint


def test_clips_are_refused(clients: tuple[Client, Client], tmp_path: Path) -> None:
    path = tmp_path / "clip.gif"
    path.write_bytes(animation(frames(2), "GIF"))
    with pytest.raises(ClientError, match="takes no clips"):
        clients[0].ask([], "What?", videos=[path])
    assert clients[1].ask([], "What?", videos=[path], max_tokens=2).images[0]["frames"] == 1


def test_budget_of_a_clips_frames_is_refused(tiny_checkpoint: Path) -> None:
    model = ModelConfig(path=str(tiny_checkpoint), max_frame_pixels=28 * 28)
    with pytest.raises(ValueError, match=r"max_frame_pixels has no effect.*takes no clips"):
        one_piece_server(model, EngineConfig(), CacheConfig())


def test_every_picture_is_encoded_every_time(clients: tuple[Client, Client]) -> None:
    answers = [clients[0].ask([picture(70, 84, 70)], "What?", max_tokens=2) for _ in range(2)]
    assert [answer.images[0]["source"] for answer in answers] == ["encoder", "encoder"]


def test_drawn_tokens_follow_the_seed(clients: tuple[Client, Client]) -> None:
    def draw(client: Client, seed: int) -> str:
        body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Tell."}], "max_tokens": 12}
        body |= {"temperature": 1.5, "seed": seed, "presence_penalty": 0.5}
        answer = client._http.post("/v1/chat/completions", json=body)
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text

    one, other = clients
    assert draw(one, 1) == draw(one, 1) == draw(other, 1)
    assert len({draw(one, seed) for seed in range(4)}) > 1


async def test_request_whose_caller_leaves_makes_room_for_the_next(whole: LLMServer) -> None:
    options = GenerationOptions(max_tokens=3000, ignore_eos=True)
    prepared = await whole.prepare([ChatMessage("user", ["Tell me everything."])], options, "leaving")
    outputs = whole.generate(prepared)
    await anext(outputs)
    assert whole.engine.num_running == 1
    await outputs.aclose()
    async with asyncio.timeout(5):
        while whole.engine.num_running:  # noqa: ASYNC110  # a gauge, without an event
            await asyncio.sleep(0.01)
    assert whole.engine.num_waiting == 0


def test_configuration_of_the_backend_has_one_deployment() -> None:
    application = application_of(application_config(backend="transformers"))
    assert [deployment["name"] for deployment in application["deployments"]] == ["llm"]
    assert application["args"]["backend"] == "transformers"
