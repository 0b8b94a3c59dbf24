"""Paged attention for transformers' attention interface: packed sequences in, keys and values in blocks.

A plain reference in SDPA on any device: one call a sequence, or one for all sequences of a single row, whose contexts
are padded to the longest, where bits may depend on company. Importing this module registers it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

# transformers builds a mask only for names in its mask registry; under this one the metadata below says it all.
ATTENTION_IMPLEMENTATION = "fovea_paged"


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One sequence's share of a packed forward. Its queries are the last rows of its context."""

    rows: slice
    blocks: Tensor  # [num_blocks] of the context, in order
    num_context_tokens: int
    mask: Tensor | None  # [num_rows, num_context_tokens], causal; None for a single row, which sees everything


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Sequences of one row each, attended to in one call."""

    rows: Tensor  # [B], of the packed forward
    blocks: Tensor  # [B, most blocks]; behind a context's end any
    mask: Tensor  # [B, tokens of the most blocks], 0 in a context and -inf behind it
    shortest_context: int


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """What attention must know about one packed forward. Rows after those in `slot_mapping` are padding."""

    kv_cache: Tensor  # [layers, 2, blocks, block_size, kv_heads, head_dim]
    slot_mapping: Tensor  # [T]: where each new row's key and value go, as block * block_size + offset
    sequences: list[PackedSequence]
    single_rows: PackedRows | None = None


def causal_mask(num_rows: int, num_context_tokens: int, device: torch.device) -> Tensor | None:
    if num_rows == 1:
        return None
    mask = torch.ones(num_rows, num_context_tokens, dtype=torch.bool, device=device)
    return mask.tril(num_context_tokens - num_rows)


def paged_attention(
    module: Any,
    query: Tensor,  # [1, heads, T, head_dim], rotated, as are the keys
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    attention_metadata: AttentionMetadata,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Writes the new keys and values to their slots, then attends; returns `[1, T, heads, head_dim]`."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    kv_cache = attention_metadata.kv_cache[module.layer_idx]
    key_cache, value_cache = kv_cache
    _write(key_cache, key, attention_metadata.slot_mapping)
    _write(value_cache, value, attention_metadata.slot_mapping)
    single_rows = attention_metadata.single_rows
    if single_rows is not None and not attention_metadata.sequences:  # then these are all rows, in their order
        return _attend_from_rows(query, kv_cache, single_rows, scaling)[None], None
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for sequence in attention_metadata.sequences:
        attended = F.scaled_dot_product_attention(
            query[sequence.rows].transpose(0, 1)[None],
            _context(key_cache, sequence),
            _context(value_cache, sequence),
            attn_mask=sequence.mask,
            scale=scaling,
            enable_gqa=True,
        )
        output[sequence.rows] = attended[0].transpose(0, 1)
    if single_rows is not None:
        output[single_rows.rows] = _attend_from_rows(query[single_rows.rows], kv_cache, single_rows, scaling)
    return output[None], None


def _attend_from_rows(query_BHE: Tensor, kv_cache: Tensor, rows: PackedRows, scaling: float) -> Tensor:
    gathered = kv_cache.index_select(1, rows.blocks.flatten())
    keys, values = gathered.view(2, *rows.mask.shape, *kv_cache.shape[-2:]).transpose(2, 3)
    # What lies behind a context is another's or nobody's, and might not even be finite.
    behind = rows.mask[:, None, rows.shortest_context :, None] < 0
    values[:, :, rows.shortest_context :].masked_fill_(behind, 0.0)
    attended: Tensor = F.scaled_dot_product_attention(
        query_BHE[:, :, None], keys, values, attn_mask=rows.mask[:, None, None], scale=scaling, enable_gqa=True
    )
    return attended[:, :, 0]


def _write(cache: Tensor, rows: Tensor, slot_mapping: Tensor) -> None:
    cache.view(-1, *rows.shape[1:]).index_copy_(0, slot_mapping, rows[: len(slot_mapping)])


def _context(cache: Tensor, sequence: PackedSequence) -> Tensor:
    """`[1, kv_heads, num_context_tokens, head_dim]`, gathered; never longer, because padding would change bits."""
    return cache[sequence.blocks].flatten(0, 1)[: sequence.num_context_tokens].transpose(0, 1)[None]


AttentionInterface.register(ATTENTION_IMPLEMENTATION, paged_attention)
