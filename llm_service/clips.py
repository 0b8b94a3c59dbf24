"""Clips -> their temporal grids: two frames each, which are encoded, cached and found again for themselves.

Frames that are images are hashed as sent and decoded by the encoder service. A file has to be decoded here, because the
frames are what its grids are known by: by a process of its own for each file, a few at once.
"""

import asyncio
import contextlib
import json
import logging
import struct
import subprocess
import sys
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from common.config import MIB, ImageLimits, VideoLimits
from common.errors import InvalidRequestError
from common.frames import FRAMES_PER_GRID, grid_hash, pack_files, pack_pixels
from common.geometry import PatchGeometry
from common.identity import framed_digest
from common.media import MediaItem, MediaParams, check_same_size, frame_size
from llm_service.admission import ANYONE, RequestContext
from llm_service.features import ImageRequest
from llm_service.image_parts import ImagePart, UrlPart, with_detail
from llm_service.placeholders import ClipShape
from llm_service.video_parts import ClipPart, FramesPart, Sampling

logger = logging.getLogger(__name__)

MAX_FRAME_TOKENS = 768  # VIDEO_MAX_TOKEN_NUM of Qwen's own vision utilities

_DECODER = Path(__file__).with_name("clip_decoder.py")
_LENGTH = struct.Struct("<I")
_CHUNK_BYTES = 4 * MIB
_MAX_FETCHES = 8  # of one clip at a time

Process = subprocess.Popen[bytes]
Fetch = Callable[[str, str, Callable[[int], None]], Awaitable[bytes]]  # as ImageFetcher.fetch
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FramePair:
    """The two frames of a temporal grid, packed, with their `mm_hash`; `timestamp` is the middle between them, in s."""

    data: bytes
    mm_hash: str
    timestamp: float


@dataclass(frozen=True, slots=True)
class Clip:
    """`height` and `width` of its frames in pixels, `fps` of those that were taken."""

    pairs: Sequence[FramePair]
    height: int
    width: int
    num_frames: int
    fps: float

    @property
    def num_bytes(self) -> int:
        return sum(len(pair.data) for pair in self.pairs)


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """A clip whose frames are known: what to encode, one item for each temporal grid, and what its positions follow
    from."""

    grids: Sequence[ImageRequest]
    num_frames: int
    shape: ClipShape

    @property
    def id(self) -> str:
        """Of what it shows, whatever its speed."""
        return framed_digest(*(grid.item.mm_hash for grid in self.grids))


Visual = ImageRequest | ClipRequest


def items_of(visuals: Sequence[Visual]) -> list[ImageRequest]:
    """Everything that is encoded, in order."""
    return [item for visual in visuals for item in (visual.grids if isinstance(visual, ClipRequest) else [visual])]


class ClipDecoder:
    """Decodes files, each in a process of its own, a few at once. Who no longer waits for a clip ends its process."""

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits
        self._free = asyncio.Semaphore(limits.video.decode_processes)
        self._pool = ThreadPoolExecutor(limits.video.decode_processes, thread_name_prefix="clips")

    async def __call__(self, data: bytes, sampling: Sampling, caller: RequestContext = ANYONE) -> Clip:
        """Raises InvalidRequestError, and UnavailableError where too much is held already."""
        async with self._free:
            output = await self._output(data, sampling, caller)
            clip = await self._in_pool(_clip_of_output, output)
        caller.hold("bytes", clip.num_bytes)
        caller.release("bytes", len(output))
        return clip

    async def _output(self, data: bytes, sampling: Sampling, caller: RequestContext) -> bytearray:
        """`caller` holds its bytes from the moment they are here."""
        video = self._limits.video
        process = self._start(sampling)
        try:
            async with asyncio.timeout(video.decode_timeout_s):
                await self._in_pool(_send, process, data)
                output = bytearray()
                while num_bytes := await self._in_pool(_read, process, output):
                    caller.hold("bytes", num_bytes)
        except TimeoutError as exc:
            raise InvalidRequestError(
                f"decoding the clip takes more than {video.decode_timeout_s:g} s (limits.video.decode_timeout_s)",
                code="video_too_large",
            ) from exc
        finally:
            process.kill()
            await self._in_pool(_close, process)
        if process.returncode < 0:
            logger.warning("the decoder of a clip ended by signal %d", -process.returncode)
            raise InvalidRequestError("the clip cannot be decoded", code="invalid_video")
        if process.returncode:
            raise RuntimeError(f"the decoder of clips ended with status {process.returncode}")
        return output

    def _start(self, sampling: Sampling) -> Process:
        asked = {
            "sampling": {"fps": sampling.fps, "num_frames": sampling.num_frames, "max_frames": sampling.max_frames},
            "limits": self._limits.video.model_dump() | {"max_frame_pixels": self._limits.max_image_pixels},
        }
        # -P: the script's folder is not searched for modules
        command = [sys.executable, "-P", str(_DECODER), json.dumps(asked)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    async def _in_pool(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)


class ClipLibrary:
    """Resolves the clips of requests, outside the event loop. What one part holds is read once, however many questions
    are about it, and kept until it is forgotten or the request has ended."""

    def __init__(
        self, geometry: PatchGeometry, params: MediaParams, limits: ImageLimits, max_pixels: int | None
    ) -> None:
        """`params` are those of an image. `max_pixels` of a frame: the budget never depends on a clip's length, so that
        features do not."""
        max_pixels = max_pixels or min(
            params.max_pixels, MAX_FRAME_TOKENS * (geometry.patch_size * geometry.merge_size) ** 2
        )
        min_pixels = min(params.min_pixels, max_pixels)
        self._geometry = geometry
        self._params = MediaParams(min_pixels, max_pixels, frames=FRAMES_PER_GRID, reduction=params.reduction)
        self._limits = limits
        self._decode = ClipDecoder(limits)
        self._read: weakref.WeakKeyDictionary[ClipPart, Clip] = weakref.WeakKeyDictionary()

    async def resolve(self, part: ClipPart, fetch: Fetch, caller: RequestContext) -> ClipRequest:
        """Raises InvalidRequestError, and UnavailableError where too much is held already."""
        params = with_detail(self._params, part.detail)
        try:
            clip = await self._clip(part, fetch, caller)
            grid = params.grid(self._geometry, clip.height, clip.width)
        except InvalidRequestError as exc:
            raise type(exc)(exc.message, param=exc.param or part.field, code=exc.code) from exc
        items = [MediaItem(pair.data, pair.mm_hash, params, caller.tenant, caller.deadline) for pair in clip.pairs]
        shape = ClipShape(
            grid_thw=(len(items), *grid[1:]),
            seconds_per_grid=FRAMES_PER_GRID / clip.fps,
            timestamps=tuple(pair.timestamp for pair in clip.pairs),
        )
        return ClipRequest([ImageRequest(item, grid, part.field) for item in items], clip.num_frames, shape)

    async def _clip(self, part: ClipPart, fetch: Fetch, caller: RequestContext) -> Clip:
        clip = self._read.get(part)
        if clip is None:
            if isinstance(part, FramesPart):
                clip = await self._clip_of_frames(part, fetch, caller)
            else:
                clip = await self._decode(part.data, part.sampling, caller)
            self._read[part] = clip
        return clip

    async def _clip_of_frames(self, part: FramesPart, fetch: Fetch, caller: RequestContext) -> Clip:
        """Only those that are taken are fetched, a few at once."""
        window = asyncio.Semaphore(_MAX_FETCHES)
        num_fetched_bytes = 0

        def note(num_bytes: int) -> None:
            nonlocal num_fetched_bytes
            caller.hold("bytes", num_bytes)
            num_fetched_bytes += num_bytes

        async def bytes_of(frame: ImagePart | UrlPart) -> bytes:
            if isinstance(frame, ImagePart):
                return frame.data
            async with window:
                return await fetch(frame.url, frame.field, note)

        indices = chosen_frames(len(part.frames), part.sampling, self._limits.video)
        tasks = [asyncio.create_task(bytes_of(part.frames[index])) for index in indices]
        try:
            images = dict(zip(indices, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        clip = await asyncio.to_thread(clip_of_images, images, len(part.frames), part.sampling.fps, self._limits)
        caller.hold("bytes", clip.num_bytes)
        caller.release("bytes", num_fetched_bytes)
        return clip

    def forget(self, part: ClipPart, caller: RequestContext) -> None:
        """Gives back what `caller` holds of it."""
        clip = self._read.pop(part, None)
        if clip is not None:
            caller.release("bytes", clip.num_bytes)


def chosen_frames(num_sent: int, sampling: Sampling, limits: VideoLimits) -> list[int]:
    """Of a clip that is sent as frames. Raises InvalidRequestError for one that lasts too long."""
    seconds = num_sent / sampling.fps
    if seconds > limits.max_seconds:
        raise InvalidRequestError(
            f"the clip lasts {seconds:.1f} s, the limit is {limits.max_seconds:g} s (limits.video.max_seconds)",
            code="video_too_long",
        )
    number = min(sampling.num_frames or sampling.max_frames or num_sent, num_sent)
    return [index * num_sent // number for index in range(number)]


def clip_of_images(images: Mapping[int, bytes], num_sent: int, fps: float, limits: ImageLimits) -> Clip:
    """Of some of the frames that were sent, by their indices. Nothing is decoded."""
    sizes = [_size_of(image, index, limits) for index, image in images.items()]
    for size in sizes:
        check_same_size(sizes[0], size)
    frames = [(image, index / fps) for index, image in images.items()]
    pairs = [(frames[one], frames[other]) for one, other in _pairs(len(frames))]
    return Clip(
        [_pair(pack_files(one, other), start, end) for (one, start), (other, end) in pairs],
        *sizes[0],
        len(frames),
        fps * len(frames) / num_sent,
    )


def _size_of(image: bytes, index: int, limits: ImageLimits) -> tuple[int, int]:
    try:
        return frame_size(image, limits)
    except InvalidRequestError as exc:
        raise type(exc)(f"frame {index}: {exc.message}", code=exc.code) from exc


def _send(process: Process, data: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # it may have ended already
        process.stdin.write(data)


def _read(process: Process, output: bytearray) -> int:
    """Adds what comes next and returns its length; 0 when the process has ended."""
    assert process.stdout is not None
    chunk = process.stdout.read(_CHUNK_BYTES)
    if not chunk:
        process.wait()
    output += chunk
    return len(chunk)


def _close(process: Process) -> None:
    """Of one that has ended, or was killed."""
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _clip_of_output(output: bytearray) -> Clip:
    (length,) = _LENGTH.unpack(output[-_LENGTH.size :])
    end = len(output) - _LENGTH.size - length
    found = json.loads(output[end : -_LENGTH.size])
    if "error" in found:
        raise InvalidRequestError(found["error"], code=found["code"])
    height, width, times = found["height"], found["width"], found["times"]
    pixels = memoryview(output)[:end]
    frame_bytes = height * width * 3
    frames = [pixels[index * frame_bytes : (index + 1) * frame_bytes] for index in range(len(times))]
    pairs = [
        (pack_pixels(frames[one], frames[other], height=height, width=width), times[one], times[other])
        for one, other in _pairs(len(times))
    ]
    return Clip([_pair(*pair) for pair in pairs], height, width, len(times), found["fps"])


def _pair(data: bytes, first: float, second: float) -> FramePair:
    return FramePair(data, grid_hash(data), (first + second) / 2)


def _pairs(num_frames: int) -> list[tuple[int, int]]:
    """The frames of each grid. An odd clip repeats its last one, as Qwen's video processors do."""
    return [(index, min(index + 1, num_frames - 1)) for index in range(0, num_frames, FRAMES_PER_GRID)]
