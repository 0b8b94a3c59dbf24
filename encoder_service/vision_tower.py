"""The vision tower of Qwen's families on a GPU: transformers' own modules, with fewer launches.

In `exact` numerics every bit is transformers': what is replaced are elementwise operations, by others that compute the
same numbers, and a CUDA graph replays the same kernels. `fast` runs many images in one forward, embeds patches by a
product instead of the 3-D convolution, pads products to sizes that have fast kernels, and replays a graph of the next
larger number of patches. Compiled blocks were slower than these modules (deploy/bench/NOTES.md).
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.activations import QuickGELUActivation
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from common.device import to_device
from common.embedding import Grid
from common.garbage import no_collection
from encoder_service.kernels import look_up, rotate_queries_and_keys

_SIZES = (256, 512, 1024, 1536, 2048, 3072, 4096)  # patches of the graphs for several images
_MAX_GRID_PATCHES = 8192  # of one image with a graph; a forward of more takes longer than its launches
_MAX_GRAPH_IMAGES = 16
_MAX_GRIDS = 32  # with graphs, or whose positions are kept: those that were seen last
_MAX_SEPARATE_SEGMENTS = 32  # `fast`: above it one slower attention for all segments costs less than their launches

_LONGEST = {"cu_seqlens": "max_seqlen", "cu_window_seqlens": "max_window_seqlen"}


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured forward: the tensors that it reads, and the output that it overwrites."""

    graph: torch.cuda.CUDAGraph
    pixel_values: Tensor
    inputs: Mapping[str, Any]
    output: Any

    def replay(self, pixel_values: Tensor, inputs: Mapping[str, Any]) -> Any:
        self.pixel_values[: len(pixel_values)].copy_(pixel_values)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self.inputs[name].copy_(value)
        self.graph.replay()
        num_tokens = len(pixel_values) // (len(self.pixel_values) // len(self.output.pooler_output))
        output = copy.copy(self.output)
        output.pooler_output = output.pooler_output[:num_tokens]
        if deepstack := output.get("deepstack_features"):
            output.deepstack_features = [rows[:num_tokens] for rows in deepstack]
        return output


class VisionTower(nn.Module):
    """In place of transformers' tower, whose modules it changes; weights of a 16-bit type. Not thread-safe."""

    def __init__(self, tower: Any, *, exact: bool) -> None:
        super().__init__()
        self._tower = tower
        self.dtype: torch.dtype = tower.dtype
        self.spatial_merge_size: int = tower.spatial_merge_size
        self._exact = exact
        self._by_size: dict[int, _Graph] = {}
        self._by_grid: OrderedDict[Grid, _Graph] = OrderedDict()
        self._seen: set[Grid] = set()  # as many as there are grids of few patches
        self._pool: Any = None  # memory that the graphs share, since one runs at a time
        self._pixel_values: Tensor | None = None  # what all of them read
        self._grid_inputs = lru_cache(_MAX_GRIDS)(self._compute_grid_inputs)
        for block in tower.blocks:
            block.attn = _Attention(block.attn)
            if isinstance(getattr(block.mlp, "act", None), QuickGELUActivation):
                block.mlp.act = _Tabulated(block.mlp.act, tower.dtype, tower.device)
            if not exact and hasattr(block.mlp, "gate_proj"):
                _pad_neurons(block.mlp)
        if not exact:
            _fuse_rms_norms(tower)
            tower.patch_embed.proj = _LinearPatches(tower.patch_embed.proj)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures the graphs of `fast`, the largest first, so that the others find memory to share."""
        for size in () if self._exact else reversed(_SIZES):
            weight = self._tower.patch_embed.proj.weight
            self._by_size[size] = self._capture(weight.new_zeros(size, weight.shape[1]), self._filled_inputs((), size))

    @torch.inference_mode()
    def forward(self, pixel_values: Tensor, grid_thw: Tensor, **_: object) -> Any:
        """The output of transformers' tower; the next call may overwrite it. `exact` takes one image.

        `pixel_values` is `[N, values of a patch]`, `grid_thw` `[images, 3]`.
        """
        grids: list[Grid] = [tuple(grid) for grid in grid_thw.tolist()]
        if len(grids) == 1 and len(pixel_values) <= _MAX_GRID_PATCHES:
            return self._of_grid(pixel_values, *grids)
        if len(pixel_values) > _SIZES[-1] or not 1 < len(grids) <= _MAX_GRAPH_IMAGES:
            return self._forward(pixel_values, self._inputs(grids))
        size = next(size for size in _SIZES if size >= len(pixel_values))
        return self._by_size[size].replay(pixel_values, self._filled_inputs(grids, size))

    def _of_grid(self, pixel_values: Tensor, grid: Grid) -> Any:
        """One image. A grid that comes again gets a graph of its own: most pictures are of a few sizes."""
        if grid not in self._seen:
            self._seen.add(grid)
            return self._forward(pixel_values, self._inputs([grid]))
        graph = self._by_grid.pop(grid, None) or self._capture(pixel_values, self._inputs([grid]))
        self._by_grid[grid] = graph
        if len(self._by_grid) > _MAX_GRIDS:
            self._by_grid.popitem(last=False)
        return graph.replay(pixel_values, {})

    def _capture(self, pixel_values: Tensor, inputs: Mapping[str, Any]) -> _Graph:
        """Of tensors that nothing else reads, because a replay overwrites them."""
        if self._pixel_values is None:
            self._pixel_values = pixel_values.new_empty(_MAX_GRID_PATCHES, pixel_values.shape[1])
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        return self._record(self._pixel_values[: len(pixel_values)].copy_(pixel_values), own)

    def _record(self, pixel_values: Tensor, inputs: Mapping[str, Any]) -> _Graph:
        self._forward(pixel_values, inputs)  # compiles kernels and allocates workspaces, which a capture must not
        graph = torch.cuda.CUDAGraph()
        with no_collection(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self._forward(pixel_values, inputs)
        self._pool = graph.pool()
        return _Graph(graph, pixel_values, inputs, output)

    def _forward(self, pixel_values: Tensor, inputs: Mapping[str, Any]) -> Any:
        return self._tower(pixel_values, grid_thw=None, **inputs)

    def _inputs(self, grids: Sequence[Grid]) -> dict[str, Any]:
        """What the tower needs of the grids. Segments are on the CPU where each has an attention of its own."""
        inputs = dict(self._grid_inputs(tuple(grids)))
        for name in _LONGEST.keys() & inputs.keys():
            if not self._exact and len(inputs[name]) > _MAX_SEPARATE_SEGMENTS:
                inputs[_LONGEST[name]] = int(inputs[name].diff().max())
                inputs[name] = to_device(self._tower.device, inputs[name])
        return inputs

    def _filled_inputs(self, grids: Sequence[Grid], size: int) -> dict[str, Any]:
        """The same for `size` patches, in tensors of one shape: the patches left over are an image of their own."""
        merge = self._tower.spatial_merge_size
        num_left = size - sum(t * h * w for t, h, w in grids)
        filler: list[Grid] = [(1, merge, num_left // merge)] if num_left else []
        inputs = dict(self._grid_inputs((*grids, *filler)))
        shapes = {"cu_seqlens": (_MAX_GRAPH_IMAGES + 2, size), "cu_window_seqlens": (size // merge**2 + 1, 0)}
        for name in _LONGEST.keys() & inputs.keys():
            length, longest = shapes[name]
            assert len(inputs[name]) <= length, "padding would cut segments off"
            padded = F.pad(inputs[name], (0, length - len(inputs[name])), value=size)
            inputs[name] = to_device(self._tower.device, padded)
            inputs[_LONGEST[name]] = longest or (self._tower.window_size // self._tower.patch_size) ** 2
        return inputs

    def _compute_grid_inputs(self, grids: tuple[Grid, ...]) -> Mapping[str, Any]:
        """By transformers' own functions; segments, `[segments + 1]`, on the CPU, all else on the device."""
        tower, device = self._tower, self._tower.device
        grid_thw = torch.tensor(grids)
        inputs = {
            "position_ids": to_device(device, get_vision_position_ids(grid_thw, tower.spatial_merge_size)),
            "cu_seqlens": get_vision_cu_seqlens(grid_thw),
        }
        if hasattr(tower, "window_size"):
            index, segments = get_vision_window_index(
                grid_thw, tower.spatial_merge_size, tower.window_size, tower.patch_size
            )
            inputs |= {
                "window_index": to_device(device, index),
                "cu_window_seqlens": segments,
                "window_order": _SegmentOrder.by_length(segments.diff().tolist(), device),
            }
        if hasattr(tower, "num_grid_per_side"):
            # on the device, where transformers computes the weights too: their bits depend on it
            inputs["interp_indices"], inputs["interp_weights"] = get_vision_interpolation_indices_and_weights(
                to_device(device, grid_thw),
                tower.num_grid_per_side,
                tower.interpolation_mode,
                tower.interpolation_align_corners,
                tower.spatial_merge_size,
            )
        return inputs


@dataclass(frozen=True, slots=True)
class _SegmentOrder:
    """Segments by length, so that those of one length are neighbours: windows at the edges of an image are smaller."""

    lengths: list[int]  # as they are
    rows: Tensor  # int64 [N], of the patches in order of the lengths
    places: Tensor  # int64 [N], where each patch is then

    @classmethod
    def by_length(cls, lengths: list[int], device: torch.device) -> "_SegmentOrder":
        rows = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths)).argsort(stable=True)
        return cls(lengths, to_device(device, rows), to_device(device, rows.argsort()))


class _Attention(nn.Module):
    """In place of transformers' attention of these towers: the same numbers, rotated by one kernel instead of many."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_heads: int = attention.num_heads
        self.scaling: float = attention.scaling

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        max_seqlen: int | None = None,
        window_order: "_SegmentOrder | None" = None,
        **_: object,
    ) -> Tensor:
        """`[N, hidden]` to `[N, hidden]`; a patch attends to all of its segment, which is an image or a window."""
        qkv = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1)
        query, key = rotate_queries_and_keys(qkv, *position_embeddings)
        value = qkv[:, 2]
        lengths = [] if max_seqlen is not None else cu_seqlens.diff().tolist()
        if window_order is not None and lengths == window_order.lengths:
            order = window_order
            output = _separate_attention(
                query[order.rows], key[order.rows], value[order.rows], sorted(lengths), self.scaling
            )[order.places]
        elif max_seqlen is None:
            output = _separate_attention(query, key, value, lengths, self.scaling)
        else:
            segments = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
            output = varlen_attn(query, key, value, *segments, scale=self.scaling)  # type: ignore[assignment]
        projected: Tensor = self.proj(output.flatten(1))
        return projected


def _separate_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float) -> Tensor:
    """`[N, heads, E]`, with one attention for neighbours of one length."""
    outputs, start = [], 0
    for length, equals in groupby(lengths):
        count = len(list(equals))
        rows = slice(start, start + count * length)
        start += count * length
        q, k, v = (
            tensor[rows].view(count, length, *tensor.shape[1:]).transpose(1, 2) for tensor in (query, key, value)
        )
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


class _Tabulated(nn.Module):
    """An activation as the table of its 65,536 values: one kernel, and exact by construction."""

    def __init__(self, activation: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        with torch.inference_mode():
            values = torch.arange(2**16, device=device).to(torch.int16).view(dtype)
            self.table = nn.Buffer(activation(values), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return look_up(x, self.table)


def _pad_neurons(mlp: Any) -> None:
    """Up to a multiple of 128, with zeros: products of Qwen2.5-VL's 3,420 take three times as long."""
    num_missing = -mlp.gate_proj.out_features % 128
    padding = {"gate_proj": (0, 0, 0, num_missing), "up_proj": (0, 0, 0, num_missing), "down_proj": (0, num_missing)}
    for name, sides in padding.items():
        product = getattr(mlp, name)
        product.weight = nn.Parameter(F.pad(product.weight.detach(), sides), requires_grad=False)
        if product.bias is not None and name != "down_proj":
            product.bias = nn.Parameter(F.pad(product.bias.detach(), (0, num_missing)), requires_grad=False)


def _fuse_rms_norms(tower: Any) -> None:
    """One kernel in place of eight, which round once more on the way."""
    for module in list(tower.modules()):
        for name, child in module.named_children():
            if isinstance(child, Qwen2_5_VLRMSNorm):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)


class _LinearPatches(nn.Module):
    """In place of a 3-D convolution whose stride is its kernel: a product, some of whose bits differ."""

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(convolution.weight.detach().flatten(1), requires_grad=False)
        self.bias = convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.flatten(1), self.weight, self.bias)
