"""Images as requests name them: by bytes, URL, id or alias. Nothing is fetched or decoded here."""

import hashlib
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import pybase64

from common.config import ImageLimits
from common.errors import InvalidRequestError, PayloadTooLargeError
from common.identity import mm_hash
from common.media import MediaParams

Detail = Literal["auto", "low", "high", "original"]
Kind = Literal["image", "video"]

_SENT_AS: Mapping[Kind, str] = {
    "image": "an image is sent as a data URL (data:image/png;base64,...) or an http(s) URL",
    "video": "a video is sent as a data URL (data:video/mp4;base64,...)",
}

# RFC 2397 with base64: data:image/png;charset=x;base64,....; scheme and type are case-insensitive. Browsers write the
# codecs of a video with a comma between them. Each repetition before the data has a limit: without one, megabytes of
# semicolons take gigabytes and seconds.
_DATA_URL = re.compile(
    r"data:(?P<type>[^;,]{0,200})(?P<parameters>(?:;[^;]{0,200}){0,16}?;base64|(?:;[^;,]{0,200}){0,16}),(?P<data>.*)",
    re.IGNORECASE | re.DOTALL,
)

_WHITESPACE = string.whitespace.encode()
_PIECE_CHARACTERS = 256 * 1024
_WEB_URL = re.compile(r"https?://", re.IGNORECASE)
_MAX_URL_LENGTH = 2048
_LOW_DETAIL_SHARE = 4  # `detail: low` gives a picture this fraction of the pixel budget
_ALIAS = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CONTENT_HASH = re.compile(r"(?:(?P<algorithm>blake3|sha256):)?(?P<digest>[0-9A-Fa-f]{64})")


@dataclass(frozen=True, slots=True)
class ContentHash:
    """What a caller says the digest of an image's bytes is; `field` is where it stood."""

    algorithm: Literal["blake3", "sha256"]
    digest: str
    field: str

    def check(self, data: bytes) -> None:
        """Raises InvalidRequestError if these are other bytes."""
        self.check_digest(mm_hash(data) if self.algorithm == "blake3" else hashlib.sha256(data).hexdigest())

    def check_digest(self, found: str) -> None:
        if found != self.digest:
            raise InvalidRequestError(
                f"the image's bytes have the {self.algorithm.upper()} {found}, not {self.digest}",
                param=self.field,
                code="content_hash_mismatch",
            )


@dataclass(frozen=True, slots=True)
class ImagePart:
    """`field` is where the image stood in the request, for error messages; `alias` is its `uuid`, if it has one."""

    data: bytes
    detail: Detail
    field: str
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class UrlPart:
    """An image that has to be fetched."""

    url: str
    detail: Detail
    field: str
    alias: str | None = None
    content_hash: ContentHash | None = None


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image that is in the media store already; `field` is where its name stood.

    `name` is a media id, an alias (`uuid`), or the BLAKE3 of the bytes.
    """

    name: str
    kind: Literal["id", "alias", "digest"]
    detail: Detail
    field: str
    content_hash: ContentHash | None = None


AnyImagePart = ImagePart | UrlPart | MediaPart


def decode_data_url(url: str, field: str, limits: ImageLimits) -> bytes:
    """The bytes of a base64 `data:` URL whose type is an image's. What the bytes really hold is found out later."""
    media_type, text = split_data_url(url, field)
    if not media_type.startswith("image/"):
        raise InvalidRequestError(
            f"the data URL has the type {media_type[:64]!r}, not an image's", param=field, code="invalid_image_url"
        )
    return decode_base64(text, field, limits)


def split_data_url(url: str, field: str, kind: Kind = "image") -> tuple[str, str]:
    """The type, in lower case, and the base64 of a `data:` URL."""
    match = _DATA_URL.fullmatch(url.strip())
    if match is None:
        raise InvalidRequestError(_SENT_AS[kind], param=field, code=f"invalid_{kind}_url")
    if ";base64" not in match["parameters"].lower():
        raise InvalidRequestError("the data URL is not base64", param=field, code="invalid_base64")
    return match["type"].strip().lower(), match["data"]


def decode_base64(text: str, field: str, limits: ImageLimits, kind: Kind = "image") -> bytes:
    is_image = kind == "image"
    max_bytes, setting = (
        (limits.max_image_bytes, "max_image_bytes") if is_image else (limits.video.max_bytes, "video.max_bytes")
    )
    if len(text) > max_bytes * 4 // 3 + 4:
        raise PayloadTooLargeError(
            f"the {kind} has more than {max_bytes} bytes (limits.{setting})", param=field, code=f"{kind}_too_large"
        )
    try:
        return _decoded(text)
    except ValueError as exc:
        raise InvalidRequestError(f"the {kind} is not valid base64", param=field, code="invalid_base64") from exc


def image_of_url(
    url: str,
    field: str,
    limits: ImageLimits,
    *,
    detail: Detail = "auto",
    alias: str | None = None,
    content_hash: ContentHash | None = None,
) -> ImagePart | UrlPart:
    """An image by the URL of any API."""
    if _WEB_URL.match(url):
        if len(url) > _MAX_URL_LENGTH:
            raise InvalidRequestError(
                f"the URL has {len(url)} characters, the limit is {_MAX_URL_LENGTH}",
                param=field,
                code="invalid_image_url",
            )
        return UrlPart(url, detail, field, alias, content_hash)
    data = decode_data_url(url, field, limits)
    if content_hash is not None:
        content_hash.check(data)
    return ImagePart(data, detail, field, alias)


def parse_image_part(part: Mapping[str, Any], field: str, limits: ImageLimits) -> AnyImagePart:
    """A content part `image_url` of chat completions, with `uuid` and `content_hash` if it has them."""
    alias = _parse_alias(part, field)
    image = part.get("image_url")
    if image is None and alias is not None:
        image = {}
    if isinstance(image, str) and "type" not in part:  # an old form of OpenAI's, which vLLM takes as well
        image = {"url": image}
    if not isinstance(image, Mapping):
        raise InvalidRequestError('image_url must be an object with a string "url"', param=f"{field}.image_url")
    detail = parse_detail(image, f"{field}.image_url")
    content_hash = _parse_content_hash(image, f"{field}.image_url.content_hash")
    url = image.get("url")
    if url is None and alias is not None:
        return MediaPart(alias, "alias", detail, f"{field}.uuid", content_hash)
    if url is None and content_hash is not None and content_hash.algorithm == "blake3":
        return MediaPart(content_hash.digest, "digest", detail, content_hash.field)
    if not isinstance(url, str):
        raise InvalidRequestError('image_url must be an object with a string "url"', param=f"{field}.image_url")
    return image_of_url(url, f"{field}.image_url.url", limits, detail=detail, alias=alias, content_hash=content_hash)


def parse_reference(part: Mapping[str, Any], field: str) -> MediaPart:
    """A content part `image_ref`: an image of /v1/media."""
    media_id = part.get("media_id")
    if not isinstance(media_id, str):
        raise InvalidRequestError("media_id must be a string", param=f"{field}.media_id")
    return MediaPart(media_id, "id", parse_detail(part, field), f"{field}.media_id")


def parse_detail(source: Mapping[str, Any], field: str) -> Detail:
    """`default` is SGLang's word for `auto`."""
    detail = source.get("detail") or "auto"
    detail = "auto" if detail == "default" else detail
    if detail not in get_args(Detail):
        raise InvalidRequestError(
            f"detail must be one of {list(get_args(Detail))}, not {str(detail)[:64]!r}", param=f"{field}.detail"
        )
    return cast(Detail, detail)


def with_detail(params: MediaParams, detail: Detail) -> MediaParams:
    """The params under which a picture of this detail is encoded."""
    if detail != "low":
        return params
    return replace(params, max_pixels=max(params.min_pixels, params.max_pixels // _LOW_DETAIL_SHARE))


def _decoded(text: str) -> bytes:
    """Raises ValueError. Whitespace, which few texts have, costs many times the decoding."""
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError:
        return pybase64.b64decode(_without_whitespace(text), validate=True)


def _without_whitespace(text: str) -> bytes:
    """In pieces, so that other threads get their turn: removing it holds the interpreter's lock."""
    starts = range(0, len(text), _PIECE_CHARACTERS)
    pieces = (text[start : start + _PIECE_CHARACTERS].encode("ascii") for start in starts)
    return b"".join(piece.translate(None, _WHITESPACE) for piece in pieces)


def _parse_alias(part: Mapping[str, Any], field: str) -> str | None:
    alias = part.get("uuid")
    if alias is not None and not (isinstance(alias, str) and _ALIAS.fullmatch(alias)):
        raise InvalidRequestError("uuid must be 1 to 128 of the characters A-Z a-z 0-9 . _ : -", param=f"{field}.uuid")
    return alias


def _parse_content_hash(image: Mapping[str, Any], field: str) -> ContentHash | None:
    text = image.get("content_hash")
    if text is None:
        return None
    match = _CONTENT_HASH.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise InvalidRequestError(
            "content_hash must be the digest of the image's bytes in 64 hex digits: sha256:..., or blake3:... or no "
            "prefix for BLAKE3",
            param=field,
        )
    algorithm = cast(Literal["blake3", "sha256"], match["algorithm"] or "blake3")
    return ContentHash(algorithm, match["digest"].lower(), field)
