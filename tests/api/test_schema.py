"""Schemathesis over /openapi.json: every operation, called as its schema says and as it does not."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2
import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode

from tests.api.conftest import Service, generated

SAMPLE, SOAK = 6, 200  # of each operation and mode


async def send(service: Service, case: Any) -> httpx2.Response:
    """A generated case, as it is: bodies that are no JSON are sent as bytes."""
    is_json = isinstance(case.body, str | dict | list | int | float | None)
    content = json.dumps(case.body).encode() if is_json else case.body if isinstance(case.body, bytes) else b""
    headers = {name: value for name, value in dict(case.headers or {}).items() if str(value).isprintable()}
    headers["content-type"] = case.media_type or "application/octet-stream"
    query = {str(name): str(value) for name, value in dict(case.query or {}).items()}
    path = case.formatted_path
    return await service.http.request(case.method, path, content=content, params=query, headers=headers)


async def call_every_operation(service: Service, count: int) -> Counter[int]:
    schema = schemathesis.openapi.from_dict(service.app.openapi())
    statuses: Counter[int] = Counter()
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            for case in cases(operation, mode, count):
                answer = await send(service, case)
                statuses[answer.status_code] += 1
                assert answer.status_code < 500, (case.method, case.formatted_path, case.body, answer.text)
                if answer.status_code >= 400 and case.method != "HEAD":
                    error = answer.json()["error"]
                    assert error["message"] and error["type"], answer.text
    return statuses


def cases(operation: Any, mode: GenerationMode, count: int) -> list[Any]:
    try:
        return generated(operation.as_strategy(mode), count)
    except hypothesis.errors.Unsatisfiable:  # an operation without parameters cannot be called wrongly
        assert mode is GenerationMode.NEGATIVE
        return []


async def test_no_operation_answers_with_a_5xx(serve: Callable[..., Service]) -> None:
    service = serve(max_model_len=256)
    statuses = await call_every_operation(service, SAMPLE)
    print(dict(statuses))
    assert statuses[200] and statuses[400]


@pytest.mark.soak
async def test_no_operation_answers_with_a_5xx_thousands_of_times(serve: Callable[..., Service]) -> None:
    service = serve(max_model_len=256)
    statuses = await call_every_operation(service, SOAK)
    print(dict(statuses))
    assert statuses.total() > 5000
