"""Pixels are those of transformers' own PIL processor, given the upright image."""

import io
import random
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from common.config import ImageLimits
from common.errors import InvalidRequestError
from common.frames import pack_files, pack_pixels
from common.geometry import PatchGeometry
from common.media import MediaParams, image_header
from encoder_service.preprocess import ImagePreprocessor, decode, pixel_values

GEOMETRY = PatchGeometry(patch_size=14, merge_size=2, hidden_size=64, min_pixels=56 * 56, max_pixels=28 * 28 * 64)
PARAMS = MediaParams(min_pixels=GEOMETRY.min_pixels, max_pixels=GEOMETRY.max_pixels)
PREPROCESS = ImagePreprocessor(GEOMETRY, {}, ImageLimits())
PROCESSOR = Qwen2VLImageProcessorPil(size={"shortest_edge": PARAMS.min_pixels, "longest_edge": PARAMS.max_pixels})


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def assert_equals_processor(data: bytes) -> None:
    reference = PROCESSOR([ImageOps.exif_transpose(Image.open(io.BytesIO(data)))], return_tensors="pt")
    ours = PREPROCESS(data, PARAMS)
    assert ours.grid_thw == tuple(reference.image_grid_thw[0].tolist())
    values = pixel_values(ours.patches, PREPROCESS.normalization_table(), temporal_patch_size=2)
    assert torch.equal(values, reference.pixel_values)
    header, decoded = image_header(data, ImageLimits()), decode(data, ImageLimits())
    assert (header.height, header.width) == (decoded.height, decoded.width)
    assert PARAMS.grid(GEOMETRY, header.height, header.width) == ours.grid_thw


def test_random_sizes_equal_the_processor() -> None:
    rng = random.Random(0)
    for seed in range(40):
        image = photo(rng.randint(1, 400), rng.randint(3, 400), seed)
        if max(image.size) / min(image.size) <= 200:
            assert_equals_processor(encoded(image, rng.choice(["PNG", "JPEG", "WEBP", "BMP"])))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_equals_the_processor(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_equals_processor(encoded(photo(90, 200), "JPEG", exif=exif))
    assert_equals_processor(encoded(photo(90, 200), "PNG", exif=exif))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_equals_the_processor(mode: str) -> None:
    image = photo(70, 120).convert("RGBA")
    image.putalpha(photo(70, 120, seed=1).convert("L"))
    data = encoded(image.convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    assert_equals_processor(data)


def test_palette_with_transparency_equals_the_processor() -> None:
    image = photo(64, 64).convert("P")
    assert_equals_processor(encoded(image, "PNG", transparency=3))
    assert_equals_processor(encoded(image, "GIF", transparency=3))


def test_progressive_jpeg_equals_the_processor() -> None:
    assert_equals_processor(encoded(photo(150, 130), "JPEG", progressive=True, quality=70))


def test_sixteen_bits_are_scaled_to_eight() -> None:
    levels = np.linspace(0, 65535, 56 * 56).astype(np.uint16).reshape(56, 56)
    deep = encoded(Image.fromarray(levels), "PNG")
    shallow = encoded(Image.fromarray((levels >> 8).astype(np.uint8)), "PNG")
    assert torch.equal(PREPROCESS(deep, PARAMS).patches, PREPROCESS(shallow, PARAMS).patches)


def test_one_pixel_is_an_image() -> None:
    assert_equals_processor(encoded(Image.new("RGB", (1, 1), "red"), "PNG"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (b"not an image", "not an image of a supported format"),
        (encoded(photo(64, 64), "PNG")[:200], "truncated or damaged"),
        (encoded(photo(300, 300), "JPEG")[:2000], "truncated or damaged"),
        (encoded(photo(1, 400), "PNG"), "aspect ratio"),
        (encoded(photo(32, 32), "TIFF"), "not an image of a supported format"),
    ],
)
def test_bad_bytes_are_refused_with_the_reason(data: bytes, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        PREPROCESS(data, PARAMS)


def test_pixel_limit_is_checked_before_anything_is_decoded() -> None:
    huge = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    huge[16:24] = (20_000).to_bytes(4, "big") * 2  # width and height in the header
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    with pytest.raises(InvalidRequestError, match=r"20000 x 20000 = 400000000 pixels, the limit is 64000000"):
        image_header(bytes(huge), ImageLimits())


def test_grid_of_a_clip_has_both_frames_in_its_patches_alone_and_in_a_batch() -> None:
    first, second = photo(90, 130, seed=1), photo(90, 130, seed=2)
    files = pack_files(encoded(first, "PNG"), encoded(second, "PNG"))
    pixels = pack_pixels(first.tobytes(), second.tobytes(), height=90, width=130)
    pair = PREPROCESS(files, replace(PARAMS, frames=2))
    still = PREPROCESS(encoded(first, "PNG"), PARAMS)
    assert torch.equal(pair.patches, PREPROCESS(pixels, replace(PARAMS, frames=2)).patches)
    doubled = PROCESSOR([first, second], return_tensors="pt").pixel_values.view(2, -1, 3, 2, 14 * 14)
    expected = doubled[:, :, :, 0].permute(1, 2, 0, 3).reshape(len(pair.patches), -1)
    device = torch.device("cpu")
    assert torch.equal(PREPROCESS.model_inputs([pair], device)["pixel_values"], expected)
    batch = PREPROCESS.model_inputs([still, pair], device)
    assert torch.equal(batch["pixel_values"], torch.cat([doubled[0].flatten(1), expected]))
    assert batch["image_grid_thw"].tolist() == [list(pair.grid_thw)] * 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"FVPX",
        pack_files(b"a", b"b")[:-1],
        pack_files(b"a", b"b") + b"c",
        pack_pixels(b"", b"", height=0, width=9),
    ],
)
def test_bytes_that_are_not_two_frames_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="not two frames"):
        PREPROCESS(data, replace(PARAMS, frames=2))
