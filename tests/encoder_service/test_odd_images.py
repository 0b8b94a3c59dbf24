"""530 images of 53 odd kinds have the pixels of transformers' PIL processor, given the upright image; 100 are a 400.

Deviations: grayscale of 16 bits is scaled to 8, where the processor clips it; an orientation that stands behind the
pixels of a PNG does not count, because nothing but the header is read to plan a request.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common.config import ImageLimits
from common.errors import InvalidRequestError
from common.media import image_header
from encoder_service.preprocess import decode
from tests.encoder_service.test_preprocess import PARAMS, PREPROCESS, assert_equals_processor
from tests.odd_images import ODD, REFUSED, SIXTEEN_BIT_GRAYSCALE, deep, photo, png_of

LIMITS = ImageLimits()


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_image_equals_the_processor_and_has_the_size_of_its_header(kind: str) -> None:
    for seed in range(10):
        assert_equals_processor(ODD[kind](seed))


@pytest.mark.parametrize("kind", SIXTEEN_BIT_GRAYSCALE)
def test_grayscale_of_16_bits_is_scaled_and_its_clear_level_is_white(kind: str) -> None:
    for seed in range(10):
        levels = deep(seed, "L")[..., 0]
        clear = (levels == levels[3, 3]) & ("clear" in kind)
        shallow = np.stack([levels >> 8, np.where(clear, 0, 255)], -1).astype(np.uint8)
        expected = PREPROCESS(png_of(shallow), PARAMS)
        assert torch.equal(PREPROCESS(SIXTEEN_BIT_GRAYSCALE[kind](seed), PARAMS).patches, expected.patches)


@pytest.mark.parametrize("kind", REFUSED)
def test_an_image_that_cannot_be_taken_is_refused(kind: str) -> None:
    for seed in range(10):
        with pytest.raises(InvalidRequestError, match=r"supported format|aspect ratio"):
            PREPROCESS(REFUSED[kind](seed), PARAMS)


def test_an_orientation_behind_the_pixels_counts_in_neither_half() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png_of(np.asarray(photo(0)), after=[(b"eXIf", exif.tobytes()[6:])])
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (60, 90)
    header, decoded = image_header(data, LIMITS), decode(data, LIMITS)
    assert (header.width, header.height) == decoded.size == (90, 60)
