"""The HTTP surface over the same two services as in tests/test_api.py, and an engine that says what it is told."""

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import hypothesis.strategies
import pytest

from common.cache import LocalTier, TieredCache
from common.config import ModelConfig
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.api.app import create_app
from llm_service.config import ApiConfig, EngineConfig
from llm_service.engine.request import FinishReason, Request, RequestOutput
from llm_service.server import LLMServer

T = TypeVar("T")

# Qwen2.5's template, shortened: tools in the system message, calls and results in tags
TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\n# Tools\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}"
    "{% if message.role == 'tool' %}{{ '<tool_response>\\n' }}{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}"
    "{% if item.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ item.text }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{% if message.role == 'tool' %}{{ '\\n</tool_response>' }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>\\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}"
    "{{ '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def generated(strategy: hypothesis.strategies.SearchStrategy[T], count: int) -> list[T]:
    """At most `count` examples, the same ones each time. Raises hypothesis's Unsatisfiable where there are none."""
    found: list[T] = []

    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(strategy)
    def collect(example: T) -> None:
        found.append(example)

    collect()
    return found


class ScriptedEngine:
    """Answers every request with the same tokens, a few at a time, then with the reason or the error it is given."""

    def __init__(self, token_ids: list[int], end: FinishReason | Exception | None, pause_s: float = 0.0) -> None:
        self.token_ids = token_ids
        self.end = end
        self.pause_s = pause_s
        self.requests: list[Request] = []
        self.num_running = 0
        self.num_waiting = 0

    async def generate(self, request: Request, forks: Sequence[Request] = ()) -> AsyncGenerator[RequestOutput, None]:
        assert not forks
        self.requests.append(request)
        self.num_running += 1
        try:
            for token_id in self.token_ids:
                await asyncio.sleep(self.pause_s)
                yield RequestOutput(request.request_id, [token_id])
            if isinstance(self.end, Exception):
                raise self.end
            if self.end is not None:
                yield RequestOutput(request.request_id, [], finish_reason=self.end)
        finally:
            self.num_running -= 1

    def abort(self, request_id: str) -> None: ...

    def check_health(self) -> None: ...

    def start(self) -> None: ...

    def shutdown(self) -> None: ...


class Service:
    """One LLM replica on a checkpoint, with its own configuration, and HTTP in front of it."""

    def __init__(self, checkpoint: Path, api: ApiConfig | None = None, **engine: int) -> None:
        model = ModelConfig(path=str(checkpoint), served_name="tiny")
        self.encoder = EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(2**26), None))
        cache = TieredCache(LocalTier(2**26), None)
        self.llm = LLMServer(model, EngineConfig(**engine), cache, self.encoder, api=api)
        self.app = create_app(self.llm, admin_api=True)
        self.http = httpx2.AsyncClient(transport=httpx2.ASGITransport(self.app), base_url="http://test")

    def say(self, text: str, end: FinishReason | Exception | None = FinishReason.STOP, pause_s: float = 0.0) -> Any:
        """From now on the model's answer is this text, in whatever tokens it is."""
        self.llm.engine.shutdown()
        token_ids = self.llm.prompt.tokenizer.encode(text, add_special_tokens=False)
        engine = ScriptedEngine(token_ids, end, pause_s)
        self.llm.engine = engine
        return engine

    async def aclose(self) -> None:
        await self.http.aclose()
        await self.llm.media.deletions.aclose()
        self.llm.engine.shutdown()


@pytest.fixture
async def serve(tiny_checkpoint: Path) -> AsyncIterator[Callable[..., Service]]:
    """Makes services that are closed in the end."""
    made: list[Service] = []

    def make(api: ApiConfig | None = None, checkpoint: Path = tiny_checkpoint, **engine: int) -> Service:
        made.append(Service(checkpoint, api, **engine))
        return made[-1]

    yield make
    for service in made:
        await service.aclose()


@pytest.fixture(scope="session")
def tool_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a chat template that has a place for tools."""
    directory = tmp_path_factory.mktemp("tools")
    shutil.copytree(tiny_checkpoint, directory, dirs_exist_ok=True)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TOOL_TEMPLATE}))
    return directory


def events_of(text: str) -> list[Any]:
    """The payloads of a stream of server-sent events; `[DONE]` as it is."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
