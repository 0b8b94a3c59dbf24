"""What reads all bytes of an item, kept from holding up an event loop."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from common.config import MIB

T = TypeVar("T")

MAX_INLINE_BYTES = MIB


async def on_thread_if_large(num_bytes: int, function: Callable[..., T], *arguments: object) -> T:
    """What a function that reads `num_bytes` returns. A thread costs more than it does for a few.

    The thread is one of asyncio's, not of those that decode images, for which it would have to wait.
    """
    if num_bytes <= MAX_INLINE_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
