"""Scans of a JPEG and frames of an animation are counted without decoding, and are limited."""

import io
import random
import zlib

import pytest
from PIL import Image

from common.config import ImageLimits
from common.errors import InvalidRequestError
from deploy.bench.image_bombs import BOMBS, png, png_chunk, segment
from encoder_service.image_blocks import num_gif_frames, num_jpeg_scans
from encoder_service.preprocess import decode
from tests.odd_images import ODD, encoded, photo

PROGRESSIVE = encoded(photo(0), "JPEG", progressive=True)


def animation(format: str, num_frames: int) -> bytes:
    frames = [photo(seed).resize((20, 20)) for seed in range(num_frames)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50)


def test_a_usual_jpeg_has_one_scan_and_a_progressive_one_ten() -> None:
    assert num_jpeg_scans(ODD["JPEG"](0)) == num_jpeg_scans(ODD["JPEG restart markers"](0)) == 1
    assert num_jpeg_scans(PROGRESSIVE) == 10


def test_what_follows_the_picture_has_no_scans_of_it() -> None:
    assert num_jpeg_scans(PROGRESSIVE + PROGRESSIVE) == 10
    assert num_jpeg_scans(ODD["MPO of two"](0)) == 1


def test_an_end_within_a_segment_hides_no_scan() -> None:
    start = PROGRESSIVE.rindex(b"\xff\xda")
    assert num_jpeg_scans(PROGRESSIVE[:start] + segment(0xFE, b"\xff\xd9") + PROGRESSIVE[start:]) == 10


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind.startswith("GIF")])
def test_frames_of_a_gif_are_those_that_pillow_finds(kind: str) -> None:
    for seed in range(4):
        data = ODD[kind](seed)
        assert num_gif_frames(data) == Image.open(io.BytesIO(data)).n_frames


def test_a_gif_without_its_end_has_the_frames_that_begin() -> None:
    data = animation("GIF", 5)
    assert num_gif_frames(data) == 5
    assert [num_gif_frames(data[:length]) for length in range(len(data))] == sorted(
        num_gif_frames(data[:length]) for length in range(len(data))
    )


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_of_too_many_frames_is_refused(format: str) -> None:
    data = animation(format, 6)
    decode(data, ImageLimits(max_image_frames=6))
    with pytest.raises(InvalidRequestError, match=r"has 6 frames, the limit is 5 \(limits.max_image_frames\)"):
        decode(data, ImageLimits(max_image_frames=5))


def test_a_jpeg_of_too_many_scans_is_refused() -> None:
    decode(PROGRESSIVE, ImageLimits(max_image_scans=10))
    with pytest.raises(InvalidRequestError, match=r"has 10 scans, the limit is 9 \(limits.max_image_scans\)"):
        decode(PROGRESSIVE, ImageLimits(max_image_scans=9))


@pytest.mark.parametrize("bomb", [name for name in BOMBS if name.endswith("behind its pixels") and "PNG" not in name])
def test_blocks_behind_the_pixels_are_not_all_gone_through(bomb: str) -> None:
    with pytest.raises(InvalidRequestError, match="too many blocks behind its header"):
        decode(BOMBS[bomb](), ImageLimits())


def test_a_picture_with_much_metadata_is_no_bomb() -> None:
    noise = random.Random(0).randbytes
    exif = b"Exif\0\0" + noise(60_000)
    texts = [(b"tEXt", b"key%d\0text" % number) for number in range(500)]
    packed = [(b"iTXt", b"key%d\0\1\0\0\0" % number + zlib.compress(b"text")) for number in range(14)]
    small_idat = zlib.compress(bytes(31 * 46), 0)
    pixels = png_chunk(b"IDAT", small_idat)
    pieces = b"".join(png_chunk(b"IDAT", small_idat[at : at + 100]) for at in range(0, len(small_idat), 100))
    grayscale = png((45, 31), 8, 0, small_idat, before=[*texts, *packed], after=[*texts])
    jpeg = encoded(photo(0), "JPEG", icc_profile=noise(4 * 2**20))
    for data in (
        jpeg,
        jpeg[:2] + segment(0xE1, exif) * 8 + jpeg[2:],
        grayscale,
        grayscale.replace(pixels, pieces),
        encoded(photo(0).quantize(16), "GIF", comment=noise(400_000)),
    ):
        decode(data, ImageLimits())
