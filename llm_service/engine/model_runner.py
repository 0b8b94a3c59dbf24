"""One packed forward of the decoder: SchedulerOutput in, logits out. Owns the weights and the KV memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from common.checkpoint import LoadedHalf, text_model_and_head
from common.device import to_device
from common.embedding import VisionEmbedding
from common.families import family_of
from llm_service.config import EngineConfig
from llm_service.engine.attention import (
    ATTENTION_IMPLEMENTATION,
    AttentionMetadata,
    PackedRows,
    PackedSequence,
    causal_mask,
)
from llm_service.engine.request import Request
from llm_service.engine.scheduler import ScheduledRequest, SchedulerOutput

# T: rows of all sequences, packed; D: hidden size; B: sequences that get a token; V: vocabulary.

# A matrix product picks its kernel by its number of rows, and every kernel sums in its own order. From 16 rows on it
# is one kernel on the CPUs that were measured, so `exact` numerics never shows a product fewer.
MIN_EXACT_ROWS = 16
DEFAULT_NUM_KV_BLOCKS = 2048

# Those whose attention is softmax(scale * q k) v and nothing more, so that the paged function computes it whole.
TEXT_MODELS = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen2", "qwen3", "llama", "mistral", "opt"}


@dataclass(frozen=True, slots=True)
class PackedImage:
    """`rows` of the packed batch are placeholders that stand for `embedding_rows` of an image."""

    rows: slice
    embedding: VisionEmbedding
    embedding_rows: slice


class ModelRunner(Protocol):
    """What the engine sees of the device. `is_asynchronous`: `execute()` only launches, and the next step may be
    launched before the tokens of this one are read."""

    is_asynchronous: bool
    num_kv_blocks: int

    def execute(self, output: SchedulerOutput) -> Tensor:
        """Logits `[B, V]`, a row for each scheduled item that yields a token, in their order; B may be 0."""

    def remember_tokens(self, token_ids_B: Tensor, requests: Sequence[Request]) -> None:
        """Keeps the tokens that were chosen on the device, for a step that is launched before the host knows them."""


class TransformersRunner:
    """Calls the text model of the stock class, never its outer forward, which keeps position state between calls.

    Launching and reading back are one on a CPU: when `execute()` returns, the step is computed.
    """

    is_asynchronous = False

    def __init__(self, loaded: LoadedHalf, config: EngineConfig, *, exact: bool) -> None:
        self.device, self.dtype = loaded.device, loaded.dtype
        self.language_model, self.lm_head = text_model_and_head(loaded.model)
        self.embed_tokens: Any = self.language_model.get_input_embeddings()
        self.uses_mrope = family_of(loaded.config).uses_mrope
        self.block_size = config.block_size
        self.exact = exact
        self.min_rows = MIN_EXACT_ROWS if exact else 1
        text_config = self.language_model.config
        check_supported(text_config)
        text_config._attn_implementation = ATTENTION_IMPLEMENTATION
        if config.gpu_memory_utilization is not None:
            raise ValueError(f"gpu_memory_utilization is for the decoder's own kernels on a GPU, not for {self.device}")
        self.num_kv_blocks = config.num_kv_blocks or DEFAULT_NUM_KV_BLOCKS
        shape = kv_cache_shape(text_config, self.num_kv_blocks, config.block_size)
        self.kv_cache = torch.zeros(shape, dtype=self.dtype, device=self.device)

    def remember_tokens(self, token_ids_B: Tensor, requests: Sequence[Request]) -> None:
        pass  # the host knows them

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> Tensor:
        """In float32."""
        scheduled = output.scheduled
        copy_blocks(self.kv_cache, output.block_copies)
        rows = packed_rows(scheduled)
        images = packed_images(scheduled, rows)
        embeds_TD = self._pad(self._embed(scheduled, images))
        hidden_TD: Tensor = self.language_model(
            inputs_embeds=embeds_TD[None],
            position_ids=self._position_ids(scheduled),
            use_cache=False,
            attention_metadata=self._attention_metadata(scheduled, rows),
            **deepstack_arguments(images, len(embeds_TD)),
        ).last_hidden_state[0]
        last_rows = [span.stop - 1 for item, span in zip(scheduled, rows, strict=True) if item.yields_token]
        if not last_rows:  # nothing but the beginnings of prompts: spare the largest product
            return torch.empty(0, self.lm_head.out_features)
        logits_BV: Tensor = self.lm_head(self._pad(hidden_TD[last_rows]))[: len(last_rows)]
        return logits_BV.float()

    def _embed(self, scheduled: list[ScheduledRequest], images: list[PackedImage]) -> Tensor:
        """Embeddings `[T, D]` of the scheduled tokens; image placeholders become the feature rows they stand for."""
        token_ids = [
            token for item in scheduled for token in item.request.token_ids(item.start, item.num_context_tokens)
        ]
        embeds_TD: Tensor = self.embed_tokens(torch.tensor(token_ids, device=self.device))
        for image in images:
            embeds_TD[image.rows] = image.embedding.features[image.embedding_rows].to(embeds_TD, non_blocking=True)
        return embeds_TD

    def _position_ids(self, scheduled: list[ScheduledRequest]) -> Tensor:
        positions = [positions_of(item.request, item.start, item.num_context_tokens) for item in scheduled]
        positions_3T = self._pad(torch.cat(positions, dim=1).T.to(self.device)).T
        return rotary_position_ids(positions_3T, self.uses_mrope)

    def _attention_metadata(self, scheduled: list[ScheduledRequest], rows: list[slice]) -> AttentionMetadata:
        sequences: list[PackedSequence] = []
        slots: list[int] = []
        single: list[tuple[int, list[int], int]] = []  # row, its blocks, its context
        for item, span in zip(scheduled, rows, strict=True):
            start, end, table = item.start, item.num_context_tokens, item.request.block_table
            slots += [table[i // self.block_size] * self.block_size + i % self.block_size for i in range(start, end)]
            blocks = table[: -(-end // self.block_size)]
            if item.num_scheduled_tokens == 1 and not self.exact:
                single.append((span.start, blocks, end))
            else:
                mask = causal_mask(item.num_scheduled_tokens, end, self.device)
                sequences.append(PackedSequence(span, torch.tensor(blocks, device=self.device), end, mask))
        slot_mapping = torch.tensor(slots, device=self.device)
        return AttentionMetadata(self.kv_cache, slot_mapping, sequences, self._single_rows(single))

    def _single_rows(self, single: list[tuple[int, list[int], int]]) -> PackedRows | None:
        if not single:
            return None
        rows, tables, lengths = zip(*single, strict=True)
        width = max(map(len, tables))
        blocks = torch.tensor([table + [0] * (width - len(table)) for table in tables], device=self.device)
        places = torch.arange(width * self.block_size, device=self.device)
        mask = torch.zeros(len(single), len(places), dtype=self.dtype, device=self.device)
        mask.masked_fill_(places >= torch.tensor(lengths, device=self.device)[:, None], -math.inf)
        return PackedRows(torch.tensor(rows, device=self.device), blocks, mask, min(lengths))

    def _pad(self, rows: Tensor) -> Tensor:
        """At least `min_rows` rows, by zeros at the end."""
        num_missing = max(0, self.min_rows - len(rows))
        return torch.cat([rows, rows.new_zeros(num_missing, rows.shape[1])]) if num_missing else rows


def kv_cache_shape(text_config: Any, num_blocks: int, block_size: int) -> tuple[int, ...]:
    """`[layers, 2, blocks, block_size, kv_heads, head_dim]`."""
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    layers = text_config.num_hidden_layers
    kv_heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    return layers, 2, num_blocks, block_size, kv_heads, head_dim


def copy_blocks(kv_cache: Tensor, copies: Sequence[tuple[int, int]]) -> None:
    """Copies KV blocks, pairs of from and to; all are read before one is written."""
    if copies:
        sources, targets = to_device(kv_cache.device, copies).T
        kv_cache[:, :, targets] = kv_cache[:, :, sources]


def packed_rows(scheduled: list[ScheduledRequest]) -> list[slice]:
    """Where each request's rows lie in the packed batch."""
    ends = list(accumulate(item.num_scheduled_tokens for item in scheduled))
    return [slice(start, end) for start, end in pairwise([0, *ends])]


def positions_of(request: Request, start: int, end: int) -> Tensor:
    """Positions `[3, end - start]` of tokens `start` to `end`: the prompt's own, then one more on all axes each."""
    num_prompt_tokens = request.num_prompt_tokens
    answer = torch.arange(max(start, num_prompt_tokens), max(end, num_prompt_tokens))
    answer += request.next_position - num_prompt_tokens
    return torch.cat([request.positions[:, start:end], answer.expand(3, -1)], dim=1)


def rotary_position_ids(positions_3T: Tensor, uses_mrope: bool) -> Tensor:
    """As text models take them: `[3, 1, T]` for M-RoPE, else `[1, T]`, since the three axes are equal."""
    return positions_3T[:, None] if uses_mrope else positions_3T[:1]


def packed_images(scheduled: list[ScheduledRequest], rows: list[slice]) -> list[PackedImage]:
    """The images, or parts of images, among the scheduled tokens, in the order of their rows."""
    images = []
    for item, span in zip(scheduled, rows, strict=True):
        shift = span.start - item.start
        for feature in item.request.mm_features:
            offset = feature.position.offset
            start = max(item.start, offset)
            end = min(item.num_context_tokens, offset + feature.position.length)
            if start < end:
                embedding_rows = slice(start - offset, end - offset)
                images.append(PackedImage(slice(start + shift, end + shift), feature.embedding, embedding_rows))
    return images


def deepstack_arguments(images: list[PackedImage], num_rows: int) -> dict[str, Any]:
    """What makes the text model add rows of images behind its first layers; nothing where there are none to add."""
    parts_of_images = [[rows_ND[image.embedding_rows] for rows_ND in image.embedding.deepstack] for image in images]
    if not any(parts_of_images):
        return {}
    is_image_T = torch.zeros(num_rows, dtype=torch.bool)
    for image in images:
        is_image_T[image.rows] = True
    rows_of_layers = [torch.cat(parts) for parts in zip(*parts_of_images, strict=True)]
    return {"visual_pos_masks": is_image_T[None], "deepstack_visual_embeds": rows_of_layers}


def check_supported(text_config: Any) -> None:
    """Raises ValueError for what this attention and these positions would silently compute wrong."""
    if text_config.model_type not in TEXT_MODELS:
        raise ValueError(f"text model {text_config.model_type!r} is not supported; supported are {sorted(TEXT_MODELS)}")
    layer_types = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention"}
    if layer_types and not (layer_types == {"sliding_attention"} and text_config.sliding_window):
        raise ValueError(f"text models with layers of {sorted(layer_types)} are not supported")
    rope_type = (getattr(text_config, "rope_parameters", None) or {}).get("rope_type")
    if rope_type in ("dynamic", "longrope"):  # their frequencies follow the longest sequence in the batch
        raise ValueError(f"rope type {rope_type!r} is not supported: an answer would depend on its company")
