"""Messages of any API -> text and image bytes in the order in which the model sees them."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from common.config import ImageLimits
from common.errors import InvalidRequestError, PayloadTooLargeError
from common.identity import mm_hash

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Detail = Literal["auto", "low", "high", "original"]

# RFC 2397 with base64: data:image/png;charset=x;base64,....; scheme and type are case-insensitive
_DATA_URL = re.compile(r"data:(?P<type>[^;,]*)(?P<parameters>(?:;[^;,]*)*),(?P<data>.*)", re.IGNORECASE | re.DOTALL)

_ALIAS = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_BLAKE3 = re.compile(r"[0-9A-Fa-f]{64}")


@dataclass(frozen=True, slots=True)
class ImagePart:
    """`field` is where the image stood in the request, for error messages; `alias` is its `uuid`, if it has one."""

    data: bytes
    detail: Detail
    field: str
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image that is in the media store already, by its id or by an alias; `field` is where the name stood."""

    name: str
    is_alias: bool
    detail: Detail
    field: str
    content_hash: str | None = None


AnyImagePart = ImagePart | MediaPart


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: list[str | AnyImagePart]

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))

    def for_template(self, *, string_content: bool = True) -> dict[str, Any]:
        """What chat templates expect: parts in which an image is a bare marker, or the text as a string."""
        if string_content and all(isinstance(part, str) for part in self.content):
            return {"role": self.role, "content": self.text}
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in self.content
        ]
        return {"role": self.role, "content": parts}


def parse_messages(messages: Sequence[Mapping[str, Any]], limits: ImageLimits) -> list[ChatMessage]:
    """Raises InvalidRequestError with the path of the first field that is wrong."""
    if not messages:
        raise InvalidRequestError("messages must not be empty", param="messages")
    parsed = [_parse_message(message, f"messages[{index}]", limits) for index, message in enumerate(messages)]
    num_images = len(images_of(parsed))
    if num_images > limits.max_images:
        raise InvalidRequestError(
            f"{num_images} images were sent, the limit is {limits.max_images} (limits.max_images)",
            param="messages",
            code="too_many_images",
        )
    return parsed


def images_of(messages: Sequence[ChatMessage]) -> list[AnyImagePart]:
    return [part for message in messages for part in message.content if not isinstance(part, str)]


def decode_data_url(url: str, field: str, limits: ImageLimits) -> bytes:
    """The bytes of a base64 `data:` URL whose type is an image's. What the bytes really hold is found out later."""
    match = _DATA_URL.fullmatch(url.strip())
    if match is None:
        raise InvalidRequestError(
            "images are sent as data URLs (data:image/png;base64,...); fetching other URLs is off",
            param=field,
            code="invalid_image_url",
        )
    if not match["type"].strip().lower().startswith("image/"):
        raise InvalidRequestError(
            f"the data URL has the type {match['type'][:64]!r}, not an image's", param=field, code="invalid_image_url"
        )
    if ";base64" not in match["parameters"].lower():
        raise InvalidRequestError("the data URL is not base64", param=field, code="invalid_base64")
    if len(match["data"]) > limits.max_image_bytes * 4 // 3 + 4:
        raise PayloadTooLargeError(
            f"the image has more than {limits.max_image_bytes} bytes (limits.max_image_bytes)",
            param=field,
            code="image_too_large",
        )
    try:
        return base64.b64decode("".join(match["data"].split()), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InvalidRequestError("the data URL is not valid base64", param=field, code="invalid_base64") from exc


def _parse_message(message: Mapping[str, Any], field: str, limits: ImageLimits) -> ChatMessage:
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequestError(f"role must be one of {sorted(ROLES)}, not {role!r}", param=f"{field}.role")
    content = message.get("content")
    if content is None and role == "assistant":
        return ChatMessage(role=role, content=[])
    if isinstance(content, str):
        return ChatMessage(role=ROLES[role], content=[_checked_text(content, f"{field}.content")])
    if not isinstance(content, list):
        raise InvalidRequestError("content must be a string or a list of parts", param=f"{field}.content")
    parts = [_parse_part(part, f"{field}.content[{index}]", limits) for index, part in enumerate(content)]
    return ChatMessage(role=ROLES[role], content=parts)


def _parse_part(part: object, field: str, limits: ImageLimits) -> str | AnyImagePart:
    if not isinstance(part, Mapping):
        raise InvalidRequestError("a content part must be an object", param=field)
    match part.get("type"):
        case "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise InvalidRequestError("text must be a string", param=f"{field}.text")
            return _checked_text(text, f"{field}.text")
        case "image_url":
            return _parse_image(part, field, limits)
        case "image_ref":
            return _parse_reference(part, field)
        case other:
            raise InvalidRequestError(
                f"content parts of type {other!r} are not supported; supported are 'text', 'image_url' and 'image_ref'",
                param=f"{field}.type",
                code="unsupported_content_part",
            )


def _checked_text(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidRequestError("text must be valid Unicode, without lone surrogates", param=field) from exc
    return text


def _parse_image(part: Mapping[str, Any], field: str, limits: ImageLimits) -> AnyImagePart:
    alias = part.get("uuid")
    if alias is not None and not (isinstance(alias, str) and _ALIAS.fullmatch(alias)):
        raise InvalidRequestError("uuid must be 1 to 128 of the characters A-Z a-z 0-9 . _ : -", param=f"{field}.uuid")
    image = part.get("image_url")
    if image is None and alias is not None:
        image = {}
    if not isinstance(image, Mapping):
        raise InvalidRequestError('image_url must be an object with a string "url"', param=f"{field}.image_url")
    detail = _parse_detail(image, f"{field}.image_url")
    content_hash = image.get("content_hash")
    if content_hash is not None and not (isinstance(content_hash, str) and _BLAKE3.fullmatch(content_hash)):
        raise InvalidRequestError(
            "content_hash must be the BLAKE3 of the image's bytes, 64 hex digits",
            param=f"{field}.image_url.content_hash",
        )
    if image.get("url") is None and alias is not None:
        return MediaPart(alias, is_alias=True, detail=detail, field=f"{field}.uuid", content_hash=content_hash)
    if not isinstance(image.get("url"), str):
        raise InvalidRequestError('image_url must be an object with a string "url"', param=f"{field}.image_url")
    data = decode_data_url(image["url"], f"{field}.image_url.url", limits)
    check_content_hash(content_hash, mm_hash(data) if content_hash else "", f"{field}.image_url.content_hash")
    return ImagePart(data=data, detail=detail, field=f"{field}.image_url.url", alias=alias)


def check_content_hash(expected: str | None, found: str, field: str) -> None:
    """Raises InvalidRequestError unless the digest that a caller expects is the one of the bytes."""
    if expected is not None and expected.lower() != found:
        raise InvalidRequestError(
            f"the image's bytes have the BLAKE3 {found}, not {expected}", param=field, code="content_hash_mismatch"
        )


def _parse_reference(part: Mapping[str, Any], field: str) -> MediaPart:
    media_id = part.get("media_id")
    if not isinstance(media_id, str):
        raise InvalidRequestError("media_id must be a string", param=f"{field}.media_id")
    detail = _parse_detail(part, field)
    return MediaPart(media_id, is_alias=False, detail=detail, field=f"{field}.media_id")


def _parse_detail(source: Mapping[str, Any], field: str) -> Detail:
    detail = source.get("detail") or "auto"
    if detail not in get_args(Detail):
        raise InvalidRequestError(
            f"detail must be one of {list(get_args(Detail))}, not {detail!r}", param=f"{field}.detail"
        )
    return cast(Detail, detail)
