"""Spans of OpenTelemetry, if its API is installed. Without an exporter (Serve's `tracing_config`) they cost next to
nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

try:
    from opentelemetry import trace
except ImportError:  # optional
    _tracer = None
else:
    _tracer = trace.get_tracer("fovea")


@contextlib.contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[None]:
    """What runs inside is one span, a child of the current one."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(f"fovea.{name}", attributes=attributes):
        yield


class Stages:
    """Spans that follow each other, for a generator, in which there is no current span."""

    def __init__(self, name: str, **attributes: str | int | float) -> None:
        self._attributes = attributes
        self._span: Any = None
        self._begin(name)

    def next(self, name: str) -> None:
        """Ends the stage and begins another one."""
        self.end()
        self._begin(name)

    def end(self) -> None:
        if self._span is not None:
            self._span.end()
            self._span = None

    def _begin(self, name: str) -> None:
        self._span = None if _tracer is None else _tracer.start_span(f"fovea.{name}", attributes=self._attributes)
