"""The decoder on CUDA: transformers' weights, and nine kernels a layer where its modules launch about forty.

On one H200 the modules take 20 ms of launches for any prompt below 2,000 tokens, and four times the weights' own time
for a decode step (deploy/bench/NOTES.md). What is computed is the same, rounded in the same places.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from llm_service.engine.kernels import (
    DecodeBatch,
    Tile,
    Workspace,
    decode_attention,
    linear,
    rms_norm,
    rotate_and_keep,
    silu_and_multiply,
)

# B: sequences of a decode step; T: rows of packed prompts; D: hidden size; V: vocabulary; H, G: query and key heads;
# E: head size; I: intermediate size.


@dataclass(frozen=True, slots=True)
class Plan:
    """How the products and the attention of one batch size are cut; a product without a tile is cuBLAS's."""

    tiles: dict[str, Tile]
    num_splits: int = 1  # of the context


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Packed chunks of prompts. `context_slots` are the slots of all tokens that the chunks see, sequence after
    sequence, or None if no chunk has a past and its own rows are all that it sees."""

    cosines: Tensor  # [T, E]
    sines: Tensor
    slots: Tensor  # int64 [T]: where keys and values go; below 0 where a row is padding
    query_starts: Tensor  # int32 [sequences + 1]
    context_starts: Tensor
    max_query: int
    max_context: int
    context_slots: Tensor | None
    deepstack_TD: tuple[Tensor, ...] = ()  # added behind the first layers


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    head_norms: tuple[Tensor, Tensor] | None
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class FusedDecoder:
    """Takes over the weights of a text model of which `is_supported` says yes. q, k and v, and gate and up, lie one
    below the other; the modules keep views of them, so that nothing is held twice."""

    def __init__(self, language_model: Any, lm_head: nn.Linear, kv_cache: Tensor, max_positions: int) -> None:
        config = language_model.config
        self.layers = [_take_over(layer) for layer in language_model.layers]
        self.final_norm: Tensor = language_model.norm.weight
        self.eps: float = language_model.norm.variance_epsilon
        self.head: Tensor = lm_head.weight
        self.kv_cache = kv_cache
        self.num_heads: int = config.num_attention_heads
        self.scale: float = language_model.layers[0].self_attn.scaling
        self.rotations = rotation_table(language_model.rotary_emb, max_positions).to(self.head.dtype)

    def decode(self, embeds_BD: Tensor, batch: DecodeBatch, plan: Plan, workspace: Workspace) -> Tensor:
        """Logits `[B, V]` after one more token of each row, whose keys and values are kept. Overwrites `embeds_BD`."""
        buffers = _Buffers.for_rows(embeds_BD, self.layers[0])

        def attend(layer: _Layer, kv_cache: Tensor) -> None:
            decode_attention(
                buffers.qkv,
                batch,
                kv_cache,
                self.rotations,
                workspace,
                out_BC=buffers.attended,
                num_heads=self.num_heads,
                num_splits=plan.num_splits,
                scale=self.scale,
                norms=layer.head_norms,
                eps=self.eps,
            )

        for layer, kv_cache in zip(self.layers, self.kv_cache, strict=True):
            self._layer(embeds_BD, layer, kv_cache, buffers, attend, plan, workspace)
        return self.logits(embeds_BD, plan, workspace)

    def prefill(self, embeds_TD: Tensor, batch: PromptBatch) -> Tensor:
        """Hidden states `[T, D]` before the last norm, of rows whose keys and values are kept. Overwrites
        `embeds_TD`."""
        buffers = _Buffers.for_rows(embeds_TD, self.layers[0])
        plan = Plan({})

        def attend(layer: _Layer, kv_cache: Tensor) -> None:
            rotate_and_keep(
                buffers.qkv,
                batch.cosines,
                batch.sines,
                kv_cache,
                batch.slots,
                num_heads=self.num_heads,
                norms=layer.head_norms,
                eps=self.eps,
            )
            self._attend_to_prompts(buffers, kv_cache, batch)

        for index, (layer, kv_cache) in enumerate(zip(self.layers, self.kv_cache, strict=True)):
            self._layer(embeds_TD, layer, kv_cache, buffers, attend, plan, None)
            if index < len(batch.deepstack_TD):
                embeds_TD += batch.deepstack_TD[index]
        return embeds_TD

    def logits(self, hidden_BD: Tensor, plan: Plan, workspace: Workspace | None) -> Tensor:
        """`[B, V]` in the model's dtype."""
        normed_BD = torch.empty_like(hidden_BD)
        rms_norm(hidden_BD, self.final_norm, self.eps, out_BD=normed_BD)
        logits_BV = hidden_BD.new_empty(len(hidden_BD), len(self.head))
        _product("head", normed_BD, self.head, logits_BV, plan, workspace)
        return logits_BV

    def _layer(
        self,
        hidden_BD: Tensor,
        layer: _Layer,
        kv_cache: Tensor,
        buffers: "_Buffers",
        attend: Any,
        plan: Plan,
        workspace: Workspace | None,
    ) -> None:
        rms_norm(hidden_BD, layer.input_norm, self.eps, out_BD=buffers.normed)
        _product("qkv", buffers.normed, layer.qkv, buffers.qkv, plan, workspace, bias_N=layer.qkv_bias)
        attend(layer, kv_cache)
        _product("out", buffers.attended, layer.out, hidden_BD, plan, workspace, add=True)
        rms_norm(hidden_BD, layer.post_norm, self.eps, out_BD=buffers.normed)
        if "gate_up" in plan.tiles:
            assert workspace is not None
            linear(buffers.normed, layer.gate_up, plan.tiles["gate_up"], workspace, out_BN=buffers.gated, gated=True)
        else:
            silu_and_multiply(F.linear(buffers.normed, layer.gate_up), out_BI=buffers.gated)
        _product("down", buffers.gated, layer.down, hidden_BD, plan, workspace, add=True)

    def _attend_to_prompts(self, buffers: "_Buffers", kv_cache: Tensor, batch: PromptBatch) -> None:
        num_kv_heads, head_size = kv_cache.shape[-2:]
        heads = buffers.qkv.view(len(buffers.qkv), -1, head_size)
        ends = (self.num_heads, self.num_heads + num_kv_heads)
        query, key, value = heads[:, : ends[0]], heads[:, ends[0] : ends[1]], heads[:, ends[1] :]
        if batch.context_slots is not None:
            key, value = kv_cache.flatten(1, 2)[:, batch.context_slots]
        attended = varlen_attn(
            query,
            key,
            value,
            batch.query_starts,
            batch.context_starts,
            batch.max_query,
            batch.max_context,
            scale=self.scale,
            window_size=(-1, 0),  # causal, aligned at the end
            enable_gqa=True,
            num_splits=1,
        )
        assert isinstance(attended, Tensor)
        buffers.attended.copy_(attended.flatten(1))


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What a layer leaves for its next kernel; the layers share them."""

    normed: Tensor  # [B, D]
    qkv: Tensor  # [B, (H + 2 G) E]
    attended: Tensor  # [B, H E]
    gated: Tensor  # [B, I]

    @classmethod
    def for_rows(cls, hidden_BD: Tensor, layer: _Layer) -> "_Buffers":
        num_rows = len(hidden_BD)
        sizes = (layer.out.shape[0], layer.qkv.shape[0], layer.out.shape[1], layer.down.shape[1])
        return cls(*(hidden_BD.new_empty(num_rows, size) for size in sizes))


def _product(
    name: str,
    x_BK: Tensor,
    weight_NK: Tensor,
    out_BN: Tensor,
    plan: Plan,
    workspace: Workspace | None,
    *,
    bias_N: Tensor | None = None,
    add: bool = False,
) -> None:
    """`out = linear(x)`, or with `add` `out += linear(x)`."""
    if name in plan.tiles:
        assert workspace is not None
        residual = out_BN if add else None
        linear(x_BK, weight_NK, plan.tiles[name], workspace, out_BN=out_BN, bias_N=bias_N, residual_BN=residual)
    elif add:
        torch.addmm(out_BN, x_BK, weight_NK.T, out=out_BN)
    elif bias_N is not None:
        torch.addmm(bias_N, x_BK, weight_NK.T, out=out_BN)
    else:
        torch.mm(x_BK, weight_NK.T, out=out_BN)


def rotation_table(rotary_embedding: Any, num_positions: int) -> Tensor:
    """float32 `[num_positions, E]`: cosines of the E / 2 frequencies, then their sines. The axes of M-RoPE agree at a
    generated token, so that its rotation is the plain one."""
    inv_freq: Tensor = rotary_embedding.inv_freq.float()
    angles = torch.arange(num_positions, device=inv_freq.device)[:, None] * inv_freq
    scaling: float = rotary_embedding.attention_scaling
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * scaling


def is_supported(language_model: Any) -> bool:
    """Whether every layer is RMS norm, grouped-query attention with rotary halves, RMS norm, gated SiLU."""
    layers = getattr(language_model, "layers", None)
    if not layers or not hasattr(language_model, "rotary_emb"):
        return False
    attention: Any = getattr(layers[0], "self_attn", None)
    mlp: Any = getattr(layers[0], "mlp", None)
    products = [getattr(attention, "o_proj", None), *(getattr(mlp, name, None) for name in _MLP)]
    if any(product is None or product.bias is not None for product in products):
        return False
    sizes = (mlp.down_proj.in_features, attention.o_proj.in_features, attention.o_proj.out_features)
    head_size = attention.head_dim
    return (
        language_model.config.hidden_act == "silu"
        and type(layers[0].input_layernorm).__name__.endswith("RMSNorm")
        and head_size >= 32
        and head_size & (head_size - 1) == 0
        and all(size % 128 == 0 for size in sizes)
    )


_MLP = ("gate_proj", "up_proj", "down_proj")


def _take_over(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
    qkv, bias = _fuse([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up, _ = _fuse([mlp.gate_proj, mlp.up_proj])
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=bias,
        head_norms=norms,
        out=attention.o_proj.weight,
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        down=mlp.down_proj.weight,
    )


def _fuse(modules: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases one below the other, of which the modules keep views."""
    ends = [0]
    for module in modules:
        ends.append(ends[-1] + module.out_features)
    weight = torch.cat([module.weight.detach() for module in modules])
    bias = None if modules[0].bias is None else torch.cat([module.bias.detach() for module in modules])
    for module, (start, end) in zip(modules, pairwise(ends), strict=True):
        module.weight = nn.Parameter(weight[start:end], requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias[start:end], requires_grad=False)
    return weight, bias
