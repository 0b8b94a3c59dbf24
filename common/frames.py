"""Two frames of a clip, which the vision tower sees as one temporal grid, as one piece of bytes to send and to hash."""

import struct
from dataclasses import dataclass

from common.errors import InvalidRequestError
from common.identity import mm_hash, pair_hash

FRAMES_PER_GRID = 2  # the temporal patch size of all families that take clips

_PREFIX = struct.Struct("<4sII")  # magic, and for files the two lengths, for pixels height and width
_FILES, _PIXELS = b"FVFI", b"FVPX"

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True)
class RgbFrame:
    """An upright frame that came out of a container: `pixels` has 3 bytes for each."""

    pixels: Buffer
    height: int
    width: int


Frame = bytes | RgbFrame  # an image file, or its pixels


def pack_files(first: bytes, second: bytes) -> bytes:
    return b"".join([_PREFIX.pack(_FILES, len(first), len(second)), first, second])


def pack_pixels(first: Buffer, second: Buffer, *, height: int, width: int) -> bytes:
    return b"".join([_PREFIX.pack(_PIXELS, height, width), first, second])


def grid_hash(data: bytes) -> str:
    """The `mm_hash` of two packed frames. Raises InvalidRequestError for bytes that are not."""
    first, second = unpack_frames(data)
    if isinstance(first, RgbFrame) or isinstance(second, RgbFrame):
        return mm_hash(data)
    return pair_hash(mm_hash(first), mm_hash(second))


def unpack_frames(data: bytes) -> tuple[Frame, Frame]:
    """The inverse of both. Raises InvalidRequestError for bytes that are not two frames."""
    if len(data) >= _PREFIX.size:
        magic, one, other = _PREFIX.unpack_from(data)
        body = memoryview(data)[_PREFIX.size :]
        if magic == _FILES and len(body) == one + other:
            return bytes(body[:one]), bytes(body[one:])
        num_bytes = one * other * 3
        if magic == _PIXELS and num_bytes and len(body) == 2 * num_bytes:
            return RgbFrame(body[:num_bytes], one, other), RgbFrame(body[num_bytes:], one, other)
    raise InvalidRequestError("the data is not two frames of a clip", code="invalid_video")
