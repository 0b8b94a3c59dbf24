"""A service on a socket, without Ray, for the commands that talk to one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from common.cache import LocalTier, TieredCache
from common.config import MIB, ModelConfig
from common.media_storage import LocalStorage
from common.media_store import MediaStore
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.api.app import create_app
from llm_service.config import EngineConfig
from llm_service.server import LLMServer
from tests.conftest import serving


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path) -> Iterator[str]:
    model = ModelConfig(path=str(tiny_checkpoint), served_name="tiny")
    encoder = EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(MIB), None))
    store = MediaStore(LocalStorage(MIB), ttl_s=60, max_pinned_bytes=MIB)
    server = LLMServer(model, EngineConfig(), TieredCache(LocalTier(64 * MIB), None), encoder, media_store=store)
    with serving(create_app(server, admin_api=True)) as url:
        yield url
    server.engine.shutdown()
