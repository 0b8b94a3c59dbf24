"""A small client of the HTTP API, for the command, the demo and `fovea verify`."""

import base64
import json
import mimetypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx2

TIMEOUT_S = 600.0
NO_SAMPLING: Mapping[str, float | int] = {}


class ClientError(RuntimeError):
    """The service refused, failed or cannot be reached; the message says which."""


@dataclass(slots=True)
class Answer:
    """`images` are the receipts of `usage`; `seconds` is from the request to its last byte."""

    text: str = ""
    finish_reason: str | None = None
    images: list[dict[str, Any]] = field(default_factory=list)
    num_tokens: int = 0
    fingerprint: str | None = None
    seconds: float = 0.0


class Client:
    """Asks about pictures at one URL, with a key if the service wants one. Thread-safe."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._http = httpx2.Client(base_url=url, timeout=TIMEOUT_S, headers=authorization(api_key))
        self._url = url
        self._model: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def model(self) -> str:
        """The name of the model that is served."""
        if self._model is None:
            try:
                response = self._http.get("/v1/models")
                if response.status_code in (401, 403):
                    raise ClientError(wants_key(self._url))
                self._model = response.raise_for_status().json()["data"][0]["id"]
            except (httpx2.HTTPError, ValueError, KeyError) as exc:
                raise ClientError(f"no Fovea service answers at {self._url}; start one with `fovea up`") from exc
        assert self._model is not None
        return self._model

    def fingerprint(self) -> str:
        """What the service's answers depend on besides the request."""
        fingerprint: str = self._http.get("/health").raise_for_status().json()["system_fingerprint"]
        return fingerprint

    def ask(
        self,
        images: Sequence[Path | bytes],
        question: str,
        *,
        videos: Sequence[Path] = (),
        sampling: Mapping[str, float | int] = NO_SAMPLING,
        max_tokens: int | None = None,
        temperature: float | None = None,
        print_text: bool = False,
    ) -> Answer:
        """Streams the answer to one question. A video is a file or a folder of frames, in the order of their names;
        `sampling` may have `fps`, `num_frames` and `max_frames`. Raises as `chat` does."""
        message = user_message(images, question, [_video_part(video, sampling) for video in videos])
        return self.chat([message], max_tokens=max_tokens, temperature=temperature, print_text=print_text)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        print_text: bool = False,
    ) -> Answer:
        """Streams the next answer. Raises ClientError with the service's own message if it refuses or fails."""
        body: dict[str, Any] = {
            "model": self.model(),
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        optional = {"max_tokens": max_tokens, "temperature": temperature}
        body |= {name: value for name, value in optional.items() if value is not None}
        started = time.perf_counter()
        answer = Answer()
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ClientError(_message(response.read()))
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        _add(answer, json.loads(line[6:]), print_text)
        except httpx2.HTTPError as exc:
            raise ClientError(f"the connection to {self._url} failed: {exc}") from exc
        answer.seconds = time.perf_counter() - started
        if answer.finish_reason is None:
            raise ClientError("the answer ended without a finish reason")
        if print_text:
            print(flush=True)
        return answer


def user_message(images: Sequence[Path | bytes], text: str, videos: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Raises ClientError if a file cannot be read."""
    return {"role": "user", "content": [*map(_image_part, images), *videos, {"type": "text", "text": text}]}


def _add(answer: Answer, chunk: dict[str, Any], print_text: bool) -> None:
    if "error" in chunk:
        raise ClientError(chunk["error"]["message"])
    answer.fingerprint = chunk["system_fingerprint"]
    for choice in chunk["choices"]:
        text = choice["delta"].get("content", "")
        answer.text += text
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
        if print_text:
            print(text, end="", flush=True)
    if usage := chunk.get("usage"):
        answer.images = usage["images"]
        answer.num_tokens = usage["completion_tokens"]


def _image_part(image: Path | bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": _data_url(image, "image/png")}}


def _video_part(video: Path, sampling: Mapping[str, float | int]) -> dict[str, Any]:
    if video.is_dir():
        frames = [_data_url(frame, "image/png") for frame in sorted(video.iterdir()) if frame.is_file()]
        return {"type": "video", "video": frames, **sampling}
    return {"type": "video_url", "video_url": {"url": _data_url(video, "video/mp4")}, **sampling}


def _data_url(file: Path | bytes, default: str) -> str:
    """`default` is the type of what has no name that says one."""
    if isinstance(file, Path):
        try:
            data = file.read_bytes()
        except OSError as exc:
            raise ClientError(f"{file}: {exc.strerror}") from exc
        media_type = mimetypes.guess_type(file.name)[0] or default
    else:
        data, media_type = file, default
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _message(body: bytes) -> str:
    try:
        message: str = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]
    return message


def authorization(api_key: str | None) -> dict[str, str]:
    """The header of a service with keys."""
    return {} if api_key is None else {"authorization": f"Bearer {api_key}"}


def wants_key(url: object) -> str:
    return f"{url} wants a key: give --api-key or set FOVEA_API_KEY"
