"""The encoder service without Ray: real halves of a tiny model, a real cache tier."""

import asyncio
import dataclasses
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from common.cache import TieredCache
from common.config import CacheConfig, ModelConfig
from common.embedding import unpack
from common.errors import InvalidRequestError, OverloadedError
from common.frames import pack_pixels
from common.media import MediaItem, MediaParams, item_hash
from common.media_store import open_media_store
from encoder_service.batcher import Batcher
from encoder_service.config import EncoderConfig
from encoder_service.preprocess import PreprocessedImage
from encoder_service.server import EncoderServer
from tests.conftest import picture

PARAMS = MediaParams(min_pixels=56 * 56, max_pixels=224 * 224)


def encoder(checkpoint: Path, cache: TieredCache, **config: object) -> EncoderServer:
    return EncoderServer(ModelConfig(path=str(checkpoint)), EncoderConfig(**config), cache)


async def features_of(server: EncoderServer, data: bytes) -> torch.Tensor:
    item = MediaItem.of(data, PARAMS)
    key = (await server.describe()).key(item.mm_hash, str(item.params))
    return unpack(await server.encode(item), key=key).features


async def test_features_are_those_of_the_one_piece_model(
    tiny_checkpoint: Path, one_piece: PreTrainedModel, memory_cache: TieredCache
) -> None:
    server = encoder(tiny_checkpoint, memory_cache)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": PARAMS.min_pixels, "longest_edge": PARAMS.max_pixels})
    for seed, size in enumerate([(56, 56), (84, 140), (200, 90), (300, 300)]):
        data = picture(*size, seed=seed)
        inputs = processor([Image.open(io.BytesIO(data))], return_tensors="pt")
        with torch.inference_mode():
            expected = one_piece.get_image_features(
                inputs.pixel_values, inputs.image_grid_thw, return_dict=True
            ).pooler_output[0]
        assert torch.equal(await features_of(server, data), expected)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
async def test_image_in_company_equals_image_alone(
    tiny_checkpoint: Path, memory_cache: TieredCache, numerics: str
) -> None:
    server = EncoderServer(ModelConfig(path=str(tiny_checkpoint), numerics=numerics), EncoderConfig(), memory_cache)
    images = [picture(60 + 28 * seed, 112, seed=seed) for seed in range(6)]
    alone = [await features_of(server, image + b"alone") for image in images]  # trailing bytes: other keys, same pixels
    together = await asyncio.gather(*(features_of(server, image) for image in images))
    for one, other in zip(alone, together, strict=True):
        if numerics == "exact":
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other)
    exact = encoder(tiny_checkpoint, memory_cache)
    assert (str(await exact.describe()) == str(await server.describe())) == (numerics == "exact")


async def test_identical_images_in_flight_are_encoded_once(tiny_checkpoint: Path, memory_cache: TieredCache) -> None:
    server = encoder(tiny_checkpoint, memory_cache)
    item = MediaItem.of(picture(), PARAMS)
    replies = await asyncio.gather(*(server.encode(item) for _ in range(20)))
    assert len(set(replies)) == 1
    assert server.num_encoded == 1
    assert await server.encode(item) == replies[0]
    assert server.num_encoded == 1


async def test_one_picture_at_two_budgets_is_two_embeddings(tiny_checkpoint: Path, memory_cache: TieredCache) -> None:
    server = encoder(tiny_checkpoint, memory_cache)
    data = picture(200, 200)
    large = await server.encode(MediaItem.of(data, PARAMS))
    small = await server.encode(MediaItem.of(data, MediaParams(min_pixels=56 * 56, max_pixels=112 * 112)))
    assert len(small) < len(large)
    assert server.num_encoded == 2


async def test_bad_image_fails_alone(tiny_checkpoint: Path, memory_cache: TieredCache) -> None:
    server = encoder(tiny_checkpoint, memory_cache)
    good, bad = MediaItem.of(picture(), PARAMS), MediaItem.of(picture(300, 300)[:5000], PARAMS)
    answers = await asyncio.gather(server.encode(good), server.encode(bad), return_exceptions=True)
    assert isinstance(answers[0], bytes)
    assert isinstance(answers[1], InvalidRequestError)


async def test_bytes_that_do_not_match_their_hash_are_refused(tiny_checkpoint: Path, memory_cache: TieredCache) -> None:
    server = encoder(tiny_checkpoint, memory_cache)
    with pytest.raises(InvalidRequestError, match="mm_hash"):
        await server.encode(MediaItem(picture(seed=1), MediaItem.of(picture(), PARAMS).mm_hash, PARAMS))


async def test_large_grid_of_a_clip_is_hashed_and_measured_once_and_beside_the_event_loop(
    tiny_checkpoint: Path, memory_cache: TieredCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = encoder(tiny_checkpoint, memory_cache)
    frames = [bytes([shade]) * (3 * 600 * 600) for shade in (50, 60)]
    item = MediaItem.of(pack_pixels(*frames, height=600, width=600), dataclasses.replace(PARAMS, frames=2))
    called: list[tuple[str, bool]] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            called.append((name, threading.current_thread() is threading.main_thread()))
            return function(*arguments)

        return call

    monkeypatch.setattr("encoder_service.server.item_hash", noted("hash", item_hash))
    monkeypatch.setattr(server, "_spec", noted("spec", server._spec))
    await server.encode(item)
    assert called == [("hash", False), ("spec", False)]


def blank(num_patches: int) -> PreprocessedImage:
    return PreprocessedImage(torch.zeros(num_patches, 3, 14, 14, dtype=torch.uint8), (1, 2, num_patches // 2))


async def test_images_that_nobody_waits_for_are_skipped() -> None:
    encoded: list[int] = []
    gate = asyncio.Event()

    def encode(images: list[PreprocessedImage]) -> list[None]:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
        encoded.extend(image.num_patches for image in images)
        return [None] * len(images)

    loop = asyncio.get_running_loop()
    batcher = Batcher(encode, EncoderConfig(max_batch_patches=10))
    first = asyncio.create_task(batcher.submit(blank(4)))
    await asyncio.sleep(0.01)  # the first batch is on the device
    waiting = [asyncio.create_task(batcher.submit(blank(size))) for size in (6, 8, 20)]
    await asyncio.sleep(0.01)
    waiting[1].cancel()
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, waiting[0], waiting[2])
    assert encoded == [4, 6, 20]


async def test_batch_that_went_wrong_leaves_room_for_the_next_one() -> None:
    batcher = Batcher(lambda images: images[1:], EncoderConfig(max_batch_patches=10))  # type: ignore[return-value, arg-type]
    for _ in range(2):
        lost = asyncio.create_task(batcher.submit(blank(4)))
        await asyncio.wait_for(batcher.idle(), 5)
        with pytest.raises(ValueError, match="shorter"):
            await asyncio.wait_for(lost, 5)


async def test_next_batch_is_launched_while_one_runs_and_no_third_one() -> None:
    running: list[int] = []
    most, gate = 0, threading.Event()

    def encode(images: list[PreprocessedImage]) -> list[int]:
        nonlocal most
        running.append(len(images))
        most = max(most, len(running))
        gate.wait(5)
        running.pop()
        return [image.num_patches for image in images]

    batcher = Batcher(encode, EncoderConfig(max_batch_patches=10), num_at_once=2)
    for _ in range(2):  # it comes to rest between
        tasks = [asyncio.create_task(batcher.submit(blank(size))) for size in (10, 8, 6, 4, 2)]
        await asyncio.sleep(0.05)
        assert running == [1, 1]
        gate.set()
        assert await asyncio.gather(*tasks) == [10, 8, 6, 4, 2]
        await asyncio.wait_for(batcher.idle(), 5)
        gate.clear()
    assert most == 2


@pytest.mark.parametrize("with_alias", [False, True])
async def test_full_replica_refuses_before_it_decodes_and_has_room_when_callers_leave(
    tiny_checkpoint: Path, memory_cache: TieredCache, with_alias: bool
) -> None:
    store = open_media_store(CacheConfig()) if with_alias else None
    model, config = ModelConfig(path=str(tiny_checkpoint)), EncoderConfig(max_queued_images=3)
    server = EncoderServer(model, config, memory_cache, alias_store=store)
    known = MediaItem.of(picture(seed=9), PARAMS)
    await server.encode(known)
    items = [MediaItem.of(picture(300, 300, seed), PARAMS) for seed in range(4)]
    held = [asyncio.create_task(server.encode(item)) for item in items[:3]]
    for _ in range(10):  # as far as the decoding threads
        await asyncio.sleep(0)
    assert (server.stats()["backlog_images"], server.stats()["backlog_seconds"] > 0) == (3, True)
    with pytest.raises(OverloadedError, match=r"3 images wait.*limit is 3 \(encoder.max_queued_images\)") as caught:
        await server.encode(items[3])
    assert caught.value.retry_after_s is not None
    assert await server.encode(known)  # what is cached needs no room
    for leaving in held:
        leaving.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    await server.encode(items[3])
    assert (server.num_encoded, server.stats()["backlog_images"], server.stats()["backlog_seconds"]) == (2, 0, 0)


async def test_encoder_may_be_on_another_device_than_the_decoder(
    tiny_checkpoint: Path, memory_cache: TieredCache
) -> None:
    model = ModelConfig(path=str(tiny_checkpoint), device="cuda")
    server = EncoderServer(model, EncoderConfig(device="cpu"), memory_cache)
    assert (await server.describe()).device.startswith("cpu/")


def test_loading_one_half_costs_one_half(tmp_path: Path) -> None:
    """A generated checkpoint of 400 MiB: the peak grows by at most 1.15 times the half that is loaded."""
    script = Path(__file__).parent / "load_half_memory.py"
    for half in ("vision", "language"):
        run = subprocess.run(
            [sys.executable, str(script), str(tmp_path), half],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        half_mib, grown_mib, whole_mib = (float(word) for word in run.stdout.split())
        print(f"{half}: {half_mib:.0f} MiB of {whole_mib:.0f} MiB, peak grew by {grown_mib:.0f} MiB")
        assert whole_mib > 400
        assert grown_mib <= 1.15 * half_mib
