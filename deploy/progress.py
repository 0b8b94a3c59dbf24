"""Bars and spinners for what takes longer than a glance: on a terminal, and nothing where output goes elsewhere."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner while something runs whose length nobody knows."""
    console = Console(stderr=True)
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield


def track(items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar that is gone when they are."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(items, description=text, total=total)
