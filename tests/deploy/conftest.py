"""A service on a socket, without Ray, for the commands that talk to one."""

import contextlib
import hashlib
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
from llm_service.config import ApiConfig, ApiKey, EngineConfig
from llm_service.server import LLMServer
from tests.conftest import serving


@contextlib.contextmanager
def service(checkpoint: Path, api: ApiConfig | None = None) -> Iterator[str]:
    model = ModelConfig(path=str(checkpoint), served_name="tiny")
    encoder = EncoderServer(model, EncoderConfig(), TieredCache(LocalTier(MIB), None))
    store = MediaStore(LocalStorage(MIB), ttl_s=60, max_pinned_bytes=MIB)
    cache = TieredCache(LocalTier(64 * MIB), None)
    server = LLMServer(model, EngineConfig(), cache, encoder, media_store=store, api=api)
    with serving(create_app(server, admin_api=True)) as url:
        yield url
    server.engine.shutdown()


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path) -> Iterator[str]:
    with service(tiny_checkpoint) as found:
        yield found


@pytest.fixture(scope="module")
def url_with_keys(tiny_checkpoint: Path) -> Iterator[str]:
    """The key is `secret`, an administrator's."""
    key = ApiKey(name="ann", sha256=hashlib.sha256(b"secret").hexdigest(), admin=True)
    with service(tiny_checkpoint, ApiConfig(keys=(key,))) as found:
        yield found
