"""Clips as requests send them: one file, or images that are frames. Nothing is decoded here.

`video_url` has a data URL of an MP4, WebM, animated GIF or WebP, or as vLLM's clients send it one of `video/jpeg` with
the base64 of frames between commas; `video` has a list of images, as Qwen's API takes it. Beside them stand `fps`,
`num_frames`, `max_frames` and `detail`. Of a file `fps` is how many frames are taken in a second, of frames how many
there were.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.config import ImageLimits, VideoLimits
from common.errors import InvalidRequestError
from llm_service.image_parts import (
    AnyImagePart,
    Detail,
    ImagePart,
    UrlPart,
    decode_base64,
    image_of_url,
    parse_detail,
    split_data_url,
)

DEFAULT_FPS = 2.0  # Qwen's
_MIN_FPS, _MAX_FPS = 0.001, 240.0
_ANIMATIONS = ("image/gif", "image/webp")
_LISTS = ("video/jpeg", "video/png", "video/webp")


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames of a clip are taken, the first one always: so many in a second, or so many in all."""

    fps: float = DEFAULT_FPS
    num_frames: int | None = None
    max_frames: int | None = None


# Compared by identity, so that what was decoded can be kept as long as the request that sent it.
@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class VideoPart:
    """A clip in one file; `field` is where it stood in the request."""

    data: bytes
    sampling: Sampling
    detail: Detail
    field: str


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class FramesPart:
    """A clip whose frames are images; some may have to be fetched."""

    frames: tuple[ImagePart | UrlPart, ...]
    sampling: Sampling
    detail: Detail
    field: str


ClipPart = VideoPart | FramesPart
VisualPart = AnyImagePart | ClipPart


def parse_video_part(part: Mapping[str, Any], field: str, limits: ImageLimits) -> ClipPart:
    """A content part `video_url` or `video`."""
    sampling = _parse_sampling(part, field, limits.video)
    detail = parse_detail(part, field)
    kind = str(part["type"])
    video = part.get(kind)
    where = f"{field}.{kind}"
    url = video
    if kind == "video_url":
        url = video.get("url") if isinstance(video, Mapping) else None
    if isinstance(url, str):
        return _clip_of_url(url, sampling, detail, where + ".url" * (kind == "video_url"), limits)
    if kind == "video" and isinstance(video, list):
        _check_number(len(video), where, limits.video)
        urls = [(url, f"{where}[{index}]") for index, url in enumerate(video)]
        frames = tuple(_frame_of_url(url, place, limits) for url, place in urls)
        return FramesPart(frames, sampling, detail, where)
    expected = (
        'an object with a string "url"' if kind == "video_url" else "a list of images' URLs, or the URL of a clip"
    )
    raise InvalidRequestError(f"{kind} must be {expected}", param=where, code="invalid_video_url")


def _clip_of_url(url: str, sampling: Sampling, detail: Detail, field: str, limits: ImageLimits) -> ClipPart:
    media_type, text = split_data_url(url, field, "video")
    if media_type in _LISTS:
        _check_number(text.count(",") + 1, field, limits.video)
        frames = [decode_base64(frame, field, limits) for frame in text.split(",")]
        return FramesPart(tuple(ImagePart(frame, detail, field) for frame in frames), sampling, detail, field)
    if not (media_type.startswith("video/") or media_type in _ANIMATIONS):
        raise InvalidRequestError(
            f"the data URL has the type {media_type[:64]!r}, not a clip's", param=field, code="invalid_video_url"
        )
    return VideoPart(decode_base64(text, field, limits, "video"), sampling, detail, field)


def _frame_of_url(url: object, field: str, limits: ImageLimits) -> ImagePart | UrlPart:
    if not isinstance(url, str):
        raise InvalidRequestError("a frame must be the URL of an image", param=field, code="invalid_video_url")
    return image_of_url(url, field, limits)


def _check_number(num_frames: int, field: str, limits: VideoLimits) -> None:
    if num_frames == 0:
        raise InvalidRequestError("the clip has no frames", param=field, code="invalid_video")
    if num_frames > limits.max_frames:
        raise InvalidRequestError(
            f"the clip has {num_frames} frames, the limit is {limits.max_frames} (limits.video.max_frames)",
            param=field,
            code="video_too_long",
        )


def _parse_sampling(part: Mapping[str, Any], field: str, limits: VideoLimits) -> Sampling:
    fps = part.get("fps")
    if fps is not None and not (type(fps) in (int, float) and _MIN_FPS <= fps <= _MAX_FPS):
        raise InvalidRequestError(
            f"fps must be a number from {_MIN_FPS:g} to {_MAX_FPS:g}, not {str(fps)[:64]}", param=f"{field}.fps"
        )
    num_frames, max_frames = (_parse_count(part, name, field, limits) for name in ("num_frames", "max_frames"))
    if num_frames is not None and max_frames is not None:
        raise InvalidRequestError("send either num_frames or max_frames", param=f"{field}.max_frames")
    if num_frames is not None and fps is not None and part.get("type") == "video_url":
        raise InvalidRequestError("send either fps or num_frames", param=f"{field}.num_frames")
    return Sampling(DEFAULT_FPS if fps is None else float(fps), num_frames, max_frames)


def _parse_count(part: Mapping[str, Any], name: str, field: str, limits: VideoLimits) -> int | None:
    number = part.get(name)
    if number is not None and not (type(number) is int and 1 <= number <= limits.max_frames):
        raise InvalidRequestError(
            f"{name} must be from 1 to {limits.max_frames} (limits.video.max_frames), not {str(number)[:64]}",
            param=f"{field}.{name}",
        )
    return number
