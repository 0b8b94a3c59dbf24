"""Clips for tests: frames, files of them, and content parts."""

import asyncio
import io
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
from PIL import Image

from common.config import ImageLimits
from llm_service.clips import Clip, ClipDecoder
from llm_service.video_parts import Sampling
from tests.services import data_url

LOSSLESS = {"format": "mp4", "codec": "libx264rgb", "pixel_format": "rgb24", "crf": "0", "preset": "ultrafast"}
FFV1 = {"format": "matroska", "codec": "ffv1", "pixel_format": "bgr0"}
WEBM = {"format": "webm", "codec": "libvpx-vp9", "pixel_format": "yuv420p", "deadline": "realtime", "cpu-used": "8"}


def frames(number: int, first: int = 0, height: int = 56, width: int = 84) -> list[Image.Image]:
    """Smooth random pictures; frame `n` is the same in every clip."""
    coarse = [
        np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8) for seed in range(first, first + number)
    ]
    return [Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC) for one in coarse]


def video(
    shown: Sequence[Image.Image], *, format: str, codec: str, pixel_format: str, fps: int = 30, **options: str
) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height = shown[0].size
        stream.pix_fmt = pixel_format
        for image in shown:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def animation(
    shown: Sequence[Image.Image], format: str, duration_ms: int | Sequence[int] = 100, **options: Any
) -> bytes:
    buffer = io.BytesIO()
    shown[0].save(buffer, format, save_all=True, append_images=shown[1:], duration=duration_ms, **options)
    return buffer.getvalue()


def frames_part(shown: Sequence[Image.Image], **fields: Any) -> dict[str, Any]:
    return {"type": "video", "video": [data_url(png(image)) for image in shown], **fields}


def video_part(data: bytes, media_type: str = "video/mp4", **fields: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(data, media_type)}, **fields}


def clip_of_file(data: bytes, sampling: Sampling, limits: ImageLimits) -> Clip:
    return asyncio.run(ClipDecoder(limits)(data, sampling))
