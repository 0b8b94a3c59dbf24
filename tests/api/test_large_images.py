"""What takes milliseconds for an image of megabytes leaves the event loop; for a small one a thread would cost more."""

import base64
import pkgutil
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from common.config import ImageLimits
from common.identity import mm_hash
from common.threads import MAX_INLINE_BYTES
from llm_service.image_parts import decode_data_url
from tests.api.conftest import Service
from tests.conftest import picture
from tests.services import body, data_url, image_part

QUESTION = {"type": "predicate", "instructions": "Is there a circle?"}


def anthropic(image: bytes) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(image).decode()}
    return body({"type": "image", "source": source}, "What?")


def items(image: bytes) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "input_image", "image_url": data_url(image)}]}]


BODIES: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "/v1/chat/completions": lambda image: body(image_part(image), "What?"),
    "/v1/messages": anthropic,
    "/v1/messages/count_tokens": anthropic,
    "/v1/responses": lambda image: {"model": "tiny", "input": items(image), "max_output_tokens": 2},
    "/v1/decisions": lambda image: {"model": "tiny", "input": items(image), "questions": [QUESTION]},
    "/v1/plan": lambda image: body(image_part(image), "What?"),
    "/tokenize": lambda image: body(image_part(image), "What?"),
}


NOTED = (
    "pybase64.b64decode",
    "llm_service.media.image_header",
    "llm_service.media.mm_hash",
    "llm_service.image_parts.mm_hash",
    "common.media_store.mm_hash",
)


@pytest.fixture
def is_on_loop(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bool]]:
    """For what has run since: whether on the thread of the event loop, which is the test's own."""
    found: defaultdict[str, set[bool]] = defaultdict(set)
    thread = threading.get_ident()

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **options: Any) -> Any:
            found[name].add(threading.get_ident() == thread)
            return function(*args, **options)

        return note

    for name in NOTED:
        monkeypatch.setattr(name, noting(name.rpartition(".")[2], pkgutil.resolve_name(name)))
    return found


def picture_of(num_bytes: int) -> bytes:
    """What follows the end of a PNG is part of its digest."""
    return picture().ljust(num_bytes, b"\0")


@pytest.mark.parametrize("path", BODIES)
async def test_image_in_a_body_is_decoded_read_and_hashed_on_another_thread_if_it_is_large(
    serve: Callable[..., Service], is_on_loop: dict[str, set[bool]], path: str
) -> None:
    service = serve()
    for num_bytes, expected in ((1000, True), (MAX_INLINE_BYTES + 1, False)):
        is_on_loop.clear()
        (await service.http.post(path, json=BODIES[path](picture_of(num_bytes)))).raise_for_status()
        assert is_on_loop == {name: {expected} for name in ("b64decode", "image_header", "mm_hash")}


async def test_large_image_that_is_kept_or_has_a_content_hash_is_hashed_on_another_thread(
    serve: Callable[..., Service], is_on_loop: dict[str, set[bool]]
) -> None:
    service = serve()
    image = picture_of(MAX_INLINE_BYTES + 1)
    (await service.http.post("/v1/media", content=image)).raise_for_status()
    named = {"type": "image_url", "image_url": {"content_hash": mm_hash(image)}}
    sent = image_part(image, content_hash=mm_hash(image))
    for part in (named, sent):
        (await service.http.post("/v1/chat/completions", json=body(part, "What?"))).raise_for_status()
    assert is_on_loop["mm_hash"] == {False}


def test_base64_in_lines_is_that_without_them() -> None:
    data = random.Random(0).randbytes(MAX_INLINE_BYTES)
    text = base64.encodebytes(data).decode()
    assert decode_data_url(f"data:image/png;base64,{text}", "url", ImageLimits()) == data
