"""Collects waiting images into batches of a bounded number of patches and runs them, one or two at a time."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from common.embedding import VisionEmbedding
from encoder_service.config import EncoderConfig
from encoder_service.encoder import Preprocessed

Encode = Callable[[list[Preprocessed]], list[VisionEmbedding]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    image: Preprocessed
    result: asyncio.Future[VisionEmbedding]


class Batcher:
    """First come, first served. While batches run, the next one gathers; images nobody waits for are skipped.

    `num_at_once` batches are given to `encode`, each on a thread of its own.
    """

    def __init__(self, encode: Encode, config: EncoderConfig, num_at_once: int = 1) -> None:
        self._encode = encode
        self._config = config
        self._queue: deque[_Waiting] = deque()
        self._num_at_once = num_at_once
        self._device = ThreadPoolExecutor(num_at_once, thread_name_prefix="vision-encoder")
        self._running: set[asyncio.Task[None]] = set()

    async def submit(self, image: Preprocessed) -> VisionEmbedding:
        """Returns when its batch is done. A caller that leaves before takes its image out of the queue."""
        waiting = _Waiting(image, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        if len(self._running) < self._num_at_once:
            self._running.add(asyncio.create_task(self._run()))
        return await waiting.result

    async def idle(self) -> None:
        """Returns when no image waits and none is being encoded."""
        while self._running:
            await asyncio.wait(self._running)

    async def _run(self) -> None:
        try:
            while batch := self._next_batch():
                await self._encode_batch(batch)
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._running.discard(task)  # here and not later: what is submitted next needs another one

    async def _encode_batch(self, batch: Sequence[_Waiting]) -> None:
        images = [waiting.image for waiting in batch]
        try:
            embeddings = await asyncio.get_running_loop().run_in_executor(self._device, self._encode, images)
            done = list(zip(batch, embeddings, strict=True))
        except Exception as exc:  # every caller of the batch gets it; the next batch goes on
            for waiting in batch:
                if not waiting.result.done():
                    waiting.result.set_exception(exc)
            return
        for waiting, embedding in done:
            if not waiting.result.done():
                waiting.result.set_result(embedding)

    def _next_batch(self) -> list[_Waiting]:
        """As many images from the head of the queue as fit the budget, at least one if anyone is waiting."""
        batch: list[_Waiting] = []
        num_patches = 0
        while self._queue:
            head = self._queue[0]
            if not head.result.done():
                if batch and num_patches + head.image.num_patches > self._config.max_batch_patches:
                    break
                batch.append(head)
                num_patches += head.image.num_patches
            self._queue.popleft()
        return batch
