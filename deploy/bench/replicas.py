"""`fovea bench replicas`: images per second of one, two and four encoder replicas, as a share of linear.

The encoder service alone, on Serve, as an LLM replica calls it: the handle with its consistent hash, whole images in,
packed embeddings out. Pictures come from memory; a few bytes behind the end of each make it one that no cache knows.
Clients are processes of their own, so that they do not wait for each other.
"""

import asyncio
import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from transformers import Qwen2VLConfig

from common.config import CacheConfig, ModelConfig
from common.media import MediaItem, MediaParams
from deploy.app import EMBEDDED_MODEL, resolve_model
from deploy.bench import report
from deploy.bench.engine import QWEN2_VL_2B
from deploy.bench.workloads import picture
from deploy.private_redis import with_private_servers
from deploy.service import ray_cluster
from encoder_service.config import EncoderConfig
from encoder_service.deployment import EncoderDeployment
from llm_service.deployment import EncoderHandle

APPLICATION = "fovea-bench"
_NUM_PICTURES = 16
_WARM_UP_S = 3.0


@dataclass(frozen=True, slots=True)
class Settings:
    """`gpus` and `cpus` are those of one replica; there is one client for each replica, with `in_flight` images."""

    counts: Sequence[int]
    gpus: float
    cpus: float
    width: int
    height: int
    seconds: float
    in_flight: int
    preprocess_threads: int


def run(model: Path | None, settings: Settings, output: Path) -> None:
    """Without a `model`: the 2B shape with random weights on GPUs, the embedded one on CPUs."""
    rows: list[dict[str, Any]] = []
    with ray_cluster(print), _model(model, settings) as config:
        serve.start(proxy_location="Disabled")  # nobody asks over HTTP
        for count in settings.counts:
            rate = _rate(config, settings, count)
            first = rows[0] if rows else {"replicas": count, "images/s": rate}
            linear = first["images/s"] / first["replicas"] * count
            rows.append({"replicas": count, "images/s": rate, "share of linear": rate / linear})
            print(f"{count} replicas: {rate:.1f} images/s")
        devices = torch.cuda.get_device_name() if settings.gpus else "none"
    report.show(f"{settings.width} x {settings.height} JPEG, {settings.gpus:g} GPUs a replica", rows)
    report.write(output, {"circumstances": report.circumstances(gpu=devices), "model": config.path, "rows": rows})


@contextlib.contextmanager
def _model(model: Path | None, settings: Settings) -> Iterator[ModelConfig]:
    if model is None and settings.gpus:
        with tempfile.TemporaryDirectory() as directory:
            Qwen2VLConfig(**QWEN2_VL_2B).save_pretrained(directory)
            yield ModelConfig(path=directory, load_format="dummy", max_pixels=16384 * 28 * 28)
    else:
        yield resolve_model(ModelConfig(path=EMBEDDED_MODEL if model is None else str(model)))


def _rate(model: ModelConfig, settings: Settings, count: int) -> float:
    """Images per second of `count` replicas, all of them busy."""
    encoder = EncoderConfig(
        max_queued_images=2 * count * settings.in_flight, preprocess_threads=settings.preprocess_threads
    )
    deployment: Any = EncoderDeployment  # both are what decorators made of them
    client: Any = _Client
    application = deployment.options(
        num_replicas=count,
        max_ongoing_requests=2 * count * settings.in_flight,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    ).bind(model, encoder, with_private_servers(CacheConfig()))
    serve.run(application, name=APPLICATION, route_prefix=None)
    try:
        clients = [client.remote(number, model, settings) for number in range(count)]
        ray.get([one.greet.remote() for one in clients])
        return float(sum(ray.get([one.rate.remote(settings.seconds) for one in clients])))
    finally:
        serve.delete(APPLICATION)


@ray.remote(num_cpus=0)
class _Client:
    """Keeps a number of images on their way."""

    def __init__(self, number: int, model: ModelConfig, settings: Settings) -> None:
        random = np.random.default_rng(number)
        self._pictures = [picture(random, settings.width, settings.height) for _ in range(_NUM_PICTURES)]
        self._name = f" {number} {time.time()} "
        self._numbers = itertools.count()
        self._in_flight = settings.in_flight
        self._params = MediaParams(min_pixels=1, max_pixels=model.max_pixels or settings.width * settings.height)
        self._encoder = EncoderHandle(serve.get_deployment_handle("encoder", APPLICATION), wait_s=0)

    async def greet(self) -> None:
        """A first image, so that the handle knows the replicas."""
        await self._encode()

    async def rate(self, seconds: float) -> float:
        """Images answered per second, not counting those of the time in which the replicas become busy."""
        begin = time.perf_counter() + _WARM_UP_S
        end = begin + seconds
        answered: list[float] = []
        async with asyncio.TaskGroup() as group:
            for _ in range(self._in_flight):
                group.create_task(self._encode_until(end, answered))
        return sum(begin <= at < end for at in answered) / seconds

    async def _encode_until(self, end: float, answered: list[float]) -> None:
        while time.perf_counter() < end:
            await self._encode()
            answered.append(time.perf_counter())

    async def _encode(self) -> None:
        number = next(self._numbers)
        data = self._pictures[number % _NUM_PICTURES] + f"{self._name}{number}".encode()
        await self._encoder.encode(MediaItem.of(data, self._params))
