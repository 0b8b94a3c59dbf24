"""What makes two embeddings the same thing, and nothing else does."""

import functools
from dataclasses import dataclass, fields, replace

import blake3

from common.embedding import WIRE_VERSION


def mm_hash(data: bytes) -> str:
    """BLAKE3 of the image bytes as sent: 64 hex digits. Needs no decoding and is never shortened."""
    return blake3.blake3(data).hexdigest()


def pair_hash(first: str, second: str) -> str:
    """The `mm_hash` of two frames that are images: a key names both, so that deleting one of them finds it."""
    return f"{first}-{second}"


def framed_digest(*fields: str) -> str:
    """BLAKE3 over length-framed UTF-8 strings, so that no two different lists collide by concatenation."""
    digest = blake3.blake3()
    for field in fields:
        data = field.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class EmbeddingNamespace:
    """Everything besides the image and its `MediaParams` that features depend on. The encoder owns it.

    `device` is type and capability (`cpu/AVX512/1-thread`, `cuda/9.0`): kernels, and so bits, differ between them.
    """

    weights: str
    model_class: str
    dtype: str
    numerics: str
    device: str
    torch_version: str
    attn_implementation: str
    preprocessing: str
    image_decoder: str
    tenant: str = ""
    wire_version: int = WIRE_VERSION

    def __str__(self) -> str:
        return _namespace_digest(self)

    def of(self, tenant: str) -> "EmbeddingNamespace":
        """The same for the embeddings of one tenant."""
        return replace(self, tenant=tenant)

    def key(self, mm_hash: str, params: str) -> str:
        """The cache key of one image under these circumstances."""
        return f"{self}:{mm_hash}:{params}"


@functools.lru_cache(maxsize=1024)  # every request needs it several times
def _namespace_digest(namespace: EmbeddingNamespace) -> str:
    values = ((field.name, str(getattr(namespace, field.name))) for field in fields(namespace))
    return framed_digest(*(text for pair in values for text in pair))


def images_of(key: str) -> list[str]:
    """The digests of the images whose embedding a cache key names: one, or those of two frames."""
    return images_in(key.partition(":")[2].partition(":")[0])


def images_in(mm_hash: str) -> list[str]:
    return mm_hash.split("-")


def params_of(key: str) -> str:
    """The params in a cache key."""
    return key.partition(":")[2].partition(":")[2]


@functools.lru_cache(maxsize=64)
def system_fingerprint(
    *, vision: EmbeddingNamespace, language_weights: str, mrope_rule: str, decoder: str, versions: str
) -> str:
    """What an answer depends on besides the request: both halves' weights, versions, numerics mode, position rule.

    `decoder` names the kernels of the language half and how `exact` numerics cuts prompts, which bits depend on.
    """
    return "fp_" + framed_digest(str(vision), language_weights, mrope_rule, decoder, versions)[:32]
