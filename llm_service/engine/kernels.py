"""Triton kernels of the decoder on CUDA. No row's bits depend on the other rows of a call.

Every sum has a fixed order: a matrix product runs over K in blocks from the left, attention over a share of the context
that follows from the sequence's own length. How many rows and columns a program computes changes no sum.

B, T: rows; D: hidden size; K, N: input and output size of a product; H, G: query and key heads; E: head size.
"""

# The kernels are in Triton's language, which has its own types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut: rows x columns of a program, the step along K, programs along K, and Triton's own two."""

    rows: int
    columns: int
    inner: int
    num_splits: int = 1
    num_warps: int = 4
    num_stages: int = 4


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x,  # [B, K]
    weight,  # [N, K], or [2 N, K] if GATED: gate above up
    bias,  # [N]
    residual,  # [B, N]
    out,  # [B, N]
    partials,  # float32 [SPLITS, B, N]
    counters,  # int32, one a tile, all zero before and after
    num_rows,
    K: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < N
    x_tile = x + rows[:, None].to(tl.int64) * K
    weight_tile = weight + columns[:, None].to(tl.int64) * K
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    ups = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(2) * (K // SPLITS)
    for start in range(0, K // SPLITS, INNER):
        inner = first + start + tl.arange(0, INNER)
        values = tl.load(x_tile + inner[None, :], mask=is_row[:, None], other=0.0)
        weights = tl.load(weight_tile + inner[None, :], mask=is_column[:, None], other=0.0)
        products = tl.dot(values, tl.trans(weights), products)
        if GATED:
            weights = tl.load(weight_tile + N * K + inner[None, :], mask=is_column[:, None], other=0.0)
            ups = tl.dot(values, tl.trans(weights), ups)
    places = rows[:, None].to(tl.int64) * N + columns[None, :]
    is_place = is_row[:, None] & is_column[None, :]
    if SPLITS > 1:
        # Who comes last adds up all shares, in their order.
        size = num_rows.to(tl.int64) * N
        tl.store(partials + tl.program_id(2) * size + places, products, mask=is_place)
        tl.debug_barrier()
        counter = counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(counter, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(counter, 0)
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for split in range(SPLITS):
            products += tl.load(partials + split * size + places, mask=is_place, other=0.0, cache_modifier=".cg")
    if GATED:  # rounded as if both had been written out
        dtype: tl.constexpr = out.dtype.element_ty
        products, ups = products.to(dtype).to(tl.float32), ups.to(dtype).to(tl.float32)
        products = products * tl.sigmoid(products) * ups
    if BIAS:
        products += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        products += tl.load(residual + places, mask=is_place, other=0.0).to(tl.float32)
    tl.store(out + places, products.to(out.dtype.element_ty), mask=is_place)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Scratch memory of the kernels of one step; they run one after the other."""

    partials: Tensor  # float32
    counters: Tensor  # int32, zeros

    @classmethod
    def allocate(cls, num_partials: int, num_tiles: int, device: torch.device) -> "Workspace":
        return cls(
            torch.empty(num_partials, dtype=torch.float32, device=device),
            torch.zeros(num_tiles, dtype=torch.int32, device=device),
        )


def linear(
    x_BK: Tensor,
    weight_NK: Tensor,
    tile: Tile,
    workspace: Workspace,
    *,
    out_BN: Tensor,
    bias_N: Tensor | None = None,
    residual_BN: Tensor | None = None,
    gated: bool = False,
) -> None:
    """`out = linear(x) + residual`, the last if given; with `gated`, `silu(gate) * up` of a weight that has the gate's
    rows above the up projection's. `residual` and `out` may be the same memory."""
    num_rows, size_k = x_BK.shape
    size_n = out_BN.shape[1]
    assert size_k % (tile.inner * tile.num_splits) == 0 and not (gated and tile.num_splits > 1)
    grid = (triton.cdiv(num_rows, tile.rows), triton.cdiv(size_n, tile.columns), tile.num_splits)
    _linear_kernel[grid](
        x_BK,
        weight_NK,
        bias_N,
        residual_BN,
        out_BN,
        workspace.partials,
        workspace.counters,
        num_rows,
        K=size_k,
        N=size_n,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        SPLITS=tile.num_splits,
        BIAS=bias_N is not None,
        RESIDUAL=residual_BN is not None,
        GATED=gated,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@triton.jit
def _rms_norm_kernel(x, weight, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, PADDED)
    is_place = places < SIZE
    values = tl.load(x + row * SIZE + places, mask=is_place, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + eps)
    dtype: tl.constexpr = out.dtype.element_ty
    normalized = (values * scale).to(dtype).to(tl.float32)  # rounded where transformers rounds
    result = normalized * tl.load(weight + places, mask=is_place, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + places, result.to(dtype), mask=is_place)


def rms_norm(x_BD: Tensor, weight_D: Tensor, eps: float, *, out_BD: Tensor) -> None:
    size = x_BD.shape[1]
    _rms_norm_kernel[(len(x_BD),)](
        x_BD, weight_D, out_BD, eps, SIZE=size, PADDED=triton.next_power_of_2(size), num_warps=4
    )


@triton.jit
def _gate_kernel(gate_up, out, SIZE: tl.constexpr, PLACES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    is_place = places < SIZE
    gate = tl.load(gate_up + row * (2 * SIZE) + places, mask=is_place, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * SIZE) + SIZE + places, mask=is_place, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * SIZE + places, result.to(out.dtype.element_ty), mask=is_place)


def silu_and_multiply(gate_up_BI: Tensor, *, out_BI: Tensor) -> None:
    """`silu(gate) * up` of `[B, 2 I]`, gate first."""
    num_rows, size = out_BI.shape
    _gate_kernel[(num_rows, triton.cdiv(size, 2048))](gate_up_BI, out_BI, SIZE=size, PLACES=2048, num_warps=4)


@triton.jit
def _normalized(halves_1, halves_2, weight, places, HALF: tl.constexpr, eps):
    """RMS norm of head vectors that lie in two halves [rows, HALF]."""
    squares = tl.sum(halves_1 * halves_1, axis=1) + tl.sum(halves_2 * halves_2, axis=1)
    scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    weight_1 = tl.load(weight + places).to(tl.float32)[None, :]
    weight_2 = tl.load(weight + HALF + places).to(tl.float32)[None, :]
    return halves_1 * scale * weight_1, halves_2 * scale * weight_2


@triton.jit(do_not_specialize=["table_width"])
def _attention_kernel(
    qkv,  # [B, (H + 2 G) E]
    rotations,  # [positions, E]: cosines of E / 2 frequencies, then sines
    q_norm,  # [E]
    k_norm,  # [E]
    key_cache,  # [blocks, block_size, G, E]
    value_cache,
    block_tables,  # int32 [B, table_width]
    lengths,  # int32 [B]: tokens of the context with the new one; 0 where a row is padding
    positions,  # int32 [B]: of the new token in the rotary embedding
    partial_out,  # float32 [B, H, SPLITS, E]
    partial_weight,  # float32 [B, H, SPLITS]: binary logarithm of the softmax's denominator
    out,  # [B, H E]
    table_width,
    scale,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,  # H / G, up to a power of two of at least 16
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,  # of the context, in one turn of the loop
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
):
    row, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    HALF: tl.constexpr = E // 2
    PER_GROUP: tl.constexpr = H // G
    half, whole = tl.arange(0, HALF), tl.arange(0, E)
    heads = tl.arange(0, GROUP)
    is_head = heads < PER_GROUP
    length = tl.load(lengths + row)
    past = tl.maximum(length - 1, 0)
    share = tl.cdiv(tl.cdiv(past, SPLITS), TOKENS) * TOKENS
    start, end = split * share, tl.minimum((split + 1) * share, past)
    rotation = rotations + tl.load(positions + row) * E + half
    cosines, sines = tl.load(rotation).to(tl.float32)[None, :], tl.load(rotation + HALF).to(tl.float32)[None, :]

    row_qkv = qkv + row.to(tl.int64) * ((H + 2 * G) * E)
    query = row_qkv + (group * PER_GROUP + heads)[:, None] * E + half[None, :]
    query_1 = tl.load(query, mask=is_head[:, None], other=0.0).to(tl.float32)
    query_2 = tl.load(query + HALF, mask=is_head[:, None], other=0.0).to(tl.float32)
    if NORM:
        query_1, query_2 = _normalized(query_1, query_2, q_norm, half, HALF, eps)
    dtype: tl.constexpr = key_cache.dtype.element_ty
    rotated_1 = (query_1 * cosines - query_2 * sines).to(dtype)
    rotated_2 = (query_2 * cosines + query_1 * sines).to(dtype)

    maximum = tl.full([GROUP], float("-inf"), tl.float32)
    denominator = tl.zeros([GROUP], tl.float32)
    result = tl.zeros([GROUP, E], tl.float32)
    if split == 0:  # the new token: its key and value are kept, and seen first
        key = row_qkv + (H + group) * E + half[None, :]
        key_1, key_2 = tl.load(key).to(tl.float32), tl.load(key + HALF).to(tl.float32)
        if NORM:
            key_1, key_2 = _normalized(key_1, key_2, k_norm, half, HALF, eps)
        new_1 = (key_1 * cosines - key_2 * sines).to(dtype)
        new_2 = (key_2 * cosines + key_1 * sines).to(dtype)
        new_value = tl.load(row_qkv + (H + G + group) * E + whole)[None, :]
        if length > 0:
            block = tl.load(block_tables + row * table_width + past // BLOCK_SIZE)
            slot = ((block.to(tl.int64) * BLOCK_SIZE + past % BLOCK_SIZE) * G + group) * E
            tl.store(key_cache + slot + half[None, :], new_1)
            tl.store(key_cache + slot + HALF + half[None, :], new_2)
            tl.store(value_cache + slot + whole[None, :], new_value)
        scores = tl.sum(rotated_1.to(tl.float32) * new_1.to(tl.float32), axis=1)
        scores += tl.sum(rotated_2.to(tl.float32) * new_2.to(tl.float32), axis=1)
        maximum = scores * (scale * LOG2_E)
        denominator += 1.0
        result += new_value.to(tl.float32)

    for first in range(start, end, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        is_token = tokens < end
        blocks = tl.load(block_tables + row * table_width + tokens // BLOCK_SIZE, mask=is_token, other=0)
        slots = ((blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE) * G + group) * E
        keys_1 = tl.load(key_cache + slots[:, None] + half[None, :], mask=is_token[:, None], other=0.0)
        keys_2 = tl.load(key_cache + slots[:, None] + HALF + half[None, :], mask=is_token[:, None], other=0.0)
        scores = tl.dot(rotated_1, tl.trans(keys_1))
        scores = tl.dot(rotated_2, tl.trans(keys_2), scores) * (scale * LOG2_E)
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        rescale = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum[:, None])
        denominator = denominator * rescale + tl.sum(weights, axis=1)
        values = tl.load(value_cache + slots[:, None] + whole[None, :], mask=is_token[:, None], other=0.0)
        result = tl.dot(weights.to(dtype), values, result * rescale[:, None])
        maximum = new_maximum

    places = row * H + group * PER_GROUP + heads
    result = result / tl.maximum(denominator, 1e-30)[:, None]
    if SPLITS == 1:
        tl.store(out + places[:, None] * E + whole[None, :], result.to(dtype), mask=is_head[:, None])
    else:
        places = places * SPLITS + split
        tl.store(partial_out + places[:, None] * E + whole[None, :], result, mask=is_head[:, None])
        # An empty share has no weight.
        weight = tl.where(denominator > 0, maximum + tl.log2(tl.maximum(denominator, 1e-30)), float("-inf"))
        tl.store(partial_weight + places, weight, mask=is_head)


@triton.jit
def _rotate_kernel(
    qkv,  # [T, (H + 2 G) E]; its queries and keys are rotated in place
    cosines,  # [T, E], of which the second half repeats the first
    sines,
    q_norm,  # [E]
    k_norm,  # [E]
    key_cache,  # [slots, G, E]
    value_cache,
    slots,  # int64 [T]; below 0 where a row is padding
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    HEADS: tl.constexpr,  # H + G, up to a power of two
    NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = E // 2
    half, heads = tl.arange(0, HALF), tl.arange(0, HEADS)
    is_head = (heads < H + G)[:, None]
    is_key = ((heads >= H) & (heads < H + G))[:, None]
    vectors = qkv + row * ((H + 2 * G) * E) + heads[:, None] * E + half[None, :]
    first = tl.load(vectors, mask=is_head, other=0.0).to(tl.float32)
    second = tl.load(vectors + HALF, mask=is_head, other=0.0).to(tl.float32)
    if NORM:
        query_1, query_2 = _normalized(first, second, q_norm, half, HALF, eps)
        key_1, key_2 = _normalized(first, second, k_norm, half, HALF, eps)
        first, second = tl.where(is_key, key_1, query_1), tl.where(is_key, key_2, query_2)
    cosine = tl.load(cosines + row * E + half).to(tl.float32)[None, :]
    sine = tl.load(sines + row * E + half).to(tl.float32)[None, :]
    dtype: tl.constexpr = qkv.dtype.element_ty
    rotated_1 = (first * cosine - second * sine).to(dtype)
    rotated_2 = (second * cosine + first * sine).to(dtype)
    tl.store(vectors, rotated_1, mask=is_head)
    tl.store(vectors + HALF, rotated_2, mask=is_head)
    slot = tl.load(slots + row)
    kept = slot * (G * E) + (heads - H)[:, None] * E + half[None, :]
    tl.store(key_cache + kept, rotated_1, mask=is_key & (slot >= 0))
    tl.store(key_cache + kept + HALF, rotated_2, mask=is_key & (slot >= 0))
    values = vectors + G * E  # those of the key heads lie one group further
    tl.store(value_cache + kept, tl.load(values, mask=is_key, other=0.0), mask=is_key & (slot >= 0))
    second_values = tl.load(values + HALF, mask=is_key, other=0.0)
    tl.store(value_cache + kept + HALF, second_values, mask=is_key & (slot >= 0))


def rotate_and_keep(
    qkv_TC: Tensor,
    cosines_TE: Tensor,
    sines_TE: Tensor,
    kv_cache: Tensor,  # [2, blocks, block_size, G, E]
    slots_T: Tensor,
    *,
    num_heads: int,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> None:
    """Rotates queries and keys in place, and keeps keys and values in their slots."""
    num_kv_heads, head_size = kv_cache.shape[-2:]
    _rotate_kernel[(len(qkv_TC),)](
        qkv_TC,
        cosines_TE,
        sines_TE,
        *(norms or (None, None)),
        kv_cache[0],
        kv_cache[1],
        slots_T,
        eps,
        H=num_heads,
        G=num_kv_heads,
        E=head_size,
        HEADS=triton.next_power_of_2(num_heads + num_kv_heads),
        NORM=norms is not None,
        num_warps=4,
    )


@triton.jit
def _combine_kernel(partial_out, partial_weight, out, E: tl.constexpr, SPLITS: tl.constexpr):
    head = tl.program_id(0)  # of all rows
    splits, whole = tl.arange(0, SPLITS), tl.arange(0, E)
    weights = tl.load(partial_weight + head * SPLITS + splits)
    weights = tl.exp2(weights - tl.max(weights, axis=0))
    weights = weights / tl.sum(weights, axis=0)
    shares = tl.load(partial_out + (head * SPLITS + splits)[:, None] * E + whole[None, :])
    result = tl.sum(shares * weights[:, None], axis=0)
    tl.store(out + head * E + whole, result.to(out.dtype.element_ty))


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Where the rows of a decode step are in their sequences."""

    block_tables: Tensor  # int32 [B, table_width]
    lengths: Tensor  # int32 [B], with the new token; 0 for padding
    positions: Tensor  # int32 [B]


def decode_attention(
    qkv_BC: Tensor,
    batch: DecodeBatch,
    kv_cache: Tensor,  # [2, blocks, block_size, G, E]
    rotations: Tensor,
    workspace: Workspace,
    *,
    out_BC: Tensor,
    num_heads: int,
    num_splits: int,
    scale: float,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """Rotates the new queries and keys, keeps keys and values in their slots, and attends to the whole context.

    The context is cut into `num_splits` (a power of two) shares of one sequence's own length, computed apart and
    combined, as in FlashDecoding (Dao et al., 2023).
    """
    num_rows = len(qkv_BC)
    _, _, block_size, num_kv_heads, head_size = kv_cache.shape
    num_partials = num_rows * num_heads * num_splits
    partial_out = workspace.partials
    partial_weight = workspace.partials[num_partials * head_size :]
    _attention_kernel[(num_rows, num_kv_heads, num_splits)](
        qkv_BC,
        rotations,
        *(norms or (None, None)),
        kv_cache[0],
        kv_cache[1],
        batch.block_tables,
        batch.lengths,
        batch.positions,
        partial_out,
        partial_weight,
        out_BC,
        batch.block_tables.stride(0),
        scale,
        eps,
        H=num_heads,
        G=num_kv_heads,
        E=head_size,
        GROUP=max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        BLOCK_SIZE=block_size,
        TOKENS=64,
        SPLITS=num_splits,
        NORM=norms is not None,
        num_warps=4,
        num_stages=2,
    )
    if num_splits > 1:
        _combine_kernel[(num_rows * num_heads,)](
            partial_out, partial_weight, out_BC, E=head_size, SPLITS=num_splits, num_warps=2
        )
