"""The tower for GPUs computes what transformers' tower computes: its bits in `exact`, nearly its numbers in `fast`.

Without a GPU Triton's interpreter runs the kernels, nothing is captured, and the numbers are of float16.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig
from transformers.activations import QuickGELUActivation
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

pytest.importorskip("triton")

from common.embedding import Grid
from encoder_service import vision_tower
from encoder_service.kernels import look_up, rotate_queries_and_keys
from encoder_service.vision_tower import VisionTower

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # Triton's interpreter truncates bfloat16
SMALL = {"depth": 2, "num_heads": 2, "patch_size": 14}
TOWERS = {
    "qwen2_vl": (Qwen2VisionTransformerPretrainedModel, Qwen2VLConfig, {"embed_dim": 160, "hidden_size": 64}),
    "qwen2_5_vl": (
        Qwen2_5_VisionTransformerPretrainedModel,
        Qwen2_5_VLConfig,
        {"hidden_size": 160, "intermediate_size": 320, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (
        Qwen3VLVisionModel,
        Qwen3VLConfig,
        {
            "hidden_size": 160,
            "intermediate_size": 320,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    ),
}
GRIDS: list[Grid] = [(1, 4, 6), (1, 6, 10), (1, 2, 2), (1, 6, 4)]


@pytest.fixture(params=TOWERS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def stock(name: str) -> Any:
    """transformers' tower with seeded random weights."""
    model, config, shape = TOWERS[name]
    torch.manual_seed(0)
    tower = model._from_config(config(vision_config=SMALL | shape).vision_config, dtype=DTYPE).eval().to(DEVICE)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.1)
    return tower


def pixels(grids: Sequence[Grid]) -> Tensor:
    """`[N, values]`, the same for the same grid."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(t * h * w, 3 * 2 * 14**2, generator=generator) for t, h, w in grids]
    return torch.cat(found).to(DEVICE, DTYPE)


def rows(tower: Any, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
    """`[sets, tokens, hidden]`: the features, and behind them those of deepstack."""
    with torch.inference_mode():
        return torch.stack(sets_of(tower(pixel_values, grid_thw=torch.tensor(grids, device=DEVICE))))


def sets_of(output: Any) -> list[Tensor]:
    return [output.pooler_output, *(output.get("deepstack_features") or [])]


def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *_: object, scale: float) -> Tensor:
    """What torch's `varlen_attn`, which is for CUDA only, computes."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for start, end in zip(starts.tolist(), starts[1:].tolist(), strict=False):
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        output[start:end] = F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
    return output


@pytest.mark.parametrize("shape", [(7, 4, 48), (5, 16, 80), (3, 2, 64)])
def test_rotation_has_the_bits_of_transformers(shape: tuple[int, int, int]) -> None:
    num_patches, num_heads, head_size = shape
    qkv = torch.randn(num_patches, 3, num_heads, head_size, device=DEVICE, dtype=DTYPE)
    cos, sin = torch.randn(2, num_patches, head_size, device=DEVICE)
    expected = torch.stack(apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], cos, sin))
    assert torch.equal(rotate_queries_and_keys(qkv, cos, sin), expected)


def test_table_of_an_activation_has_its_bits_for_every_number() -> None:
    numbers = torch.arange(2**16, device=DEVICE).to(torch.int16).view(DTYPE)
    activation = QuickGELUActivation()
    found = look_up(numbers.flip(0).contiguous(), activation(numbers))
    assert torch.equal(found.view(torch.int16), activation(numbers.flip(0)).view(torch.int16))


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is computed again instead of replayed, and attention that needs no GPU."""
    if DEVICE == "cuda":
        return

    def record(self: VisionTower, pixel_values: Tensor, inputs: Mapping[str, Any]) -> vision_tower._Graph:
        output = self._forward(pixel_values, inputs)

        def replay() -> None:
            again = self._forward(pixel_values, inputs)
            for old, new in zip(sets_of(output), sets_of(again), strict=True):
                old.copy_(new)

        return vision_tower._Graph(SimpleNamespace(replay=replay), pixel_values, inputs, output)  # type: ignore[arg-type]

    monkeypatch.setattr(VisionTower, "_record", record)
    monkeypatch.setattr(vision_tower, "varlen_attn", attend)


def test_exact_tower_has_the_bits_of_transformers(name: str) -> None:
    tower, reference = VisionTower(stock(name), exact=True), stock(name)
    for grid in [*GRIDS, *GRIDS, GRIDS[0]]:  # launched, captured, replayed
        pixel_values = pixels([grid])
        assert torch.equal(rows(tower, pixel_values, [grid]), rows(reference, pixel_values, [grid]))


def test_graphs_of_grids_not_seen_for_long_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_tower, "_MAX_GRIDS", 2)
    tower, reference = VisionTower(stock("qwen2_vl"), exact=True), stock("qwen2_vl")
    for grid in GRIDS * 3:
        assert torch.equal(rows(tower, pixels([grid]), [grid]), rows(reference, pixels([grid]), [grid]))
    assert list(tower._by_grid) == GRIDS[-2:]


@pytest.mark.parametrize("company", [GRIDS, GRIDS[:1] * 6, GRIDS[2:3] * 18, [(1, 8, 8)]])
def test_images_in_one_fast_forward_are_nearly_what_each_is_alone(
    name: str, company: list[Grid], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_tower, "_SIZES", (64, 128))
    tower, reference = VisionTower(stock(name), exact=False), stock(name)
    tower.warm_up()
    for _ in range(2):
        pixel_values = torch.randn_like(pixels(company))
        parts = pixel_values.split([t * h * w for t, h, w in company])
        alone = [rows(reference, part, [grid]) for part, grid in zip(parts, company, strict=True)]
        together = rows(tower, pixel_values, company)
        expected = torch.cat(alone, 1)
        assert (together - expected).norm() < 2e-2 * expected.norm()


def test_replayed_graph_leaves_the_positions_of_other_forwards_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_tower, "_SIZES", (64,))
    tower, reference = VisionTower(stock(name), exact=False), stock(name)
    tower.warm_up()
    empty: Grid = (1, 2, 32)  # as long as the graph, whose positions are of this grid at first
    for _ in range(2):
        rows(tower, pixels(GRIDS[::2]), GRIDS[::2])
        found, expected = rows(tower, pixels([empty]), [empty]), rows(reference, pixels([empty]), [empty])
        assert (found - expected).norm() < 2e-2 * expected.norm()
