"""Triton kernels of the vision tower on CUDA: several of transformers' elementwise operations in one, with their bits.

N: patches; H: heads; E: head size.
"""

# The kernels are in Triton's language, which has its own types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32
_BLOCK = 1024


@triton.jit
def _rotate_kernel(qkv, cos, sin, out, N, H: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # a head of a patch
    part, column = tl.program_id(1), tl.arange(0, HALF)[None, :]
    patch, head = row // H, row % H
    mask = (patch < N) & (column < E // 2)
    source = qkv + ((patch * 3 + part) * H + head) * E + column
    first = tl.load(source, mask).to(tl.float32)
    second = tl.load(source + E // 2, mask).to(tl.float32)
    angle = patch * E + column
    target = out + (part.to(tl.int64) * N * H + row) * E + column
    tl.store(target, first * tl.load(cos + angle, mask) + -second * tl.load(sin + angle, mask), mask)
    angle += E // 2
    tl.store(target + E // 2, second * tl.load(cos + angle, mask) + first * tl.load(sin + angle, mask), mask)


def rotate_queries_and_keys(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[N, 3, H, E]` and float32 angles `[N, E]` to rotated queries and keys `[2, N, H, E]`.

    The arithmetic of transformers' `apply_rotary_pos_emb_vision`: float32, each product rounded before the sum.
    """
    num_patches, _, num_heads, head_size = qkv.shape
    out = torch.empty(2, num_patches, num_heads, head_size, dtype=qkv.dtype, device=qkv.device)
    _rotate_kernel[(triton.cdiv(num_patches * num_heads, _ROWS), 2)](
        qkv.contiguous(),
        cos,
        sin,
        out,
        num_patches,
        H=num_heads,
        E=head_size,
        ROWS=_ROWS,
        HALF=triton.next_power_of_2(head_size // 2),
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def _look_up_kernel(x, table, out, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    bits = tl.load(x + offsets, mask).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    tl.store(out + offsets, tl.load(table + bits, mask), mask)


def look_up(x: Tensor, table: Tensor) -> Tensor:
    """`table[bits of x]` for every element of a contiguous tensor of a 16-bit type; `table` has 65,536 values."""
    out = torch.empty_like(x)
    _look_up_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, table, out, x.numel(), BLOCK=_BLOCK)
    return out
