"""The model runner on CUDA: decode steps and short prompts replayed from CUDA graphs, long ones launched by kernel.

Everything is launched and nothing is read back, so that the host prepares the next step while this one is computed.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import LoadedHalf, text_model_and_head
from common.device import to_device
from common.families import family_of
from common.garbage import no_collection
from llm_service.config import EngineConfig
from llm_service.engine.fused_decoder import FusedDecoder, Plan, PromptBatch
from llm_service.engine.kernels import DecodeBatch, Tile, Workspace
from llm_service.engine.model_runner import (
    PackedImage,
    check_supported,
    copy_blocks,
    kv_cache_shape,
    packed_images,
    packed_rows,
    positions_of,
    rotary_position_ids,
)
from llm_service.engine.prompt_graphs import PromptGraphs, PromptShape, num_graph_bytes, prompt_shapes
from llm_service.engine.request import Request
from llm_service.engine.scheduler import ScheduledRequest, SchedulerOutput

# B: rows of a decode step, up to a bucket's size; T: rows of packed prompts; D: hidden size; V: vocabulary.

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
# How a product is cut, by rows up to. Only the number of splits decides the order of its sums, so `exact` numerics,
# where no bit may depend on the number of rows, keeps it for all. Measured on an H200: deploy/bench/NOTES.md.
NUM_PRODUCT_SPLITS = {"qkv": 1, "out": 2, "gate_up": 1, "down": 5, "head": 1}
TILES = {
    16: {
        "qkv": Tile(16, 16, 128),
        "out": Tile(16, 32, 128),
        "gate_up": Tile(16, 64, 128, num_stages=3),
        "down": Tile(16, 32, 128),
        "head": Tile(16, 128, 128, num_stages=3),
    },
    64: {
        "qkv": Tile(64, 16, 128),
        "out": Tile(64, 32, 128, num_stages=3),
        "gate_up": Tile(64, 128, 64, num_warps=8),
        "down": Tile(64, 32, 128),
        "head": Tile(64, 128, 64),
    },
    256: {
        "qkv": Tile(64, 64, 128, num_stages=3),
        "out": Tile(64, 32, 128, num_stages=3),
        "gate_up": Tile(128, 64, 64, num_warps=8),
        "down": Tile(128, 128, 64, num_warps=8),
        "head": Tile(128, 256, 64, num_warps=8, num_stages=3),
    },
}
EXACT_CONTEXT_SPLITS = 8
DEFAULT_GPU_MEMORY_UTILIZATION = 0.9
# `fast`: the products that beat cuBLAS, and the splits of the context, by rows up to
FAST_PRODUCTS = {16: ("qkv", "out", "gate_up", "down", "head"), 64: ("gate_up",), 256: ()}
FAST_CONTEXT_SPLITS = {4: 32, 8: 16, 32: 8, 64: 4, 128: 2, 256: 1}


def plan_for(num_rows: int, decoder: FusedDecoder, *, exact: bool) -> Plan:
    names = tuple(NUM_PRODUCT_SPLITS) if exact else FAST_PRODUCTS[_at_least(num_rows, FAST_PRODUCTS)]
    tiles = TILES[_at_least(num_rows, TILES)]
    first = decoder.layers[0]
    sizes = {"out": first.out.shape[1], "down": first.down.shape[1]}  # of what is summed over, where it is split
    splits = {name: _num_product_splits(NUM_PRODUCT_SPLITS[name], sizes.get(name, 0)) for name in names}
    context_splits = EXACT_CONTEXT_SPLITS if exact else FAST_CONTEXT_SPLITS[_at_least(num_rows, FAST_CONTEXT_SPLITS)]
    return Plan({name: replace(tiles[name], num_splits=splits[name]) for name in names}, context_splits)


def _num_product_splits(wanted: int, size: int) -> int:
    """At most `wanted` shares of a sum, of whole steps each."""
    return next(splits for splits in range(wanted, 0, -1) if size % (128 * splits) == 0)


def _at_least(value: int, steps: Iterable[int]) -> int:
    """The smallest of ascending `steps` that is not below `value`, or else the greatest."""
    ascending = list(steps)
    return ascending[min(bisect_left(ascending, value), len(ascending) - 1)]


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured decode step of one batch size. `inputs` int32 `[4, B]`: token, row among the tokens of the step
    before or -1, length with the new token, position."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits_BV: Tensor


class CudaModelRunner:
    """Owns the weights, the KV memory and the graphs. `exact` computes each chunk of a prompt alone, in as many rows
    as its length asks for, and decode rows by products and attention whose sums no batch size changes."""

    is_asynchronous = True

    def __init__(self, loaded: LoadedHalf, config: EngineConfig, *, exact: bool) -> None:
        self.device, self.dtype, self.exact, self.config = loaded.device, loaded.dtype, exact, config
        self.language_model, lm_head = text_model_and_head(loaded.model)
        self.uses_mrope = family_of(loaded.config).uses_mrope
        self.num_deepstack = len(getattr(loaded.config.vision_config, "deepstack_visual_indexes", ()))
        text_config = self.language_model.config
        check_supported(text_config)
        self.max_rows = config.max_num_seqs
        self.max_model_len = min(config.max_model_len, text_config.max_position_embeddings)
        self.previous_tokens = torch.zeros(self.max_rows, dtype=torch.long, device=self.device)
        num_profiled = -(-config.max_num_batched_tokens // config.block_size) + 1
        profiled = config.num_kv_blocks or num_profiled
        self.kv_cache = self._kv_memory(text_config, profiled)
        self.decoder = FusedDecoder(self.language_model, lm_head, self.kv_cache, self.max_model_len)
        if config.num_kv_blocks is None:
            self.kv_cache = self._kv_memory(text_config, self._num_blocks_that_fit(text_config))
            self.decoder.kv_cache = self.kv_cache
        self.num_kv_blocks: int = self.kv_cache.shape[2]
        self.workspace = self._workspace()
        self.tables = _BlockTables(self.max_rows, -(-self.max_model_len // config.block_size), self.device)
        self.graphs: dict[int, _Graph] = {}
        pool = torch.cuda.graph_pool_handle()
        self._capture_graphs(pool)
        self.prompt_graphs = PromptGraphs(self.decoder, self._prompt_shapes(), self.num_deepstack, pool)

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> Tensor:
        """Logits `[B, V]` of the items that yield a token, in their order; B may be 0."""
        copy_blocks(self.kv_cache, output.block_copies)
        decoding = [item for item in output.scheduled if is_decode(item)]
        prompts = [item for item in output.scheduled if not is_decode(item)]
        logits = []
        if decoding:
            logits.append(self._decode(decoding))
        if prompts:
            batches = [[item] for item in prompts] if self.exact else [prompts]
            logits += [self._prefill(batch) for batch in batches]
        if len(logits) == 1:
            return logits[0]
        if not logits:
            return torch.empty(0, self.decoder.head.shape[0], device=self.device)
        computed = [item for item in decoding + prompts if item.yields_token]
        place = {id(item): row for row, item in enumerate(computed)}
        order = [place[id(item)] for item in output.scheduled if item.yields_token]
        joined = torch.cat(logits)
        return joined if order == list(range(len(order))) else joined[to_device(self.device, order)]

    def remember_tokens(self, token_ids_B: Tensor, requests: Sequence[Request]) -> None:
        # Where nothing could be chosen any token will do: the request has ended.
        torch.clamp(token_ids_B, min=0, out=self.previous_tokens[: len(token_ids_B)])
        for row, request in enumerate(requests):
            request.pending_row = row

    def _decode(self, items: list[ScheduledRequest]) -> Tensor:
        num_rows = len(items)
        bucket = _at_least(num_rows, self.graphs)
        graph = self.graphs[bucket]
        inputs = np.zeros((4, bucket), np.int32)
        inputs[1] = -1
        inputs[:, :num_rows] = np.array([_decode_inputs(item.request, item.start) for item in items], np.int32).T
        graph.inputs.copy_(torch.from_numpy(inputs).pin_memory(), non_blocking=True)
        self.tables.update([item.request for item in items])
        graph.graph.replay()
        # Those of a preempted request's own tokens, which are computed anew one by one in `exact`, choose nothing.
        yielding = [row for row, item in enumerate(items) if item.yields_token]
        if len(yielding) < num_rows:
            return graph.logits_BV[to_device(self.device, yielding, torch.long)]
        return graph.logits_BV[:num_rows]

    def _prefill(self, items: list[ScheduledRequest]) -> Tensor:
        rows = packed_rows(items)
        images = packed_images(items, rows)
        needed = _shape_of(items)
        graph = self.prompt_graphs.find(needed)
        shape = self._launched_shape(needed) if graph is None else graph.shape
        token_ids = [token for item in items for token in item.request.token_ids(item.start, item.num_context_tokens)]
        embeds_TD: Tensor = self.language_model.embed_tokens(
            to_device(self.device, token_ids + [0] * (shape.num_rows - len(token_ids)))
        )
        for image in images:
            features = image.embedding.features[image.embedding_rows]
            embeds_TD[image.rows] = features.to(self.device, self.dtype, non_blocking=True)
        batch = self._prompt_batch(items, images, shape)
        hidden_TD = self.decoder.prefill(embeds_TD, batch) if graph is None else graph.replay(embeds_TD, batch)
        last_rows = [span.stop - 1 for item, span in zip(items, rows, strict=True) if item.yields_token]
        if not last_rows:
            return hidden_TD.new_empty(0, len(self.decoder.head))
        plan = self._plan(len(last_rows))
        return self.decoder.logits(hidden_TD[to_device(self.device, last_rows)], plan, self.workspace)

    def _launched_shape(self, needed: PromptShape) -> PromptShape:
        chunk = self.config.prefill_chunk_size
        return replace(needed, num_rows=chunk, max_query=chunk) if self.exact else needed

    def _prompt_batch(
        self, items: list[ScheduledRequest], images: list[PackedImage], shape: PromptShape
    ) -> PromptBatch:
        positions_3T = torch.cat([positions_of(item.request, item.start, item.num_context_tokens) for item in items], 1)
        num_missing = shape.num_rows - positions_3T.shape[1]
        positions_3T = torch.nn.functional.pad(positions_3T, (0, num_missing))
        cosines, sines = self._rotations(to_device(self.device, positions_3T))
        slots = [self._slots(item.request, item.start, item.num_context_tokens) for item in items]
        slots.append(np.full(num_missing, -1))
        seen = [self._slots(item.request, 0, item.num_context_tokens) for item in items] if shape.num_slots else []
        seen.append(np.zeros(shape.num_slots - sum(map(len, seen)), np.int64))
        no_more = [0] * (shape.num_sequences - len(items))
        lengths = [item.num_scheduled_tokens for item in items] + no_more
        contexts = [item.num_context_tokens for item in items] + no_more
        return PromptBatch(
            cosines,
            sines,
            to_device(self.device, np.concatenate(slots)),
            to_device(self.device, np.cumsum([0, *lengths]), torch.int32),
            to_device(self.device, np.cumsum([0, *contexts]), torch.int32),
            max_query=shape.max_query,
            max_context=shape.max_context,
            context_slots=to_device(self.device, np.concatenate(seen)) if shape.num_slots else None,
            deepstack_TD=self._deepstack(images, shape.num_rows),
        )

    def _rotations(self, positions_3T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[T, E]` in the model's dtype, by the model's own rule for the three axes."""
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        cosines, sines = self.language_model.rotary_emb(probe, rotary_position_ids(positions_3T, self.uses_mrope))
        return cosines[0].contiguous(), sines[0].contiguous()

    def _deepstack(self, images: list[PackedImage], num_rows: int) -> tuple[Tensor, ...]:
        """`[T, D]` for each layer whose output gets rows of images added; zeros elsewhere."""
        added = tuple(self.decoder.head.new_zeros(self.num_deepstack, num_rows, self.decoder.head.shape[1]))
        for image in images:
            for layer_TD, rows_ND in zip(added, image.embedding.deepstack, strict=True):
                rows = rows_ND[image.embedding_rows]
                layer_TD[image.rows] = rows.to(self.device, self.dtype, non_blocking=True)
        return added

    def _slots(self, request: Request, start: int, end: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        tokens = np.arange(start, end)
        size = self.config.block_size
        return np.asarray(request.block_table)[tokens // size] * size + tokens % size

    def _sizes(self) -> list[int]:
        """Of the decode graphs."""
        return sorted({*(size for size in BUCKETS if size < self.max_rows), self.max_rows})

    def _prompt_shapes(self) -> list[PromptShape]:
        return prompt_shapes(self.config, self.max_model_len, exact=self.exact)

    def _capture_graphs(self, pool: Any) -> None:
        for size in reversed(self._sizes()):  # the largest first, whose memory the others share
            inputs = torch.zeros(4, size, dtype=torch.int32, device=self.device)
            plan = self._plan(size)
            self._decode_rows(inputs, plan)  # compiles what is new
            graph = torch.cuda.CUDAGraph()
            with no_collection(), torch.cuda.graph(graph, pool=pool):
                logits_BV = self._decode_rows(inputs, plan)
            self.graphs[size] = _Graph(graph, inputs, logits_BV)
        self.graphs = dict(sorted(self.graphs.items()))

    @torch.inference_mode()
    def _decode_rows(self, inputs_4B: Tensor, plan: Plan) -> Tensor:
        token_ids, sources, lengths, positions = inputs_4B
        known = sources < 0
        previous = self.previous_tokens[sources.clamp(min=0)]
        token_ids_B = torch.where(known, token_ids, previous)
        batch = DecodeBatch(self.tables.device_tables, lengths, positions)
        return self.decoder.decode(self.language_model.embed_tokens(token_ids_B), batch, plan, self.workspace)

    def _kv_memory(self, text_config: Any, num_blocks: int) -> Tensor:
        shape = kv_cache_shape(text_config, num_blocks, self.config.block_size)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _plan(self, num_rows: int) -> Plan:
        return plan_for(num_rows, self.decoder, exact=self.exact)

    def _workspace(self) -> Workspace:
        """Enough for the attention and the split products of any step."""
        hidden_size, num_heads = self.decoder.head.shape[1], self.decoder.num_heads
        head_size = self.kv_cache.shape[-1]
        num_partials = 0
        for size in self._sizes():
            plan = self._plan(size)
            product_splits = max((tile.num_splits for tile in plan.tiles.values()), default=0)
            attention = num_heads * plan.num_splits * (head_size + 1)
            num_partials = max(num_partials, size * max(product_splits * hidden_size, attention))
        return Workspace.allocate(num_partials, 1 << 16, self.device)

    def _num_blocks_that_fit(self, text_config: Any) -> int:
        """KV blocks in `gpu_memory_utilization` of the device, beside all else that is there while the longest step is
        computed."""
        num_tokens = self.config.max_num_batched_tokens
        torch.cuda.reset_peak_memory_stats(self.device)
        self._profile(num_tokens)
        free, total = torch.cuda.mem_get_info(self.device)
        stats = torch.cuda.memory_stats(self.device)
        reserved = stats["reserved_bytes.all.current"]
        peak = stats["allocated_bytes.all.peak"] - self.kv_cache.nbytes
        others = total - free - reserved  # contexts, and what other processes hold
        # Each graph keeps its logits; drawing tokens takes three int64 and two float32 for each of the largest step's.
        per_logit = sum(self._sizes()) * self.dtype.itemsize + self.max_rows * (3 * 8 + 2 * 4)
        graphs = per_logit * len(self.decoder.head) + num_graph_bytes(
            self.decoder, self._prompt_shapes(), self.num_deepstack
        )
        share = self.config.gpu_memory_utilization or DEFAULT_GPU_MEMORY_UTILIZATION
        available = int(total * share) - others - peak - graphs
        block_bytes = self.kv_cache.nbytes // self.kv_cache.shape[2]
        num_blocks: int = available // block_bytes
        if num_blocks < 2:
            raise ValueError(
                f"gpu_memory_utilization {share} of {total / 2**30:.1f} GiB leaves no KV "
                f"memory beside {(others + peak + graphs) / 2**30:.1f} GiB of weights and activations"
            )
        return num_blocks

    @torch.inference_mode()
    def _profile(self, num_tokens: int) -> None:
        """Computes the longest prompt batch, and the logits of the most rows."""
        ids = torch.zeros(num_tokens, dtype=torch.long, device=self.device)
        positions_3T = torch.arange(num_tokens, device=self.device).expand(3, -1)
        starts = torch.tensor([0, num_tokens], dtype=torch.int32, device=self.device)
        slots = torch.arange(num_tokens, device=self.device)
        deepstack = self._deepstack([], num_tokens)
        batch = PromptBatch(
            *self._rotations(positions_3T), slots, starts, starts, num_tokens, num_tokens, None, deepstack
        )
        hidden_TD = self.decoder.prefill(self.language_model.embed_tokens(ids), batch)
        self.decoder.logits(hidden_TD[: self.max_rows], Plan({}), None)
        torch.cuda.synchronize(self.device)


class _BlockTables:
    """The block tables of the rows, on the host and on the device; from step to step only what changed is written."""

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        self.device_tables = torch.zeros(num_rows, width, dtype=torch.int32, device=device)
        self._tables = np.zeros((num_rows, width), np.int32)
        self._rows: list[list[int] | None] = [None] * num_rows
        self._lengths = [0] * num_rows

    def update(self, requests: list[Request]) -> None:
        changed = False
        for row, request in enumerate(requests):
            table = request.block_table
            length = self._lengths[row]
            if self._rows[row] is not table:
                length = 0
            elif length == len(table) and self._tables[row, length - 1] == table[-1]:
                continue
            start = max(0, length - 1)  # a copied block takes the place of the last one
            self._tables[row, start : len(table)] = table[start:]
            self._rows[row], self._lengths[row] = table, len(table)
            changed = True
        if changed:
            width = max(self._lengths[: len(requests)])
            tables = torch.from_numpy(self._tables[: len(requests), :width].copy()).pin_memory()
            self.device_tables[: len(requests), :width] = tables.to(self.device_tables.device, non_blocking=True)


def is_decode(item: ScheduledRequest) -> bool:
    """Whether the item is one generated token, and not a piece of a prompt."""
    return item.num_scheduled_tokens == 1 and item.start >= item.request.num_prompt_tokens


def _shape_of(items: Sequence[ScheduledRequest]) -> PromptShape:
    """Of a batch without padding."""
    lengths = [item.num_scheduled_tokens for item in items]
    contexts = [item.num_context_tokens for item in items]
    num_slots = sum(contexts) if any(item.start for item in items) else 0
    return PromptShape(sum(lengths), num_slots, len(items), max(lengths), max(contexts))


def _decode_inputs(request: Request, index: int) -> tuple[int, int, int, int]:
    """A column of a graph's inputs: token `index` and -1, or 0 and the row at which the step before has it; the length
    with it, and its position."""
    place = index - request.num_prompt_tokens
    is_known = place < len(request.output_token_ids)
    token, row = (request.output_token_ids[place], -1) if is_known else (0, request.pending_row)
    return token, row, index + 1, request.next_position + place
