"""Answers of greedy requests, kept by everything that they depend on. Off by default; whatever goes wrong is a miss.

In `exact` numerics a greedy answer depends on the request and on what the system fingerprint names, and on nothing
else, so that a repeated request can have the tokens of the first one.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import blake3
import msgpack

from common import metrics
from common.cache import RemoteTier
from common.config import CacheConfig
from common.identity import framed_digest
from common.redis_store import RedisTier
from llm_service.engine.request import FinishReason, SamplingParams

logger = logging.getLogger(__name__)

SLOT_BYTES = 16 * 1024  # the longest answer that is kept, packed

_ALL = "answer:all"
_DIGEST_BYTES = 32
_SECRET_BYTES = 32
_REASONS = (FinishReason.STOP.value, FinishReason.LENGTH.value)


@dataclass(frozen=True, slots=True)
class Answer:
    """`finish_reason` is the engine's, or `stop` when a stop string ended the text inside `token_ids`."""

    token_ids: list[int]
    finish_reason: FinishReason


class AnswerCache:
    """At most `max_bytes` of answers in a store that replicas share, without any of them counting bytes.

    The cache is direct-mapped: a key has one slot of a fixed number, and a newer answer takes the place of an older.
    With a `secret`, nobody without it can write an answer that is believed.

    Every image has a random secret of its own in the store, and all answers together have one. They are part of the
    keys of answers, which are encrypted under their keys: once one is gone, nobody finds or reads its answers any more,
    be they written before or a moment later by a replica that has not heard of it yet.
    """

    def __init__(self, store: RemoteTier, max_bytes: int, secret: str | None = None) -> None:
        self._store = store
        self._num_slots = max(1, max_bytes // SLOT_BYTES)
        self._mac_key = blake3.blake3((secret or "").encode()).digest()

    async def secrets(self, mm_hashes: Sequence[str]) -> list[str]:
        """For `answer_key()`: that of all answers and those of images, as kept, or new ones where none is kept."""
        slots = [_ALL, *map(self._image_slot, mm_hashes)]
        unique = list(dict.fromkeys(slots))
        secret_of = dict(zip(unique, await asyncio.gather(*map(self._secret, unique)), strict=True))
        return [secret_of[slot].hex() for slot in slots]

    def discard_image(self, mm_hash: str) -> None:
        """No answer about these bytes is given again that was begun before; others are lost with it now and then."""
        self._store.discard(self._image_slot(mm_hash))

    def discard_all(self) -> None:
        """No answer is given again that was begun before."""
        self._store.discard(_ALL)

    async def get(self, key: str) -> Answer | None:
        data = await self._store.get(self._slot(key), SLOT_BYTES)
        answer = None if data is None else self._unpack(bytes(data), key)
        (metrics.answer_cache_misses if answer is None else metrics.answer_cache_hits).inc()
        return answer

    def put(self, key: str, answer: Answer) -> None:
        """Returns at once. An answer that is too long for a slot is not kept."""
        body: bytes = msgpack.packb([key, answer.finish_reason.value, answer.token_ids])
        if _DIGEST_BYTES + len(body) <= SLOT_BYTES:
            encrypted = _encrypted(body, key)
            self._store.put(self._slot(key), self._digest(encrypted) + encrypted)

    async def aclose(self) -> None:
        await self._store.aclose()

    def _slot(self, key: str) -> str:
        return f"answer:{int(key[:16], 16) % self._num_slots}"

    async def _secret(self, slot: str) -> bytes:
        kept = await self._store.get(slot, _SECRET_BYTES)
        if kept is not None and len(kept) == _SECRET_BYTES:
            return bytes(kept)
        secret = secrets.token_bytes(_SECRET_BYTES)
        self._store.put(slot, secret)
        return secret

    def _image_slot(self, mm_hash: str) -> str:
        return f"answer:image:{int(mm_hash[:16], 16) % self._num_slots}"

    def _digest(self, encrypted: bytes) -> bytes:
        return blake3.blake3(encrypted, key=self._mac_key).digest()

    def _unpack(self, data: bytes, key: str) -> Answer | None:
        """None unless every byte is as it was written, for this key."""
        encrypted = data[_DIGEST_BYTES:]
        if self._digest(encrypted) != data[:_DIGEST_BYTES]:
            return None
        try:
            fields: Any = msgpack.unpackb(_encrypted(encrypted, key))
        except (ValueError, msgpack.UnpackException):
            return None
        if not (isinstance(fields, list) and len(fields) == 3):
            return None
        found_key, reason, token_ids = fields
        if found_key != key or reason not in _REASONS or not isinstance(token_ids, list):
            return None
        if not all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in token_ids):
            return None
        return Answer(token_ids, FinishReason(reason))


def _encrypted(text: bytes, key: str) -> bytes:
    """With a key stream of BLAKE3; twice is the text itself. One key is only ever that of one answer."""
    stream = blake3.blake3(key.encode(), derive_key_context="fovea: kept answers").digest(len(text))
    return (int.from_bytes(text) ^ int.from_bytes(stream)).to_bytes(len(text))


def open_answer_cache(config: CacheConfig) -> AnswerCache | None:
    """None unless it is asked for and there is a Redis."""
    if config.answer_cache_bytes == 0:
        return None
    if config.redis_url is None:
        logger.warning("without a Redis no answers are kept: cache.answer_cache_bytes has no effect")
        return None
    secret = None if config.secret is None else config.secret.get_secret_value()
    return AnswerCache(RedisTier(config, config.redis_url), config.answer_cache_bytes, secret)


def answer_key(
    *,
    fingerprint: str,
    prompt_token_ids: Sequence[int],
    sampling_params: SamplingParams,
    stop: Sequence[str],
    salt: str,
    image_keys: Sequence[str],
    secrets: Sequence[str] = (),
) -> str:
    """A digest of everything that a greedy answer depends on, and of the secrets that it ends with.

    `salt` keeps tenants apart.
    """
    parameters = asdict(sampling_params) | {"stop_token_ids": sorted(sampling_params.stop_token_ids)}
    return framed_digest(
        fingerprint,
        salt,
        json.dumps(list(prompt_token_ids)),
        json.dumps(parameters),
        json.dumps(list(stop)),
        *image_keys,
        *secrets,
    )
