"""What is sent to be encoded, and what an image's header alone says: type, size, orientation. No pixels here."""

import io
import math
import time
from dataclasses import dataclass

from PIL import ExifTags, Image, PngImagePlugin

from common.config import MIB, ImageLimits, TokenReduction
from common.embedding import Grid
from common.errors import DeadlineExceededError, InvalidRequestError, PayloadTooLargeError
from common.frames import Frame, RgbFrame, grid_hash, unpack_frames
from common.geometry import ImageGeometry
from common.identity import mm_hash

_REDUCTION = "reduction"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# Limits are ours and are checked before anything is decoded; Pillow's own limit would hide the size from the message.
Image.MAX_IMAGE_PIXELS = None

# The texts of a PNG are unpacked with its header, and kept; nothing but an orientation in one of them is of use.
PngImagePlugin.MAX_TEXT_MEMORY = 4 * MIB

_MAX_HEADER_READS = 2**13
_MAX_COSTLY_READS = 16
_EXIF = b"Exif\0\0"
_PACKED_CHUNKS = (b"iCCP", b"iTXt", b"zTXt")


@dataclass(frozen=True, slots=True)
class MediaParams:
    """What features depend on besides the bytes and the namespace. Part of the key.

    That is the pixel budget and the `reduction`, if a part of the tokens is kept only; for some families also whether
    the image is `alone` in its prompt, or an `instruction`, the text of the prompt. A temporal grid of a clip has two
    `frames`, which the bytes hold as `common.frames` packs them; the budget is that of each.
    """

    min_pixels: int
    max_pixels: int
    alone: bool = True
    instruction: str = ""
    frames: int = 1
    reduction: TokenReduction | None = None

    def grid(self, geometry: ImageGeometry, height: int, width: int) -> Grid:
        """The grid of an image of this displayed size, in pixels, under these params."""
        return geometry.grid(height, width, min_pixels=self.min_pixels, max_pixels=self.max_pixels, alone=self.alone)

    def __str__(self) -> str:
        among = "" if self.alone else ",among=others"
        instruction = f",instruction={mm_hash(self.instruction.encode())}" if self.instruction else ""
        frames = f",frames={self.frames}" if self.frames > 1 else ""
        reduction = f",{_REDUCTION}={self.reduction}" if self.reduction else ""
        return f"max_pixels={self.max_pixels},min_pixels={self.min_pixels}{among}{instruction}{frames}{reduction}"


def reduction_of(params: str) -> TokenReduction | None:
    """That of `MediaParams`, from how they are written in a key."""
    for field in params.split(","):
        name, _, value = field.partition("=")
        if name == _REDUCTION:
            method, _, ratio = value.partition(":")
            return TokenReduction.model_validate({"method": method, "ratio": ratio})
    return None


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One image, or temporal grid of a clip, to be encoded: its bytes as sent, their `mm_hash`, and the params.

    Its embedding is `tenant`'s alone. After `deadline`, in Unix time, nobody waits for it any more.
    """

    data: bytes
    mm_hash: str
    params: MediaParams
    tenant: str = ""
    deadline: float | None = None

    @classmethod
    def of(cls, data: bytes, params: MediaParams, tenant: str = "") -> "MediaItem":
        return cls(data=data, mm_hash=item_hash(data, params), params=params, tenant=tenant)

    def displayed_size(self, limits: ImageLimits) -> tuple[int, int]:
        """Height and width in pixels, of each of the frames if there are two. Raises InvalidRequestError."""
        if self.params.frames == 1:
            header = image_header(self.data, limits)
            return header.height, header.width
        first, second = (frame_size(frame, limits) for frame in unpack_frames(self.data))
        check_same_size(first, second)
        return first

    def check_deadline(self) -> None:
        """Raises DeadlineExceededError, so that no time is spent on what nobody waits for."""
        if self.deadline is not None and time.time() > self.deadline:
            raise DeadlineExceededError("the time limit of the request is over", code="deadline_exceeded")


def item_hash(data: bytes, params: MediaParams) -> str:
    """The `mm_hash` of an item. Raises InvalidRequestError for one that should be two frames and is not."""
    return mm_hash(data) if params.frames == 1 else grid_hash(data)


class _Source(io.BytesIO):
    """A file that a decoder may read in so many pieces: some have millions of empty blocks around their pixels.

    A segment of a JPEG is four pieces, a chunk of a PNG three. Costly are chunks that unpack to a mebibyte, and
    segments of Exif, each of which is joined to all before it.
    """

    reads_left: float = _MAX_HEADER_READS
    costly_reads_left: int = _MAX_COSTLY_READS

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(size)
        self.reads_left -= 1
        self.costly_reads_left -= piece.startswith(_EXIF) or piece[4:8] in _PACKED_CHUNKS
        if self.reads_left < 0 or self.costly_reads_left < 0:
            raise InvalidRequestError("the image has too many blocks around its pixels", code="invalid_image")
        return piece


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """`height` and `width` in pixels as displayed, that is with the EXIF `orientation` (1 to 8) applied."""

    format: str
    height: int
    width: int
    orientation: int


def image_header(data: bytes, limits: ImageLimits) -> ImageHeader:
    """Reads the header within the limits. Raises InvalidRequestError with both numbers when one is exceeded."""
    image = open_image(data, limits)
    assert image.format is not None
    orientation = orientation_of(image)
    width, height = image.size
    if orientation >= 5:  # 5 to 8 swap the axes
        width, height = height, width
    return ImageHeader(format=image.format, height=height, width=width, orientation=orientation)


def frame_size(frame: Frame, limits: ImageLimits) -> tuple[int, int]:
    """Displayed height and width of a frame of a clip. Raises InvalidRequestError."""
    if isinstance(frame, RgbFrame):
        _check_pixels(frame.height, frame.width, limits)
        return frame.height, frame.width
    header = image_header(frame, limits)
    return header.height, header.width


def check_same_size(first: tuple[int, int], other: tuple[int, int]) -> None:
    """Raises InvalidRequestError for two frames that are not of one clip."""
    if first != other:
        raise InvalidRequestError(
            f"frames of a clip must have one size: one has {first[1]} x {first[0]} pixels, another {other[1]} x "
            f"{other[0]}",
            code="invalid_video",
        )


def open_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """A lazily opened image whose size is within the limits; nothing is decoded yet."""
    if not data:
        raise InvalidRequestError("the image has 0 bytes", code="invalid_image")
    if len(data) > limits.max_image_bytes:
        raise PayloadTooLargeError(
            f"the image has {len(data)} bytes, the limit is {limits.max_image_bytes} (limits.max_image_bytes)",
            code="image_too_large",
        )
    try:
        source = _Source(data)
        image = Image.open(source, formats=FORMATS)
        # A PNG is read in chunks to its end, the others in large pieces or, a BMP, in bytes.
        source.reads_left = source.reads_left + len(data) / 256 if image.format == "PNG" else math.inf
    except (MemoryError, InvalidRequestError):
        raise
    except Exception as exc:  # decoders raise anything; their text may hold addresses, so it is not passed on
        raise InvalidRequestError(
            f"the data is not an image of a supported format ({', '.join(FORMATS)})", code="invalid_image"
        ) from exc
    width, height = image.size
    _check_pixels(height, width, limits)
    return image


def _check_pixels(height: int, width: int, limits: ImageLimits) -> None:
    if width * height > limits.max_image_pixels:
        raise InvalidRequestError(
            f"the image has {width} x {height} = {width * height} pixels, the limit is {limits.max_image_pixels} "
            "(limits.max_image_pixels)",
            code="image_too_large",
        )


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 of an opened image, from its header: a damaged or absent tag is 1.

    The base class's method, because PngImageFile.getexif() decodes the whole picture to look behind it.
    """
    try:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata is no reason to refuse a picture
        return 1
    return orientation if orientation in range(1, 9) else 1
