"""Small images of many odd but valid kinds, and of kinds that are refused: for each kind any number of them."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from deploy.bench.image_bombs import png

Pixels = np.ndarray[Any, Any]

_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_SIZES = ((60, 90), (31, 47), (112, 56), (29, 200), (97, 28), (56, 56), (140, 33), (64, 65), (28, 28), (75, 121))


def photo(seed: int, mode: str = "RGB") -> Image.Image:
    """A smooth random picture, of one of ten sizes. Where its mode has alpha, that is smooth and random, too."""
    height, width = _SIZES[seed % len(_SIZES)]
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 4), np.uint8)
    image = Image.fromarray(coarse, "RGBA" if "A" in mode else None).resize((width, height), Image.Resampling.BICUBIC)
    return image.convert("RGB").convert(mode) if "A" not in mode else image.convert(mode)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_of(pixels: Pixels, *, interlaced: bool = False, **chunks: Any) -> bytes:
    """A PNG of 8 or 16 bits, which Pillow cannot write in all of its kinds. `pixels` is `[H, W, channels]`."""
    height, width, channels = pixels.shape
    passes = [pixels[row::down, column::right] for row, column, down, right in _ADAM7] if interlaced else [pixels]
    rows = [b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for one in passes if one.size for row in one]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    data = zlib.compress(b"".join(rows))
    return png((width, height), 8 * pixels.itemsize, colour, data, interlaced=interlaced, **chunks)


def deep(seed: int, mode: str) -> Pixels:
    """16 bits, of which the lower 8 are not those of the upper."""
    pixels = np.asarray(photo(seed, mode)).astype(np.uint16)
    noise = np.random.default_rng(seed).integers(0, 256, pixels.shape, np.uint16)
    deep_pixels: Pixels = (pixels * 256 + noise).reshape(*pixels.shape[:2], -1)
    return deep_pixels


def exif(orientation: Any) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def without_segment(jpeg: bytes, marker: int) -> bytes:
    """The JPEG without its first segment of this marker."""
    start = jpeg.index(bytes([0xFF, marker]))
    (length,) = struct.unpack_from(">H", jpeg, start + 2)
    return jpeg[:start] + jpeg[start + 2 + length :]


def gif_frame_of(seed: int, *, screen: tuple[int, int], at: tuple[int, int], interlaced: bool = False) -> bytes:
    """A GIF whose one frame has another place and size than its screen."""
    data = bytearray(encoded(photo(seed, "P"), "GIF", interlace=interlaced))
    data[6:10] = struct.pack("<HH", *screen)
    descriptor = data.index(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    data[descriptor + 1 : descriptor + 5] = struct.pack("<HH", *at)
    return bytes(data)


def bmp_rle8(seed: int) -> bytes:
    image = photo(seed, "L").convert("P")
    pixels = np.asarray(image)[::-1]
    rows = b"".join(b"".join(bytes([1, value]) for value in row) + b"\0\0" for row in pixels.tolist()) + b"\0\1"
    palette = b"".join(bytes([level, level, level // 2, 0]) for level in range(256))
    offset = 54 + len(palette)
    header = struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, image.width, image.height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return header + info + palette + rows


def bmp_565(seed: int, *, top_down: bool = False) -> bytes:
    pixels = np.asarray(photo(seed)).astype(np.uint16)
    height, width, _ = pixels.shape
    packed = (pixels[..., 0] >> 3 << 11) | (pixels[..., 1] >> 2 << 5) | (pixels[..., 2] >> 3)
    padded = np.pad(packed, ((0, 0), (0, width % 2)))
    data = (padded if top_down else padded[::-1]).astype("<u2").tobytes()
    header = struct.pack("<2sIHHI", b"BM", 66 + len(data), 0, 0, 66)
    signed_height = -height if top_down else height
    info = struct.pack("<IiiHHIIiiII", 40, width, signed_height, 1, 16, 3, len(data), 0, 0, 0, 0)
    return header + info + struct.pack("<III", 0xF800, 0x07E0, 0x001F) + data


_LEVELS = bytes(range(0, 240, 15))
_GAMMA_AND_TEXT = ((b"gAMA", struct.pack(">I", 45455)), (b"tEXt", b"a\0b"))


def _pixel(seed: int, mode: str) -> Any:
    return photo(seed, mode).getpixel((3, 3))


def _deep_level(seed: int) -> bytes:
    return struct.pack(">H", int(deep(seed, "L")[3, 3, 0]))


def _profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _still_and_next(seed: int) -> dict[str, Any]:
    return {"save_all": True, "append_images": [photo(seed + 10).resize(photo(seed).size)], "duration": 50}


def _thin(seed: int) -> Image.Image:
    long = np.random.default_rng(seed).integers(0, 256, (1, 101 + 11 * seed % 100, 3), np.uint8)
    return Image.fromarray(long if seed % 2 else np.ascontiguousarray(long.transpose(1, 0, 2)))


ODD: dict[str, Callable[[int], bytes]] = {
    "JPEG": lambda seed: encoded(photo(seed), "JPEG", quality=30 + 7 * (seed % 10)),
    "JPEG grayscale": lambda seed: encoded(photo(seed, "L"), "JPEG"),
    "JPEG progressive": lambda seed: encoded(photo(seed), "JPEG", progressive=True, quality=60),
    "JPEG 4:4:4, 4:2:2, 4:2:0": lambda seed: encoded(photo(seed), "JPEG", subsampling=seed % 3),
    "JPEG restart markers": lambda seed: encoded(photo(seed), "JPEG", restart_marker_rows=1 + seed % 2),
    "JPEG without YCbCr": lambda seed: encoded(photo(seed), "JPEG", keep_rgb=True),
    "JPEG CMYK, inverted by Adobe": lambda seed: encoded(photo(seed, "CMYK"), "JPEG"),
    "JPEG CMYK without a marker": lambda seed: without_segment(encoded(photo(seed, "CMYK"), "JPEG"), 0xEE),
    "JPEG EXIF 1 to 8": lambda seed: encoded(photo(seed), "JPEG", exif=exif(seed % 8 + 1)),
    "JPEG EXIF 0, 9, 65535": lambda seed: encoded(photo(seed), "JPEG", exif=exif((0, 9, 65535)[seed % 3])),
    "JPEG XMP 1 to 8": lambda seed: encoded(photo(seed), "JPEG", xmp=b'<x tiff:Orientation="%d"/>' % (seed % 8 + 1)),
    "JPEG ICC profile": lambda seed: encoded(photo(seed), "JPEG", icc_profile=_profile()),
    "MPO of two": lambda seed: encoded(photo(seed), "MPO", save_all=True, append_images=[photo(seed + 10)]),
    "PNG": lambda seed: encoded(photo(seed), "PNG"),
    "PNG RGBA": lambda seed: encoded(photo(seed, "RGBA"), "PNG"),
    "PNG LA": lambda seed: encoded(photo(seed, "LA"), "PNG"),
    "PNG grayscale": lambda seed: encoded(photo(seed, "L"), "PNG"),
    "PNG 1 bit": lambda seed: encoded(photo(seed, "1"), "PNG"),
    "PNG palette of 1, 2, 4, 8 bits": lambda seed: encoded(photo(seed).quantize(2 ** 2 ** (seed % 4)), "PNG"),
    "PNG palette, one clear": lambda seed: encoded(photo(seed).quantize(16), "PNG", transparency=seed % 16),
    "PNG palette with alpha": lambda seed: encoded(photo(seed).quantize(16), "PNG", transparency=_LEVELS),
    "PNG RGB, a colour clear": lambda seed: encoded(photo(seed), "PNG", transparency=_pixel(seed, "RGB")),
    "PNG grayscale, a level clear": lambda seed: encoded(photo(seed, "L"), "PNG", transparency=_pixel(seed, "L")),
    "PNG interlaced": lambda seed: png_of(np.asarray(photo(seed)), interlaced=True),
    "PNG interlaced LA": lambda seed: png_of(np.asarray(photo(seed, "LA")), interlaced=True),
    "PNG 16 bits RGB": lambda seed: png_of(deep(seed, "RGB"), interlaced=bool(seed % 2)),
    "PNG 16 bits RGBA": lambda seed: png_of(deep(seed, "RGBA")),
    "PNG 16 bits LA": lambda seed: png_of(deep(seed, "LA")),
    "PNG EXIF 1 to 8": lambda seed: encoded(photo(seed), "PNG", exif=exif(seed % 8 + 1)),
    "PNG ICC profile": lambda seed: encoded(photo(seed), "PNG", icc_profile=_profile()),
    "PNG gamma and text": lambda seed: png_of(np.asarray(photo(seed)), before=_GAMMA_AND_TEXT),
    "APNG": lambda seed: encoded(photo(seed), "PNG", **_still_and_next(seed)),
    "GIF": lambda seed: encoded(photo(seed).quantize(64), "GIF", interlace=bool(seed % 2)),
    "GIF grayscale": lambda seed: encoded(photo(seed, "L"), "GIF"),
    "GIF, a colour clear": lambda seed: encoded(photo(seed).quantize(64), "GIF", transparency=seed % 64),
    "GIF animated": lambda seed: encoded(photo(seed), "GIF", **_still_and_next(seed)),
    "GIF frame smaller than the screen": lambda seed: gif_frame_of(seed, screen=(210, 150), at=(5, 7)),
    "GIF frame larger than the screen": lambda seed: gif_frame_of(seed, screen=(20, 20), at=(3, 0), interlaced=True),
    "BMP": lambda seed: encoded(photo(seed), "BMP"),
    "BMP grayscale, palette, 1 bit": lambda seed: encoded(photo(seed, ("L", "P", "1")[seed % 3]), "BMP"),
    "BMP of 32 bits": lambda seed: encoded(photo(seed, "RGBA"), "BMP"),
    "BMP of 16 bits": lambda seed: bmp_565(seed, top_down=bool(seed % 2)),
    "BMP RLE": bmp_rle8,
    "WebP": lambda seed: encoded(photo(seed), "WEBP", quality=50),
    "WebP lossless": lambda seed: encoded(photo(seed), "WEBP", lossless=True),
    "WebP with alpha": lambda seed: encoded(photo(seed, "RGBA"), "WEBP", lossless=bool(seed % 2)),
    "WebP animated": lambda seed: encoded(photo(seed), "WEBP", **_still_and_next(seed)),
    "WebP EXIF 1 to 8": lambda seed: encoded(photo(seed), "WEBP", lossless=True, exif=exif(seed % 8 + 1)),
    "thin": lambda seed: encoded(_thin(seed), "PNG"),
    "1 x 200 and 200 x 1": lambda seed: encoded(photo(seed).resize((1, 200) if seed % 2 else (200, 1)), "BMP"),
    "one pixel": lambda seed: encoded(photo(seed).resize((1, 1)), "GIF" if seed % 2 else "PNG"),
}  # fmt: skip

# What transformers' processor makes of these is not what is in them: it clips the levels, or knows no clear one.
SIXTEEN_BIT_GRAYSCALE: dict[str, Callable[[int], bytes]] = {
    "PNG 16 bits grayscale": lambda seed: png_of(deep(seed, "L"), interlaced=bool(seed % 2)),
    "PNG 16 bits grayscale, a level clear": lambda seed: png_of(deep(seed, "L"), before=[(b"tRNS", _deep_level(seed))]),
}

REFUSED: dict[str, Callable[[int], bytes]] = {
    "1 x 201": lambda seed: encoded(photo(seed).resize((1, 201) if seed % 2 else (201, 1)), "PNG"),
    "TIFF": lambda seed: encoded(photo(seed), "TIFF", compression=(None, "tiff_lzw", "jpeg")[seed % 3]),
    "TIFF of 16 bits": lambda seed: encoded(Image.fromarray(deep(seed, "L")[..., 0]), "TIFF"),
    "TIFF pages": lambda seed: encoded(photo(seed), "TIFF", **_still_and_next(seed)),
    "ICO": lambda seed: encoded(photo(seed), "ICO"),
    "AVIF": lambda seed: struct.pack(">I", 28) + b"ftypavif" + bytes(4) + b"avifmif1miaf" + bytes(100 + seed),
    "JPEG 2000": lambda seed: encoded(photo(seed), "JPEG2000"),
    "PPM": lambda seed: encoded(photo(seed), "PPM"),
    "TGA": lambda seed: encoded(photo(seed), "TGA"),
    "DDS": lambda seed: encoded(photo(seed), "DDS"),
}
