"""Image files of few bytes, or of many blocks, that would cost a careless reader gigabytes or minutes."""

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_SIDE = 65535
_EXIF = b"Exif\0\0"


def png_chunk(tag: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def png(
    size: tuple[int, int],
    depth: int,
    colour: int,
    pixel_data: bytes,
    *,
    interlaced: bool = False,
    before: Iterable[tuple[bytes, bytes]] = (),
    after: Iterable[tuple[bytes, bytes]] = (),
) -> bytes:
    """`pixel_data` is compressed; chunks stand `before` it and `after` it."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *before, (b"IDAT", pixel_data), *after, (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(png_chunk(tag, data) for tag, data in chunks)


def segment(marker: int, data: bytes) -> bytes:
    """Of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP."""
    packed = b"".join(tag + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for tag, data in chunks)
    return b"RIFF" + struct.pack("<I", len(packed) + 4) + b"WEBP" + packed


def gif(screen: tuple[int, int], *blocks: bytes) -> bytes:
    """With a palette of black and white."""
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + b"".join(blocks) + b";"


def gif_frame(size: tuple[int, int] = (1, 1)) -> bytes:
    """One whole frame of one white pixel, whatever its size says."""
    return b"," + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\2\2\x4c\1\0"


def _hollow_png(size: tuple[int, int], depth: int, colour: int, **options: Any) -> bytes:
    return png(size, depth, colour, zlib.compress(bytes(64)), **options)


def _gibibyte() -> bytes:
    """Of zeros, compressed; the checksum at its end, which nobody should reach, is missing."""
    packer = zlib.compressobj(9, wbits=-15)
    mebibyte = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + mebibyte * 1024


def _with_chunk(tag: bytes, *data: bytes) -> bytes:
    return _hollow_png((8, 8), 8, 0, before=[(tag, one) for one in data])


def _texts(tag: bytes, flags: bytes) -> list[tuple[bytes, bytes]]:
    packed = zlib.compress(bytes(2**20))
    return [(tag, str(number).encode() + flags + packed) for number in range(1000)]


def _around_pixels(*, before: Iterable[tuple[bytes, bytes]] = (), after: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """A whole PNG."""
    return png((8, 8), 8, 0, zlib.compress(bytes(72)), before=before, after=after)


def _jpeg(size: tuple[int, int] = (64, 64), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG", **options)
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", size[1], size[0])
    return bytes(data)


def _jpeg_of_scans(num_scans: int) -> bytes:
    """A progressive JPEG of 8000 x 8000 whose last scan, a refinement, stands there again and again."""
    data = _jpeg((8000, 8000), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * num_scans + b"\xff\xd9"


def _jpeg_with(extra: bytes) -> bytes:
    data = _jpeg()
    return data[:2] + extra + data[2:]


def _animated_webp(num_frames: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "WEBP", lossless=True)
    still = buffer.getvalue()[12:]
    header = struct.pack("<I", 0x02) + bytes(6)  # animated, 1 x 1
    frame = bytes(12) + b"\1\0\0\0" + still  # at 0, 0; 1 x 1; 1 ms
    return riff((b"VP8X", header), (b"ANIM", bytes(6)), *[(b"ANMF", frame)] * num_frames)


def _canvas_webp(width: int, height: int) -> bytes:
    header = struct.pack("<I", 0x02) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return riff((b"VP8X", header), (b"ANIM", bytes(6)), (b"ANMF", bytes(16) + b"VP8L" + bytes(8)))


def _pillow(format: str, image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _apng(num_frames: int) -> bytes:
    control = struct.pack(">IIIIIHHBB", 0, 1, 1, 0, 0, 1, 10, 0, 0)
    frames = [(b"acTL", struct.pack(">II", num_frames, 0)), (b"fcTL", control)]
    more = []
    for frame in range(1, num_frames):
        more.append((b"fcTL", struct.pack(">I", 2 * frame - 1) + control[4:]))
        more.append((b"fdAT", struct.pack(">I", 2 * frame) + zlib.compress(b"\0\0")))
    return png((1, 1), 8, 0, zlib.compress(b"\0\0"), before=frames, after=more)


def _bmp(width: int, height: int, compression: int = 0, data: bytes = b"") -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(data), 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", 0, 0, 0, 1078) + info + bytes(range(256)) * 4 + data


def _tiff(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (278, height), (279, 8)]
    return (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        + bytes(4)
    )


def _ico(num_images: int, png_data: bytes) -> bytes:
    offset = 6 + 16 * num_images
    entry = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(png_data), offset)
    return struct.pack("<HHH", 0, 1, num_images) + entry * num_images + png_data


# Every one is answered with a 400: sizes, animations, scans, texts, blocks.
BOMBS: Mapping[str, Callable[[], bytes]] = {
    "PNG 65535 x 65535, 1 bit": lambda: _hollow_png((_SIDE, _SIDE), 1, 0),
    "PNG 65535 x 65535, RGB": lambda: _hollow_png((_SIDE, _SIDE), 8, 2),
    "PNG 65535 x 65535, palette": lambda: _hollow_png((_SIDE, _SIDE), 8, 3, before=[(b"PLTE", bytes(3))]),
    "PNG 65535 x 65535, RGBA of 16 bits": lambda: _hollow_png((_SIDE, _SIDE), 16, 6),
    "PNG 65535 x 65535, interlaced grayscale of 16 bits": lambda: _hollow_png((_SIDE, _SIDE), 16, 0, interlaced=True),
    "PNG 2147483647 x 2147483647": lambda: _hollow_png((2**31 - 1, 2**31 - 1), 8, 6),
    "PNG 64000000 x 1": lambda: _hollow_png((64_000_000, 1), 8, 2),
    "JPEG 65535 x 65535": lambda: _jpeg((_SIDE, _SIDE)),
    "JPEG 65535 x 65535, progressive": lambda: _jpeg((_SIDE, _SIDE), progressive=True),
    "GIF 65535 x 65535": lambda: gif((_SIDE, _SIDE), gif_frame()),
    "GIF 1 x 1 with a frame of 65535 x 65535": lambda: gif((1, 1), gif_frame((_SIDE, _SIDE))),
    "BMP 65535 x 65535": lambda: _bmp(_SIDE, _SIDE),
    "BMP 2147483647 x 2147483647": lambda: _bmp(2**31 - 1, 2**31 - 1),
    "BMP 65535 x 65535, RLE": lambda: _bmp(_SIDE, _SIDE, 1, b"\0\2\xff\xff" * 100),
    "WebP 16383 x 16383": lambda: riff((b"VP8L", b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(64))),
    "WebP with a canvas of 16383 x 16383": lambda: _canvas_webp(16383, 16383),
    "WebP with a canvas of 16777216 x 255": lambda: _canvas_webp(2**24, 255),
    "TIFF 65535 x 65535": lambda: _tiff(_SIDE, _SIDE),
    "ICO of 255 PNG of 65535 x 65535": lambda: _ico(255, _hollow_png((_SIDE, _SIDE), 8, 6)),
    "PPM 65535 x 65535": lambda: b"P6 65535 65535 255\n" + bytes(64),
    "GIF of 10,000 frames": lambda: gif((1, 1), *[gif_frame()] * 10_000),
    "GIF of 10,000 frames, 8000 x 8000": lambda: gif((8000, 8000), *[gif_frame()] * 10_000),
    "WebP of 10,000 frames": lambda: _animated_webp(10_000),
    "APNG of 10,000 frames": lambda: _apng(10_000),
    "APNG of 4294967295 frames": lambda: _with_chunk(b"acTL", b"\x80\0\0\0" + bytes(4)),
    "AVIF, animated": lambda: struct.pack(">I", 28) + b"ftypavis" + bytes(4) + b"avismsf1miaf" + bytes(1000),
    "TIFF of 1,000 pages": lambda: _pillow(
        "TIFF", Image.new("L", (1, 1)), save_all=True, append_images=[Image.new("L", (1, 1))] * 999
    ),
    "JPEG of 1,000 scans": lambda: _jpeg_of_scans(1000),
    "PNG with an iTXt of 1 GiB": lambda: _with_chunk(b"iTXt", b"a\0\1\0\0\0" + _gibibyte()),
    "PNG with a zTXt of 1 GiB": lambda: _with_chunk(b"zTXt", b"a\0\0" + _gibibyte()),
    "PNG with a profile of 1 GiB": lambda: _with_chunk(b"iCCP", b"a\0\0" + _gibibyte()),
    "PNG with 1,000 iTXt of 1 MiB": lambda: _around_pixels(before=_texts(b"iTXt", b"\0\1\0\0\0")),
    "PNG with 1,000 zTXt of 1 MiB": lambda: _around_pixels(before=_texts(b"zTXt", b"\0\0")),
    "PNG with 1,000 profiles of 1 MiB": lambda: _around_pixels(before=_texts(b"iCCP", b"\0\0")),
    "PNG with 1,000 profiles of 1 MiB behind its pixels": lambda: _around_pixels(after=_texts(b"iCCP", b"\0\0")),
    "PNG of 300,000 chunks": lambda: _around_pixels(before=[(b"teSt", b"")] * 300_000),
    "PNG of 300,000 chunks behind its pixels": lambda: _around_pixels(after=[(b"teSt", b"")] * 300_000),
    "PNG of 300,000 IDAT": lambda: _around_pixels(after=[(b"IDAT", b"")] * 300_000),
    "JPEG of 300,000 Exif segments": lambda: _jpeg_with(segment(0xE1, _EXIF + b"abcd") * 300_000),
    "JPEG of 300,000 comments": lambda: _jpeg_with(segment(0xFE, b"") * 300_000),
    "JPEG of 1,000,000 comments behind its pixels": lambda: _jpeg()[:-2] + segment(0xFE, b"") * 1_000_000 + b"\xff\xd9",
    "JPEG with 4 MiB of nothing": lambda: _jpeg_with(segment(0xFE, b"") + bytes(4 * 2**20)),
    "GIF with a comment of 2,000,000 blocks": lambda: gif((1, 1), b"!\xfe" + b"\1a" * 2_000_000 + b"\0", gif_frame()),
    "GIF with a comment of 2,000,000 blocks behind its pixels": lambda: gif(
        (1, 1), gif_frame(), b"!\xfe" + b"\1a" * 2_000_000 + b"\0"
    ),
}  # fmt: skip
