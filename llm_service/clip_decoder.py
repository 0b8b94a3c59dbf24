"""Decodes the frames of a clip that are asked for, as a process of its own: decoders get bytes from anybody.

    python clip_decoder.py '{"sampling": {...}, "limits": {..., "max_frame_pixels": ...}}' < clip > frames

What it writes is the pixels of the frames, 3 bytes for each, then what it says of them in JSON, then the length of
that as 4 bytes. A clip that takes more memory or time than it may ends this process and no other. It is run as a
script, so it imports nothing of ours.
"""

import io
import json
import math
import resource
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, BinaryIO, Protocol

import av
from PIL import Image

CODECS = ("h264", "hevc", "av1", "vp8", "vp9", "ffv1")
FORMATS = "MP4, WebM, animated GIF or WebP"

_DAMAGED = "the clip is truncated or damaged"
_MAX_ADDRESS_SPACE = 2 * 1024**3
_FRAME_MS = 100  # what browsers make of frames without a duration
_UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}

Draw = Callable[[], Image.Image]


class Refused(Exception):
    """The message is for the caller."""

    def __init__(self, message: str, code: str = "invalid_video") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Schedule:
    """When frames are shown, in seconds from the first one, and when the last one ends; `tick` is the clock's step."""

    times: Sequence[Fraction]
    end: Fraction
    tick: Fraction


@dataclass(frozen=True, slots=True)
class Samples:
    """The times at which frames are taken, and how many these are in a second."""

    times: Sequence[Fraction]
    fps: Fraction


class Source(Protocol):
    """`size` is width and height before frames are turned upright; `frames()` has each one's time, and draws it if
    asked to."""

    size: tuple[int, int]

    def schedule(self) -> Schedule: ...

    def frames(self) -> Iterator[tuple[Fraction, Draw]]: ...


class Container:
    """MP4 or WebM, through FFmpeg. Only the demuxer for its first bytes is used, so that it names no other file."""

    def __init__(self, data: bytes, format: str, limits: dict[str, Any]) -> None:
        self._data, self._format, self._limits = data, format, limits
        with self._open() as container:
            stream = self._stream(container)
            codec = stream.codec_context.codec.canonical_name
            if codec not in CODECS:
                raise Refused(f"the clip's codec is {codec!r}; supported are {', '.join(CODECS)}")
            self.size = stream.codec_context.width, stream.codec_context.height
            self._start = Fraction(0)

    def schedule(self) -> Schedule:
        with self._open() as container:
            stream = self._stream(container)
            packets, num_packets = [], 0
            for packet in container.demux(stream):
                time = packet.pts if packet.pts is not None else packet.dts
                if time is None:  # the last one, which only says that there are no more
                    continue
                if packet.is_corrupt:
                    raise Refused(_DAMAGED)
                num_packets += 1
                check_number(num_packets, self._limits)
                if not packet.is_discard:  # cut away by an edit list
                    packets.append((time, packet.duration or 0))
            if self._format == "mp4" and num_packets < len(stream.index_entries):  # less than an edit list has left
                raise Refused(_DAMAGED)
            if not packets:
                raise Refused("the clip has no frames")
            packets.sort()
            tick = stream.time_base
            self._start = packets[0][0] * tick
            last, duration = packets[-1]
            if not duration and len(packets) > 1:
                duration = last - packets[-2][0]
            times = [time * tick - self._start for time, _ in packets]
            return Schedule(times, (last + duration) * tick - self._start, tick)

    def frames(self) -> Iterator[tuple[Fraction, Draw]]:
        with self._open() as container:
            stream = self._stream(container)
            for frame in container.decode(stream):
                if frame.is_corrupt or frame.pts is None:
                    raise Refused(_DAMAGED)
                yield frame.pts * stream.time_base - self._start, partial(upright, frame)

    def _open(self) -> Any:
        return av.open(io.BytesIO(self._data), format=self._format)

    def _stream(self, container: Any) -> Any:
        if not container.streams.video or container.streams.video[0].codec_context is None:
            raise Refused("the clip has no video track that can be decoded")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(self._limits["max_frame_pixels"])}
        return stream


class Animation:
    """GIF or WebP, through Pillow."""

    def __init__(self, data: bytes, limits: dict[str, Any]) -> None:
        self._data, self._limits = data, limits
        self.size = self._open().size

    def schedule(self) -> Schedule:
        num_frames: int = getattr(self._open(), "n_frames", 1)  # what finds it out decodes nothing
        check_number(num_frames, self._limits)
        check_pixels(self.size, num_frames, self._limits, "max_decoded_pixels")
        times, end = [], Fraction(0)
        for image in self._images():
            times.append(end)
            end += self._seconds(image)
            check_seconds(end, self._limits)  # at once: what says when frames are shown decodes them
        return Schedule(times, end, Fraction(1, 1000))

    def frames(self) -> Iterator[tuple[Fraction, Draw]]:
        time = Fraction(0)
        for image in self._images():
            yield time, partial(on_white, image.copy())
            time += self._seconds(image)

    def _seconds(self, image: Image.Image) -> Fraction:
        return Fraction(int(image.info.get("duration") or _FRAME_MS), 1000)

    def _open(self) -> Image.Image:
        return Image.open(io.BytesIO(self._data), formats=("GIF", "WEBP"))

    def _images(self) -> Iterator[Image.Image]:
        """The one object, at one frame after another."""
        image = self._open()
        while True:
            image.load()  # durations of WebP are known then
            yield image
            try:
                image.seek(image.tell() + 1)
            except EOFError:
                return


def open_source(data: bytes, limits: dict[str, Any]) -> Source:
    Image.MAX_IMAGE_PIXELS = None  # the limit is ours, and its message has the size
    if data[4:8] == b"ftyp":
        return Container(data, "mp4", limits)
    if data[:4] == b"\x1aE\xdf\xa3":
        return Container(data, "matroska", limits)
    if data[:6] in (b"GIF87a", b"GIF89a") or (data[:4], data[8:12]) == (b"RIFF", b"WEBP"):
        return Animation(data, limits)
    raise Refused(f"the data is not a clip of a supported format ({FORMATS})")


def choose(schedule: Schedule, sampling: dict[str, Any], limits: dict[str, Any]) -> Samples:
    """With `fps` samples do not depend on what follows, so that a clip that grows keeps its own; `num_frames`, and
    `max_frames` where there would be more, are spread evenly. There are at most as many as the clip has frames.
    """
    num_frames = len(schedule.times)
    if sampling["num_frames"] is not None:
        return spread(schedule.times, min(sampling["num_frames"], num_frames), schedule)
    fps = Fraction(sampling["fps"])
    # The end is rounded to the clock's step: a sample there would be a second one of the last frame.
    number = max(1, math.ceil((schedule.end - schedule.tick) * fps))
    if number <= num_frames:
        samples = Samples([index / fps for index in range(number)], fps)
    else:
        samples = spread(schedule.times, num_frames, schedule)
    if sampling["max_frames"] is not None and len(samples.times) > sampling["max_frames"]:
        return spread(samples.times, sampling["max_frames"], schedule)
    if len(samples.times) > limits["max_frames"]:
        raise Refused(
            f"the clip gives {len(samples.times)} frames at {sampling['fps']:g} fps, the limit is "
            f"{limits['max_frames']} (limits.video.max_frames): send a lower fps, or max_frames",
            "video_too_long",
        )
    return samples


def spread(times: Sequence[Fraction], number: int, schedule: Schedule) -> Samples:
    """`number` of them from the first on, as transformers' Qwen2-VL video processor spreads them."""
    chosen = [times[index * len(times) // number] for index in range(number)]
    return Samples(chosen, number / schedule.end if schedule.end else Fraction(1))


def shown_at(times: Sequence[Fraction], source: Source, tick: Fraction) -> Iterator[tuple[list[Fraction], Draw]]:
    """Each frame that is shown at some of these times, with those times."""
    remaining = deque(times)
    shown: Draw | None = None
    for time, draw in source.frames():
        due = []
        while shown is not None and remaining and remaining[0] < time - tick / 2:  # WebM rounds times to milliseconds
            due.append(remaining.popleft())
        if shown is not None and due:
            yield due, shown
        if not remaining:
            return
        shown = draw
    if shown is not None:
        yield list(remaining), shown


def check_number(num_frames: int, limits: dict[str, Any]) -> None:
    if num_frames > limits["max_decoded_frames"]:
        raise Refused(
            f"the clip has {num_frames} frames or more, the limit is {limits['max_decoded_frames']} "
            "(limits.video.max_decoded_frames)",
            "video_too_long",
        )


def check_seconds(seconds: Fraction, limits: dict[str, Any]) -> None:
    if seconds > limits["max_seconds"]:
        raise Refused(
            f"the clip lasts {float(seconds):.1f} s or more, the limit is {limits['max_seconds']:g} s "
            "(limits.video.max_seconds)",
            "video_too_long",
        )


def check_frame(size: tuple[int, int], limits: dict[str, Any]) -> None:
    width, height = size
    if width * height > limits["max_frame_pixels"]:
        raise Refused(
            f"the clip has frames of {width} x {height} = {width * height} pixels, the limit is "
            f"{limits['max_frame_pixels']} (limits.max_image_pixels)",
            "video_too_large",
        )


def check_pixels(size: tuple[int, int], num_frames: int, limits: dict[str, Any], name: str) -> None:
    width, height = size
    if width * height * num_frames > limits[name]:
        kind = "sampled frames" if name == "max_sampled_pixels" else "frames"
        raise Refused(
            f"the clip has {num_frames} {kind} of {width} x {height} pixels, the limit is {limits[name]} pixels "
            f"together (limits.video.{name})",
            "video_too_large",
        )


def upright(frame: Any) -> Image.Image:
    """Turned as the container says it is to be displayed."""
    plane = frame.reformat(format="rgb24").planes[0]
    image = Image.frombuffer("RGB", (plane.width, plane.height), bytes(plane), "raw", "RGB", plane.line_size, 1)
    turn = _UPRIGHT.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)


def on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def decode(data: bytes, sampling: dict[str, Any], limits: dict[str, Any], out: BinaryIO) -> dict[str, Any]:
    """Writes the frames and returns what there is to say of them. All limits are checked before a frame of a container
    is decoded; of an animation those on durations and on samples meanwhile.
    """
    source = open_source(data, limits)
    check_frame(source.size, limits)
    schedule = source.schedule()
    check_seconds(schedule.end, limits)
    samples = choose(schedule, sampling, limits)
    check_pixels(source.size, len(samples.times), limits, "max_sampled_pixels")
    check_pixels(source.size, sum(time <= samples.times[-1] for time in schedule.times), limits, "max_decoded_pixels")
    times, sizes = [], set()
    for due, draw in shown_at(samples.times, source, schedule.tick):
        image = draw()
        sizes.add(image.size)
        if len(sizes) > 1 or image.width * image.height != source.size[0] * source.size[1]:
            raise Refused("the clip's frames change their size")
        pixels = image.tobytes()
        for time in due:
            out.write(pixels)
            times.append(float(time))
    if not times:
        raise Refused("the clip has no frames")
    ((width, height),) = sizes
    return {"width": width, "height": height, "times": times, "fps": float(samples.fps)}


def main() -> None:
    asked = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE, _MAX_ADDRESS_SPACE))
    av.logging.set_level(None)
    data, out = sys.stdin.buffer.read(), sys.stdout.buffer
    try:
        found = decode(data, asked["sampling"], asked["limits"], out)
    except Refused as exc:
        found = {"error": str(exc), "code": exc.code}
    except MemoryError:
        found = {"error": "the clip needs too much memory to be decoded", "code": "video_too_large"}
    except Exception:  # decoders raise anything, and their text is not passed on
        found = {"error": _DAMAGED, "code": "invalid_video"}
    trailer = json.dumps(found).encode()
    out.write(trailer + struct.pack("<I", len(trailer)))


if __name__ == "__main__":
    main()
