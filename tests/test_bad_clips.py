"""Clips that are damaged, hostile or above a limit are 400s that say what and which limit, and the service goes on."""

import asyncio
import base64
import json
import math
import re
import struct
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from common.config import ImageLimits, VideoLimits
from common.errors import InvalidRequestError
from llm_service import clips
from llm_service.clip_decoder import Animation, Refused, open_source
from llm_service.video_parts import Sampling
from tests.clips import FFV1, LOSSLESS, WEBM, animation, clip_of_file, frames, frames_part, png, video, video_part
from tests.services import URL, Services, body, data_url, image_part

MP4 = video(frames(6), **LOSSLESS)
MJPEG = {"format": "matroska", "codec": "mjpeg", "pixel_format": "yuvj420p"}
GIF = animation(frames(4), "GIF")
STILL = data_url(png(frames(1)[0]))


async def refusal(http: httpx2.AsyncClient, part: dict[str, Any]) -> tuple[int, str, str]:
    answer = await http.post(URL, content=json.dumps(body(part, "What?")), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


def audio_only() -> bytes:
    """An MP4 whose video track says that it is sound."""
    return MP4.replace(b"vide", b"soun")


def in_header(data: bytes, box: bytes, offset: int, value: int) -> bytes:
    """With another 32-bit number behind the name of a box."""
    place = data.index(box, data.index(b"moov")) + 4 + offset
    return data[:place] + struct.pack(">I", value) + data[place + 4 :]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (video_part(b""), "not a clip of a supported format"),
        (video_part(b"not a clip at all"), r"supported format \(MP4, WebM, animated GIF or WebP\)"),
        (video_part(png(frames(1)[0])), "supported format"),
        (video_part(MP4[: len(MP4) // 2]), "truncated or damaged"),
        (video_part(video(frames(6), movflags="faststart", **LOSSLESS)[:-3000]), "truncated or damaged"),
        (video_part(MP4[:64] + bytes(len(MP4) - 64)), "truncated or damaged|no video track"),
        (video_part(audio_only()), "no video track|truncated or damaged"),
        (video_part(video(frames(2), **MJPEG), "video/webm"), "codec is 'mjpeg'; supported are h264"),
        (video_part(GIF[:40], "image/gif"), "truncated or damaged"),
        (
            frames_part([*frames(2), *frames(1, height=84, width=56)]),
            "one size: one has 84 x 56 pixels, another 56 x 84",
        ),
        ({"type": "video", "video": [data_url(b"no image")]}, "not an image"),
    ],
)
async def test_bytes_that_are_no_clip_are_refused(http: httpx2.AsyncClient, part: dict[str, Any], words: str) -> None:
    status, param, message = await refusal(http, part)
    assert status == 400 and param.startswith("messages[0].content[0].video")
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"fps": 0}, "fps", "from 0.001 to 240"),
        ({"fps": -1}, "fps", "from 0.001 to 240"),
        ({"fps": math.nan}, "fps", "from 0.001 to 240"),
        ({"fps": math.inf}, "fps", "from 0.001 to 240"),
        ({"fps": 1e9}, "fps", "from 0.001 to 240"),
        ({"fps": 1e-300}, "fps", "from 0.001 to 240"),
        ({"fps": 10**400}, "fps", "from 0.001 to 240"),
        ({"fps": "2"}, "fps", "number"),
        ({"fps": True}, "fps", "number"),
        ({"num_frames": 0}, "num_frames", r"from 1 to 128 (limits.video.max_frames)"),
        ({"num_frames": 10**6}, "num_frames", r"from 1 to 128 (limits.video.max_frames)"),
        ({"max_frames": 1.5}, "max_frames", r"from 1 to 128 (limits.video.max_frames)"),
        ({"num_frames": 2, "max_frames": 2}, "max_frames", "either"),
        ({"num_frames": 2, "fps": 2}, "num_frames", "either"),
        ({"detail": "ultra"}, "detail", "one of"),
        ({"video_url": "x"}, "video_url", "must be an object"),
        ({"video_url": {"url": 1}}, "video_url", "must be an object"),
        ({"video_url": {"url": "https://example.org/a.mp4"}}, "video_url.url", "data URL"),
        ({"video_url": {"url": data_url(MP4, "image/png")}}, "video_url.url", "not a clip's"),
        ({"video_url": {"url": "data:video/mp4;base64,***"}}, "video_url.url", "not valid base64"),
        ({"type": "video", "video": []}, "video", "no frames"),
        ({"type": "video", "video": [1]}, "video[0]", "URL of an image"),
        (
            {"type": "video", "video": [STILL] * 4, "fps": 0.002},
            "video",
            "lasts 2000.0 s, the limit",
        ),
        (
            {"type": "video", "video": [STILL, data_url(b"")]},
            "video",
            "frame 1: the image has 0 bytes",
        ),
        ({"type": "video", "video": [data_url(b"")] * 129}, "video", "129 frames, the limit is 128 (limits.video"),
        (
            {"video_url": {"url": "data:video/jpeg;base64," + "," * 128}},
            "video_url.url",
            "129 frames, the limit is 128",
        ),
    ],
)
async def test_fields_that_say_nothing_possible_are_refused_by_name(
    http: httpx2.AsyncClient, fields: dict[str, Any], param: str, words: str
) -> None:
    status, where, message = await refusal(http, video_part(MP4) | fields)
    assert (status, where) == (400, f"messages[0].content[0].{param}") and words in message


async def test_too_many_clips_and_images_are_counted_apart(http: httpx2.AsyncClient) -> None:
    clip, image = frames_part(frames(2)), image_part(png(frames(1)[0]))
    answer = await http.post(URL, json=body(*[image] * 16, *[clip] * 4, "What?"))
    assert answer.status_code == 200
    answer = await http.post(URL, json=body(*[clip] * 5, "What?"))
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "5 clips were sent, the limit is 4 (limits.video.max_clips)",
    )


def limited(**limits: Any) -> ImageLimits:
    return ImageLimits(video=VideoLimits(**limits))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (limited(max_seconds=0.1), "lasts 0.2 s or more, the limit is 0.1 s (limits.video.max_seconds)"),
        (limited(max_frames=5), "gives 6 frames at 30 fps, the limit is 5 (limits.video.max_frames)"),
        (limited(max_decoded_frames=5), "6 frames or more, the limit is 5 (limits.video.max_decoded_frames)"),
        (limited(max_decoded_pixels=20_000), "6 frames of 84 x 56 pixels, the limit is 20000 pixels together"),
        (limited(max_sampled_pixels=20_000), "6 sampled frames of 84 x 56 pixels, the limit is 20000"),
        (ImageLimits(max_image_pixels=4000), "84 x 56 = 4704 pixels, the limit is 4000 (limits.max_image_pixels)"),
        (limited(decode_timeout_s=0.01), "more than 0.01 s (limits.video.decode_timeout_s)"),
    ],
)
def test_limit_is_named_with_both_numbers(limits: ImageLimits, words: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        clip_of_file(MP4, Sampling(fps=30.0), limits)
    assert words in raised.value.message


def test_animation_that_lasts_too_long_is_decoded_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    data = animation(frames(30, height=28, width=28), "WEBP", duration_ms=100, lossless=True)
    limits = VideoLimits(max_seconds=1).model_dump() | {"max_frame_pixels": 10_000}
    seen = []
    seconds = Animation._seconds
    monkeypatch.setattr(Animation, "_seconds", lambda *asked: seen.append(1) or seconds(*asked))
    with pytest.raises(Refused, match=r"lasts 1.1 s or more, the limit is 1 s \(limits.video.max_seconds\)"):
        open_source(data, limits).schedule()
    assert len(seen) == 11


async def test_file_above_the_byte_limit_is_refused_before_it_is_decoded(http: httpx2.AsyncClient) -> None:
    too_long = "A" * (21 * 2**20 * 4 // 3)
    part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{too_long}"}}
    answer = await http.post(URL, json=body(part, "What?"))
    assert answer.status_code == 413 and "limits.video.max_bytes" in answer.json()["error"]["message"]


# Bombs: few bytes that say much


def with_samples(number: int) -> bytes:
    """An MP4 that says to have so many, all of one size, which takes no space to say."""
    return in_header(in_header(MP4, b"stsz", 4, 1), b"stsz", 8, number)


def gif_bomb(num_frames: int, side: int = 1) -> bytes:
    """Frames of a few bytes each, on a screen of any size."""
    screen = b"GIF89a" + struct.pack("<HH", side, side) + b"\x80\0\0" + bytes(3) + b"\xff" * 3
    frame = b"\x21\xf9\x04\0\0\0\0\0" + b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0" + b"\x02\x02\x44\x01\0"
    return screen + frame * num_frames + b";"


def with_vp8_size(side: int) -> bytes:
    """A WebM whose key frame has another size than its header."""
    data = video(frames(4), format="webm", codec="libvpx", pixel_format="yuv420p")
    place = data.index(b"\x9d\x01\x2a") + 3
    return data[:place] + struct.pack("<HH", side, side) + data[place + 4 :]


BOMBS = {
    "a GIF of a million frames": (gif_bomb(700_000), "700000 frames or more, the limit is 20000"),
    "a GIF of a huge screen": (gif_bomb(2, 65_535), "65535 x 65535 = 4294836225 pixels, the limit is 64000000"),
    "a GIF of many large frames": (gif_bomb(2000, 7_900), "the limit is 2000000000 pixels together"),
    "a WebM with a huge first frame": (with_vp8_size(16_383), "truncated or damaged"),
    "an MP4 of 200 million samples": (
        with_samples(200_000_000),
        "no frames|damaged",
    ),
    "an MP4 that lasts for years": (in_header(MP4, b"stts", 12, 2**24), "limits.video.max_seconds"),
}


@pytest.mark.parametrize("name", BOMBS)
async def test_bomb_is_refused_soon_and_the_service_goes_on(http: httpx2.AsyncClient, name: str) -> None:
    data, words = BOMBS[name]
    started = time.perf_counter()
    status, _, message = await refusal(http, video_part(data))
    print(f"{name}: {len(data)} bytes, {time.perf_counter() - started:.2f} s: {message}")
    assert status == 400 and re.search(words, message), message
    answer = await http.post(URL, json=body(frames_part(frames(2)), "What?"))
    assert answer.status_code == 200


async def test_decoder_that_crashes_takes_nobody_with_it(
    http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crashing = tmp_path / "decoder.py"
    crashing.write_text("import os\nos.abort()")
    with monkeypatch.context() as patch:
        patch.setattr("llm_service.clips._DECODER", crashing)
        assert await refusal(http, video_part(MP4)) == (
            400, "messages[0].content[0].video_url.url", "the clip cannot be decoded",
        )  # fmt: skip
    assert (await http.post(URL, json=body(video_part(MP4), "What?"))).status_code == 200


def running(pids: Path) -> list[int]:
    """The decoders that have begun and not ended."""
    begun = [int(file.name) for file in pids.iterdir()]
    return [pid for pid in begun if Path(f"/proc/{pid}").exists()]


async def until_running(pids: Path, number: int) -> list[int]:
    async with asyncio.timeout(60):
        while len(found := running(pids)) != number:  # noqa: ASYNC110  # other processes
            await asyncio.sleep(0.01)
    return found


@pytest.fixture
def sleeping_decoders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where each decoder leaves its process id; it says nothing until the file is gone."""
    pids = tmp_path / "pids"
    pids.mkdir()
    script = tmp_path / "decoder.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        f"mine = pathlib.Path({str(pids)!r}, str(os.getpid()))\n"
        "mine.touch()\n"
        "while mine.exists(): time.sleep(0.01)\n"
        f"os.execv(sys.executable, [sys.executable, '-P', {str(clips._DECODER)!r}, *sys.argv[1:]])\n"
    )
    monkeypatch.setattr(clips, "_DECODER", script)
    return pids


async def test_files_are_decoded_a_few_at_once_while_others_are_answered(
    http: httpx2.AsyncClient, sleeping_decoders: Path
) -> None:
    waiting = [asyncio.create_task(http.post(URL, json=body(video_part(MP4), "What?"))) for _ in range(5)]
    for remaining in (5, 3, 1):
        expected = min(remaining, VideoLimits().decode_processes)
        begun = await until_running(sleeping_decoders, expected)
        assert (await http.post(URL, json=body(frames_part(frames(2)), "What?"))).status_code == 200
        assert running(sleeping_decoders) == begun
        for pid in begun:
            (sleeping_decoders / str(pid)).unlink()
    assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}


async def test_client_that_leaves_ends_the_decoder_and_a_deadline_is_not_waited_beyond(
    http: httpx2.AsyncClient, sleeping_decoders: Path
) -> None:
    limits = VideoLimits()
    leaving = [
        asyncio.create_task(http.post(URL, json=body(video_part(MP4), "What?"))) for _ in range(limits.decode_processes)
    ]
    await until_running(sleeping_decoders, limits.decode_processes)
    late = await http.post(URL, json=body(video_part(MP4), "What?"), headers={"x-request-timeout-seconds": "0.2"})
    assert late.status_code == 504, late.text
    for task in leaving:
        task.cancel()
    await asyncio.wait(leaving)
    assert not running(sleeping_decoders)


# What is held


async def test_clips_of_one_request_are_let_in_alone_whatever_they_hold_together(
    http: httpx2.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = services.llm.admission.held["bytes"]
    several = body(*[video_part(MP4, fps=fps) for fps in (1, 15, 30)], "What?")
    monkeypatch.setattr(held, "limit", 100_000)  # 6 frames and 3 are more
    assert (await http.post(URL, json=several)).status_code == 200
    held.take(1)
    refused = await http.post(URL, json=several)
    held.give_back(1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert held.amount == 0


async def test_frames_are_held_from_decoding_until_they_are_encoded(
    http: httpx2.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, engine = services.llm.admission.held["bytes"], services.llm.engine
    decoded, answered = [], []
    pack, generate = clips._clip_of_output, engine.generate
    monkeypatch.setattr(clips, "_clip_of_output", lambda output: decoded.append(held.amount) or pack(output))
    monkeypatch.setattr(engine, "generate", lambda *asked: answered.append(held.amount) or generate(*asked))
    part = video_part(MP4, fps=30)
    question = {"type": "predicate", "name": "moves", "instructions": "Does it move?"}
    message = {"type": "message", "role": "user", "content": [part]}
    decision = {"model": "tiny", "input": [message], "questions": [question, question | {"name": "again"}]}
    for url, request in ((URL, body(part, "What?")), ("/v1/decisions", decision)):
        answer = await http.post(url, json=request)
        assert answer.status_code == 200, answer.text
        num_body_bytes = len(answer.request.content)
        assert decoded.pop() >= num_body_bytes + 6 * 84 * 56 * 3 and not decoded
        assert set(answered) == {num_body_bytes}
        answered.clear()


# What is a clip


@pytest.mark.parametrize(
    "data",
    [
        video(frames(4), **WEBM),
        video(frames(4), **FFV1),
        video(frames(4), format="webm", codec="libvpx", pixel_format="yuv420p"),
        video(frames(4), format="mp4", codec="libx264", pixel_format="yuv420p"),
        GIF,
        animation(frames(4), "WEBP", lossless=True),
    ],
    ids=["vp9", "ffv1", "vp8", "h264", "gif", "webp"],
)
def test_every_format_gives_its_frames(data: bytes) -> None:
    clip = clip_of_file(data, Sampling(fps=60.0), ImageLimits())
    assert (clip.num_frames, len(clip.pairs), clip.height, clip.width) == (4, 2, 56, 84)
    assert clip.fps == pytest.approx(10 if data[:3] in (b"GIF", b"RIF") else 30, rel=0.02)


def test_lossless_webp_is_its_frames_as_often_as_they_are_shown() -> None:
    shown = frames(4)
    clip = clip_of_file(animation(shown, "WEBP", duration_ms=250, lossless=True), Sampling(fps=2.0), ImageLimits())
    assert clip.num_frames == 2 and clip.pairs[0].timestamp == 0.25
    assert clip.pairs[0].data.endswith(shown[0].tobytes() + shown[2].tobytes())


def test_frame_that_stands_still_is_taken_as_often_as_it_is_due() -> None:
    data = animation(frames(100, height=28, width=28), "WEBP", duration_ms=[10] * 99 + [9010], lossless=True)
    clip = clip_of_file(data, Sampling(fps=2.0), ImageLimits())
    assert (clip.num_frames, clip.fps, clip.pairs[-1].timestamp) == (20, 2.0, 9.25)
    assert len({pair.mm_hash for pair in clip.pairs}) == 2
    with pytest.raises(InvalidRequestError, match="20 sampled frames of 28 x 28"):
        clip_of_file(data, Sampling(fps=2.0), limited(max_sampled_pixels=19 * 28 * 28))


def test_transparency_of_an_animation_is_white() -> None:
    images = [Image.new("RGBA", (56, 56), (255, 0, 0, 0)), Image.new("RGBA", (56, 56), (0, 0, 255, 255))]
    clip = clip_of_file(animation(images, "WEBP", lossless=True), Sampling(fps=10.0), ImageLimits())
    assert clip.pairs[0].data.endswith(b"\xff" * 56 * 56 * 3 + b"\0\0\xff" * 56 * 56)


def test_file_that_is_to_be_displayed_turned_is_turned() -> None:
    image = Image.new("RGB", (96, 64), "black")
    image.paste("white", (0, 0, 48, 32))  # top left
    data = video([image, image], **LOSSLESS)
    place = data.index(b"tkhd") + 4 + 40
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
    clip = clip_of_file(data[:place] + quarter + data[place + 36 :], Sampling(fps=30.0), ImageLimits())
    assert (clip.height, clip.width) == (96, 64)
    turned = Image.frombytes("RGB", (64, 96), clip.pairs[0].data[-64 * 96 * 3 :])
    assert [turned.getpixel(place) for place in ((60, 4), (4, 4), (60, 90))] == [(255,) * 3, (0,) * 3, (0,) * 3]


def test_what_an_edit_list_cuts_away_is_not_missed() -> None:
    longer_first_frame = in_header(MP4, b"stts", 12, 4000)  # so that the list ends before the second one
    assert clip_of_file(longer_first_frame, Sampling(fps=30.0), ImageLimits()).num_frames == 1


def test_count_is_spread_from_the_first_frame_on() -> None:
    shown = frames(12)
    data = video(shown, **LOSSLESS)
    clip = clip_of_file(data, Sampling(num_frames=4), ImageLimits())
    expected = [shown[index].tobytes() for index in (0, 3, 6, 9)]
    assert b"".join(pair.data[-2 * 56 * 84 * 3 :] for pair in clip.pairs) == b"".join(expected)
    assert clip.fps == 10
    few = clip_of_file(data, Sampling(fps=30.0, max_frames=4), ImageLimits())
    assert [pair.mm_hash for pair in few.pairs] == [pair.mm_hash for pair in clip.pairs]


async def test_clip_of_a_browsers_recorder_is_read(http: httpx2.AsyncClient) -> None:
    data = video(frames(4), format="webm", codec="libvpx", pixel_format="yuv420p")
    part = video_part(data, "video/webm;codecs=vp8,opus", fps=30)
    answer = (await http.post(URL, json=body(part, "What?"))).raise_for_status().json()
    assert answer["usage"]["images"][0]["frames"] == 4


async def test_response_about_a_clip_is_that_of_a_chat_completion(http: httpx2.AsyncClient) -> None:
    part = frames_part(frames(4))
    content = [part, {"type": "input_text", "text": "What?"}]
    message = {"type": "message", "role": "user", "content": content}
    request = {"model": "tiny", "input": [message], "max_output_tokens": 6}
    answer = (await http.post("/v1/responses", json=request)).raise_for_status().json()
    chat = (await http.post(URL, json=body(part, "What?"))).raise_for_status().json()
    assert answer["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]


async def test_frames_between_commas_are_a_clip_as_vllm_sends_it(http: httpx2.AsyncClient) -> None:
    shown = [png(image) for image in frames(4)]
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(one).decode() for one in shown)
    answers = []
    for part in ({"type": "video_url", "video_url": {"url": url}}, frames_part(frames(4))):
        answers.append((await http.post(URL, json=body(part, "What?"))).raise_for_status().json())
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[1]["usage"]["images"][0]["cached_grids"] == 2
