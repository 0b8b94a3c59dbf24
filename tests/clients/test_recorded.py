"""What official clients sent, replayed without them: run.py recorded it against a real service."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Service, events_of, serve
from tests.conftest import picture

__all__ = ["serve"]

REQUESTS = Path(__file__).parent / "requests"


def recorded() -> list[Any]:
    return [
        pytest.param(request, id=f"{path.stem}-{index}-{request['path'].strip('/').replace('/', '-')}")
        for path in sorted(REQUESTS.glob("*.json"))
        for index, request in enumerate(json.loads(path.read_text()))
    ]


@pytest.mark.parametrize("request_", recorded())
async def test_recorded_request_is_answered(serve: Callable[..., Service], request_: dict[str, Any]) -> None:
    service = serve()
    encoded = base64.b64encode(picture()).decode()
    text = json.dumps(request_["body"]).replace("{picture}", encoded).replace('"shapes"', '"tiny"')
    path = request_["path"].replace("shapes", "tiny")
    content = text if request_["body"] is not None else None
    answer = await service.http.request(request_["method"], path, content=content, headers=request_["headers"])
    body = request_["body"] or {}
    expected = {"nothing": 404}.get(body.get("model", ""), 400 if body.get("temperature") == 9 else 200)
    assert answer.status_code == expected, answer.text
    if expected == 200 and body.get("stream"):
        assert not [event for event in events_of(answer.text) if event != "[DONE]" and "error" in event]


def test_every_client_was_recorded() -> None:
    assert {path.stem for path in REQUESTS.glob("*.json")} == {
        "aiperf",
        "anthropic",
        "guidellm",
        "langchain",
        "litellm",
        "openai2",
        "openai3",
    }
