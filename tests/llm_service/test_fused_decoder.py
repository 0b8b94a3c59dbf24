"""The decoder of own kernels computes what transformers' modules compute. Triton's interpreter runs them on the CPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    DynamicCache,
    LlavaConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

pytest.importorskip("triton")

from common.families import family_of
from llm_service.engine import fused_decoder
from llm_service.engine.fused_decoder import FusedDecoder, Plan, PromptBatch, is_supported
from llm_service.engine.kernels import DecodeBatch, Tile, Workspace, linear
from llm_service.engine.model_runner import rotary_position_ids

BLOCK_SIZE = 4
BLOCKS = [1, 9, 3]  # of the one sequence, not all in a row
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0},
}
VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 128, "num_heads": 2, "out_hidden_size": 128}
SMALL_TILES = {name: Tile(16, 64, 64) for name in ("qkv", "gate_up", "head")} | {
    name: Tile(16, 64, 64, num_splits=2) for name in ("out", "down")
}
CONFIGS = {
    "qwen2_vl": Qwen2VLConfig(text_config=TEXT, vision_config=VISION),
    "qwen2_5_vl": Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION),
    "qwen3_vl": Qwen3VLConfig(text_config=TEXT, vision_config=VISION),
    **{
        text_model: LlavaConfig(
            text_config={
                **TEXT,
                "model_type": text_model,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
            },
        )
        for text_model in ("llama", "mistral", "qwen2")
    },
}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    context_starts: Tensor,
    max_query: int,
    max_context: int,
    *,
    scale: float,
    **options: Any,
) -> Tensor:
    """What torch's `varlen_attn`, which is for CUDA only, computes of packed sequences."""
    assert options["window_size"] == (-1, 0)
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    spans = zip(query_starts.tolist(), query_starts[1:].tolist(), strict=False)
    contexts = zip(context_starts.tolist(), context_starts[1:].tolist(), strict=False)
    for (start, end), (first, last) in zip(spans, contexts, strict=True):
        mask = torch.ones(end - start, last - first, dtype=torch.bool).tril((last - first) - (end - start))
        parts = (tensor.transpose(0, 1)[None] for tensor in (query[start:end], key[first:last], value[first:last]))
        attended = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=True)
        output[start:end] = attended[0].transpose(0, 1)
    return output


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(fused_decoder, "varlen_attn", attend)
    torch.manual_seed(0)
    config: PretrainedConfig = CONFIGS[request.param]
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.1)
    with torch.inference_mode():
        yield model


def decoder_of(model: Any) -> FusedDecoder:
    kv_cache = torch.zeros(2, 2, 12, BLOCK_SIZE, 1, 64)
    return FusedDecoder(model.model.language_model, model.lm_head, kv_cache, 64)


def positions_of(model: Any, num_tokens: int) -> Tensor:
    """As if tokens 4 to 8 were an image: the three axes differ, where there are three."""
    positions = torch.arange(num_tokens).expand(3, -1).clone()
    if not family_of(model.config).uses_mrope:
        return rotary_position_ids(positions, uses_mrope=False)
    positions[1, 4:9], positions[2, 4:9] = torch.tensor([4, 4, 5, 5, 6]), torch.tensor([4, 5, 4, 5, 6])
    return rotary_position_ids(positions, uses_mrope=True)


def prefill(
    decoder: FusedDecoder,
    model: Any,
    token_ids: Tensor,
    start: int,
    end: int,
    padding: int = 0,
    deepstack: tuple[Tensor, ...] = (),
) -> Tensor:
    """Hidden states of tokens `start` to `end` of a sequence, computed with `padding` more rows."""
    language_model = model.model.language_model
    cosines, sines = language_model.rotary_emb(torch.zeros(1), positions_of(model, len(token_ids))[..., start:end])
    slots = torch.tensor([BLOCKS[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(end)])
    batch = PromptBatch(
        F.pad(cosines[0], (0, 0, 0, padding)),
        F.pad(sines[0], (0, 0, 0, padding)),
        F.pad(slots[start:], (0, padding), value=-1),
        torch.tensor([0, end - start], dtype=torch.int32),
        torch.tensor([0, end], dtype=torch.int32),
        max_query=end - start,
        max_context=end,
        context_slots=slots if start else None,
        deepstack_TD=deepstack,
    )
    embeds = F.pad(language_model.embed_tokens(token_ids[start:end]), (0, 0, 0, padding))
    return decoder.prefill(embeds, batch)[: end - start]


def decode(decoder: FusedDecoder, model: Any, token_id: Tensor, index: int, plan: Plan) -> Tensor:
    """Logits after one token, between two rows of padding."""
    tables = torch.tensor([[0] * len(BLOCKS), BLOCKS, [0] * len(BLOCKS)], dtype=torch.int32)
    lengths, positions = torch.tensor([0, index + 1, 0]).int(), torch.tensor([0, index, 0]).int()
    workspace = Workspace.allocate(1 << 16, 1 << 10, torch.device("cpu"))
    embeds = model.model.language_model.embed_tokens(torch.tensor([0, int(token_id), 0]))
    logits = decoder.decode(embeds, DecodeBatch(tables, lengths, positions), plan, workspace)
    assert not workspace.counters.any()
    return logits[1]


def reference_logits(model: Any, token_ids: Tensor) -> Any:
    output = model.model.language_model(
        input_ids=token_ids[None], position_ids=positions_of(model, len(token_ids)), past_key_values=DynamicCache()
    )
    return model.lm_head(output.last_hidden_state[0])


PLANS = {"cublas": Plan({}, 1), "own products": Plan(SMALL_TILES, 1), "split context": Plan(SMALL_TILES, 4)}


@pytest.mark.parametrize("plan", PLANS)
def test_prompt_in_chunks_then_tokens_equal_transformers(model: Any, plan: str) -> None:
    token_ids = torch.randint(96, (12,), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(model, token_ids)
    assert is_supported(model.model.language_model)

    decoder = decoder_of(model)
    hidden = torch.cat([prefill(decoder, model, token_ids, 0, 5), prefill(decoder, model, token_ids, 5, 10, padding=2)])
    logits = decoder.logits(hidden, Plan({}), None)
    torch.testing.assert_close(logits, expected[:10], rtol=1e-4, atol=1e-4)

    for index in (10, 11):
        logits = decode(decoder, model, token_ids[index], index, PLANS[plan])
        torch.testing.assert_close(logits, expected[index], rtol=1e-4, atol=1e-4)


def test_modules_keep_views_of_the_fused_weights(model: Any) -> None:
    token_ids = torch.arange(12)
    before = reference_logits(model, token_ids)
    decoder = decoder_of(model)
    attention = model.model.language_model.layers[0].self_attn
    assert attention.k_proj.weight.untyped_storage().data_ptr() == decoder.layers[0].qkv.untyped_storage().data_ptr()
    assert torch.equal(reference_logits(model, token_ids), before)


def test_deepstack_rows_are_added_behind_the_first_layers(model: Any) -> None:
    token_ids = torch.arange(10)
    added = torch.randn(10, 128, generator=torch.Generator().manual_seed(2))
    layer = model.model.language_model.layers[0]
    with_rows = layer.register_forward_hook(lambda module, inputs, output: output + added)
    expected = reference_logits(model, token_ids)
    with_rows.remove()

    decoder = decoder_of(model)
    hidden = prefill(decoder, model, token_ids, 0, 10, deepstack=(added,))
    torch.testing.assert_close(decoder.logits(hidden, Plan({}), None), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 16, 37])
@pytest.mark.parametrize("num_splits", [1, 4])
def test_product_adds_bias_and_residual_for_any_number_of_rows(num_rows: int, num_splits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(num_rows, 128, generator=generator), torch.randn(40, 128, generator=generator)
    bias, residual = torch.randn(40, generator=generator), torch.randn(num_rows, 40, generator=generator)
    workspace = Workspace.allocate(1 << 14, 1 << 8, torch.device("cpu"))
    out = torch.full((num_rows, 40), torch.nan)
    tile = Tile(16, 32, 32, num_splits=num_splits)
    linear(x, weight, tile, workspace, out_BN=out, bias_N=bias, residual_BN=residual)
    torch.testing.assert_close(out, F.linear(x, weight, bias) + residual, rtol=1e-4, atol=1e-4)
