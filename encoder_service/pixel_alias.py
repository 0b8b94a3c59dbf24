"""Finds other files of the same picture by their decoded pixels: PNG, lossless WebP and BMP of one picture are copies.

An alias of pixels leads to the `mm_hash` of a copy and never to an embedding itself, so a reader still asks for an
entry by its full key. Aliases are kept in the second store, which evicts nothing, so that a deletion finds them all.
"""

import blake3

from common import metrics
from common.config import ImageLimits
from common.errors import InsufficientStorageError, UnavailableError
from common.identity import EmbeddingNamespace
from common.media_store import MediaStore
from encoder_service.preprocess import decode


def pixel_digest(data: bytes, limits: ImageLimits, namespace: str) -> str:
    """BLAKE3 of mode, size and pixels of the upright RGB image, keyed by the namespace: decoder, model and tenant.

    Decodes the whole image. Raises InvalidRequestError.
    """
    image = decode(data, limits)
    digest = blake3.blake3(key=blake3.blake3(namespace.encode()).digest())
    digest.update(f"{image.mode} {image.width} {image.height}\0".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


class PixelAlias:
    """The copies of pictures under one namespace. Without its store there are none."""

    def __init__(self, store: MediaStore, namespace: EmbeddingNamespace) -> None:
        self._store = store
        self._tenant = namespace.tenant

    async def copies(self, pixels: str, mm_hash: str) -> list[str]:
        """The other files with these pixels, of which this one is a copy from now on."""
        try:
            return await self._store.join_copies(pixels, mm_hash, self._tenant)
        except (InsufficientStorageError, UnavailableError):
            metrics.pixel_aliases_unused.inc()
            return []
