"""The LLM service's way to an embedding: cache, join, encoder, and an encoder that changes under it."""

import asyncio
import dataclasses
from dataclasses import dataclass, field

import pytest
import torch

from common.cache import TieredCache
from common.embedding import VisionEmbedding, pack
from common.errors import InvalidRequestError, PayloadTooLargeError, UnavailableError
from common.geometry import PatchGeometry
from common.identity import EmbeddingNamespace
from common.media import MediaItem, MediaParams
from llm_service.features import FeatureSource, ImageRequest

GEOMETRY = PatchGeometry(patch_size=14, merge_size=2, hidden_size=8, min_pixels=3136, max_pixels=50176)
PARAMS = MediaParams(min_pixels=3136, max_pixels=50176)
GRID = (1, 4, 6)
NAMESPACE = EmbeddingNamespace(
    weights="w", model_class="m", dtype="float32", numerics="exact", device="cpu", torch_version="t",
    attn_implementation="sdpa", preprocessing="p", image_decoder="d",
)  # fmt: skip


@dataclass
class ScriptedEncoder:
    """Packs rows that say which bytes they are of; as slow, as wrong or as failing as a test needs."""

    namespace: EmbeddingNamespace = NAMESPACE
    num_rows: int = 6
    error: Exception | None = None
    seconds: float = 0.0
    encoded: list[bytes] = field(default_factory=list)

    async def describe(self, image: str | None = None) -> EmbeddingNamespace:
        return self.namespace

    async def encode(self, item: MediaItem) -> bytes:
        self.encoded.append(item.data)
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        features = torch.full((self.num_rows, 8), float(item.data[0]))
        key = self.namespace.key(item.mm_hash, str(item.params))
        return pack(VisionEmbedding({"features": features}, GRID), key=key)


def image(data: bytes, field: str = "messages[0]") -> ImageRequest:
    return ImageRequest(MediaItem.of(data, PARAMS), GRID, field)


async def test_results_come_in_the_order_of_the_images(memory_cache: TieredCache) -> None:
    source = FeatureSource(ScriptedEncoder(), memory_cache, GEOMETRY)
    await source.get_many([image(b"\x02")])
    found = await source.get_many([image(b"\x01"), image(b"\x02"), image(b"\x01")])
    assert [features.embedding.features[0, 0].item() for features in found] == [1, 2, 1]
    assert [features.source for features in found] == ["encoder", "local", "encoder"]


async def test_identical_misses_join_in_one_call(memory_cache: TieredCache) -> None:
    encoder = ScriptedEncoder(seconds=0.02)
    source = FeatureSource(encoder, memory_cache, GEOMETRY)
    await asyncio.gather(*(source.get_many([image(b"\x01"), image(b"\x01")]) for _ in range(10)))
    assert len(encoder.encoded) == 1


async def test_caller_that_leaves_takes_nobody_with_it(memory_cache: TieredCache) -> None:
    encoder = ScriptedEncoder(seconds=0.05)
    source = FeatureSource(encoder, memory_cache, GEOMETRY)
    leaving = asyncio.create_task(source.get_many([image(b"\x01")]))
    staying = asyncio.create_task(source.get_many([image(b"\x01")]))
    await asyncio.sleep(0.01)
    leaving.cancel()
    assert (await staying)[0].source == "encoder"
    assert len(encoder.encoded) == 1


async def test_encoder_with_other_weights_is_noticed_and_asked_again(memory_cache: TieredCache) -> None:
    encoder = ScriptedEncoder()
    source = FeatureSource(encoder, memory_cache, GEOMETRY)
    before = (await source.get_many([image(b"\x01")]))[0]
    encoder.namespace = dataclasses.replace(NAMESPACE, weights="other")
    after = (await source.get_many([image(b"\x02")]))[0]
    assert after.key.startswith(str(encoder.namespace))
    again = (await source.get_many([image(b"\x01")]))[0]
    assert (again.source, before.key == again.key) == ("encoder", False)


async def test_reply_of_the_wrong_shape_is_never_used(memory_cache: TieredCache) -> None:
    source = FeatureSource(ScriptedEncoder(num_rows=5), memory_cache, GEOMETRY)
    with pytest.raises(UnavailableError, match="does not fit the image"):
        await source.get_many([image(b"\x01")])


async def test_error_names_the_image_that_caused_it(memory_cache: TieredCache) -> None:
    encoder = ScriptedEncoder(error=PayloadTooLargeError("too large", code="image_too_large"))
    source = FeatureSource(encoder, memory_cache, GEOMETRY)
    with pytest.raises(InvalidRequestError) as caught:
        await source.get_many([image(b"\x01", "messages[2].content[1].image_url.url")])
    assert caught.value.status == 413
    assert caught.value.param == "messages[2].content[1].image_url.url"
    assert caught.value.code == "image_too_large"


async def test_replica_of_another_namespace_is_asked_itself_and_its_embedding_kept_apart(
    memory_cache: TieredCache,
) -> None:
    """A CPU encoder beside one on a GPU, or a new version beside the old one: the image decides who answers."""
    other = dataclasses.replace(NAMESPACE, device="cuda/9.0")
    replicas = {MediaItem.of(data, PARAMS).mm_hash: name for data, name in ((b"\x01", NAMESPACE), (b"\x02", other))}

    class MixedEncoder(ScriptedEncoder):
        async def describe(self, image: str | None = None) -> EmbeddingNamespace:
            return NAMESPACE if image is None else replicas[image]

        async def encode(self, item: MediaItem) -> bytes:
            self.namespace = replicas[item.mm_hash]
            return await super().encode(item)

    source = FeatureSource(MixedEncoder(), memory_cache, GEOMETRY)
    for _ in range(2):
        found = [(await source.get_many([image(data)]))[0] for data in (b"\x01", b"\x02")]
        assert [features.key.partition(":")[0] for features in found] == [str(NAMESPACE), str(other)]
        assert [features.embedding.features[0, 0].item() for features in found] == [1, 2]
