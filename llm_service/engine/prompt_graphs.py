"""CUDA graphs for short prompts, whose launches would take longer than their kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from common.garbage import no_collection
from llm_service.config import EngineConfig
from llm_service.engine.fused_decoder import FusedDecoder, PromptBatch

# On an H200 the launches of any prompt take 10 ms, which is what 1,500 tokens of a 2B model take
# (deploy/bench/NOTES.md). A prompt with a past gathers as many keys and values as its graph has slots: little beside
# the weights, so that two numbers of them do.
_ROWS = (64, 128, 256, 384, 512, 768, 1024, 1536)
_ROWS_WITH_PAST = (64, 256, 768)
_SLOTS = (4096, 32768)  # a longer past is launched
_MAX_SEQUENCES = 32


@dataclass(frozen=True, slots=True, order=True)
class PromptShape:
    """How long the tensors of a `PromptBatch` are; what is not needed is padding. No `num_slots`: no chunk has a
    past."""

    num_rows: int
    num_slots: int
    num_sequences: int
    max_query: int
    max_context: int

    def has_room_for(self, needed: "PromptShape") -> bool:
        return (
            self.num_rows >= needed.num_rows
            and self.num_sequences >= needed.num_sequences
            and self.num_slots >= needed.num_slots
            and bool(self.num_slots) == bool(needed.num_slots)
        )


def prompt_shapes(config: EngineConfig, max_model_len: int, *, exact: bool) -> list[PromptShape]:
    """Ascending. In `exact` numerics one chunk is computed at a time, so that its own length decides its shape."""
    longest = min(config.prefill_chunk_size if exact else _ROWS[-1], config.max_num_batched_tokens)
    num_sequences = 1 if exact else _MAX_SEQUENCES

    def up_to_longest(sizes: Sequence[int]) -> list[int]:
        return [*(rows for rows in sizes if rows < longest), longest] if longest <= _ROWS[-1] else []

    shapes = [PromptShape(rows, 0, num_sequences, rows, rows) for rows in up_to_longest(_ROWS)]
    for rows, slots in product(up_to_longest(_ROWS_WITH_PAST), {min(slots, max_model_len) for slots in _SLOTS}):
        shapes.append(PromptShape(rows, slots, num_sequences, rows, slots))
    return sorted(shapes)


@dataclass(frozen=True, slots=True)
class PromptGraph:
    """A captured prefill: the tensors that it reads; it overwrites `embeds_TD`."""

    shape: PromptShape
    graph: torch.cuda.CUDAGraph
    embeds_TD: Tensor
    batch: PromptBatch

    def replay(self, embeds_TD: Tensor, batch: PromptBatch) -> Tensor:
        """What `FusedDecoder.prefill` returns for a batch of this shape; the next replay overwrites it."""
        self.embeds_TD.copy_(embeds_TD)
        for mine, given in zip(_tensors(self.batch), _tensors(batch), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.embeds_TD


def _tensors(batch: PromptBatch) -> list[Tensor]:
    found = [batch.cosines, batch.sines, batch.slots, batch.query_starts, batch.context_starts, *batch.deepstack_TD]
    return found if batch.context_slots is None else [*found, batch.context_slots]


class PromptGraphs:
    """One graph for each of `shapes`, which are ascending."""

    def __init__(self, decoder: FusedDecoder, shapes: Sequence[PromptShape], num_deepstack: int, pool: Any) -> None:
        # the others share the memory of the largest
        largest_first = [_capture(decoder, shape, num_deepstack, pool) for shape in reversed(shapes)]
        self._graphs = largest_first[::-1]

    def find(self, needed: PromptShape) -> PromptGraph | None:
        """The smallest one in which a batch has room."""
        return next((graph for graph in self._graphs if graph.shape.has_room_for(needed)), None)


def num_graph_bytes(decoder: FusedDecoder, shapes: Sequence[PromptShape], num_deepstack: int) -> int:
    """What the graphs hold: the inputs of each, and what the layers of the largest leave for each other."""
    layer = decoder.layers[0]
    hidden_size, head_size = decoder.head.shape[1], decoder.kv_cache.shape[-1]
    inputs = sum(shape.num_rows for shape in shapes) * ((1 + num_deepstack) * hidden_size + 2 * head_size)
    between = 2 * (hidden_size + layer.qkv.shape[0] + layer.out.shape[1]) + 3 * layer.down.shape[1]
    rows = max((shape.num_rows for shape in shapes), default=0)
    slots = max((shape.num_slots for shape in shapes), default=0)
    gathered = 2 * slots * decoder.kv_cache.shape[-2] * head_size
    return int(inputs + rows * between + gathered) * decoder.head.itemsize


def _capture(decoder: FusedDecoder, shape: PromptShape, num_deepstack: int, pool: Any) -> PromptGraph:
    head, device = decoder.head, decoder.head.device
    embeds_TD = head.new_zeros(shape.num_rows, head.shape[1])
    cosines, sines = head.new_zeros(2, shape.num_rows, decoder.kv_cache.shape[-1])
    starts, context_starts = torch.zeros(2, shape.num_sequences + 1, dtype=torch.int32, device=device)
    batch = PromptBatch(
        cosines,
        sines,
        torch.full((shape.num_rows,), -1, device=device),
        starts,
        context_starts,
        shape.max_query,
        shape.max_context,
        torch.zeros(shape.num_slots, dtype=torch.long, device=device) if shape.num_slots else None,
        tuple(head.new_zeros(num_deepstack, *embeds_TD.shape)),
    )
    with torch.inference_mode():
        decoder.prefill(embeds_TD, batch)  # compiles what is new
        graph = torch.cuda.CUDAGraph()
        with no_collection(), torch.cuda.graph(graph, pool=pool):
            decoder.prefill(embeds_TD, batch)
    return PromptGraph(shape, graph, embeds_TD, batch)
