"""What few bytes can make a decoder do many times, counted without one: scans of a JPEG, frames of an animation."""

import re

from PIL import Image

from common.config import ImageLimits
from common.errors import InvalidRequestError

# Between segments a JPEG has entropy-coded data, in which 0xFF stands only before 0x00 and 0xD0 to 0xD7.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA

# Megabytes of blocks of a few bytes would take seconds to go through. Blocks of a GIF's pixels have 255 usually.
_MAX_BLOCKS = 2**13
_LEAST_GIF_BLOCK = 32

_GIF_EXTENSION, _GIF_IMAGE = ord("!"), ord(",")


def check_blocks(image: Image.Image, data: bytes, limits: ImageLimits) -> None:
    """Raises InvalidRequestError for more scans or frames than the limits allow. `data` is the whole file."""
    if image.format in ("JPEG", "MPO"):
        _check("scans", num_jpeg_scans(data), limits.max_image_scans)
    num_frames = num_gif_frames(data) if image.format == "GIF" else getattr(image, "n_frames", 1)
    _check("frames", num_frames, limits.max_image_frames)


def num_jpeg_scans(data: bytes) -> int:
    """Of the first picture in the file; each costs a decoder a pass over all of its pixels.

    Raises InvalidRequestError for more segments than any picture has.
    """
    num_scans, num_segments, at = 0, 0, 2
    while (marker := _MARKER.search(data, at)) and (kind := marker[1][0]) != _END_OF_IMAGE:
        num_scans += kind == _START_OF_SCAN
        num_segments += 1
        if num_segments > _MAX_BLOCKS:
            raise _too_many_blocks()
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return num_scans


def num_gif_frames(data: bytes) -> int:
    """Frames whose beginning is there; nothing of them is decoded.

    Raises InvalidRequestError for more blocks than any animation of these bytes has.
    """
    max_blocks = _MAX_BLOCKS + len(data) // _LEAST_GIF_BLOCK
    num_frames, num_blocks, at = 0, 0, 13 + _palette_bytes(data, 10)
    while at < len(data):
        if data[at] == _GIF_IMAGE:
            num_frames += 1
            at += 11 + _palette_bytes(data, at + 9)  # a descriptor of 10 bytes, and the size of codes
        elif data[at] == _GIF_EXTENSION:
            at += 2
        else:
            break
        while at < len(data) and data[at]:  # blocks with their lengths in front, and an empty one
            at += data[at] + 1
            num_blocks += 1
            if num_blocks > max_blocks:
                raise _too_many_blocks()
        at += 1
    return num_frames


def _palette_bytes(data: bytes, flags_at: int) -> int:
    flags = data[flags_at] if flags_at < len(data) else 0
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _too_many_blocks() -> InvalidRequestError:
    return InvalidRequestError("the image has too many blocks behind its header", code="invalid_image")


def _check(what: str, found: int, limit: int) -> None:
    if found > limit:
        raise InvalidRequestError(
            f"the image has {found} {what}, the limit is {limit} (limits.max_image_{what})", code="image_too_large"
        )
