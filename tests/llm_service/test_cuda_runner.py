"""The runner of own kernels and CUDA graphs computes what transformers' modules compute on the same GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from llm_service.config import EngineConfig
from llm_service.engine import engine as engine_module
from llm_service.engine.cuda_runner import CudaModelRunner
from llm_service.engine.model_runner import TransformersRunner
from llm_service.engine.prompt_graphs import PromptGraph, PromptGraphs


@pytest.fixture
def on_gpu(wide_gpu_model: Any) -> Any:
    loaded = wide_gpu_model.loaded
    model = loaded.model.to("cuda", torch.bfloat16)
    return replace(
        wide_gpu_model, loaded=replace(loaded, model=model, device=torch.device("cuda"), dtype=torch.bfloat16)
    )


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_logits_are_those_of_the_modules(on_gpu: Any, numerics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"prefill_chunk_size": 16, "max_num_batched_tokens": 40, "num_kv_blocks": 60, "block_size": 16}
    own = on_gpu.engine(numerics, **limits)
    assert isinstance(own.model_runner, CudaModelRunner)
    monkeypatch.setattr(
        engine_module,
        "make_model_runner",
        lambda loaded, config, exact: TransformersRunner(loaded, config, exact=exact),
    )
    modules = on_gpu.engine(numerics, **limits)
    for engine in (own, modules):
        engine.serve([prompt.request(str(index)) for index, prompt in enumerate(on_gpu.prompts)])
    for index in range(len(on_gpu.prompts)):
        mine, theirs = own.logits[str(index)][0].float(), modules.logits[str(index)][0].float()
        assert (mine - theirs).norm() < 3e-2 * theirs.norm(), index


def serve_twice(engine: Any, prompts: Any) -> None:
    """At once, and then with the first answers' prefixes in KV memory."""
    for turn in range(2):
        engine.serve([prompt.request(f"{turn} {index}") for index, prompt in enumerate(prompts)])


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_prompts_from_graphs_have_the_logits_of_launched_ones(
    on_gpu: Any, numerics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"prefill_chunk_size": 64, "max_num_batched_tokens": 192, "num_kv_blocks": 200, "block_size": 16}
    num_replays, replay = 0, PromptGraph.replay

    def counted(graph: PromptGraph, *arguments: torch.Tensor) -> torch.Tensor:
        nonlocal num_replays
        num_replays += 1
        return replay(graph, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PromptGraph, "replay", counted)
    own = on_gpu.engine(numerics, **limits)
    serve_twice(own, on_gpu.prompts)
    assert num_replays
    monkeypatch.setattr(PromptGraphs, "find", lambda self, shape: None)
    launched = on_gpu.engine(numerics, **limits)
    serve_twice(launched, on_gpu.prompts)
    for name, logits in own.logits.items():
        mine, expected = logits[0].float(), launched.logits[name][0].float()
        assert torch.equal(mine, expected) if numerics == "exact" else (mine - expected).norm() < 3e-2 * expected.norm()


def test_preempted_requests_change_no_bit_of_any_answer(on_gpu: Any) -> None:
    """In `exact` numerics they compute their own tokens anew, one by one, next to requests that get new ones."""
    limits = {"prefill_chunk_size": 16, "max_num_batched_tokens": 40, "block_size": 16}
    roomy, tight = (on_gpu.engine("exact", num_kv_blocks=count, **limits) for count in (400, 24))
    for engine in (roomy, tight):
        engine.serve([prompt.request(str(index)) for index, prompt in enumerate(on_gpu.prompts)])
    assert (roomy.num_preemptions, tight.num_preemptions > 0) == (0, True)
    for name, logits in roomy.logits.items():
        assert torch.equal(torch.stack(logits), torch.stack(tight.logits[name][: len(logits)])), name


def test_memory_that_is_left_becomes_kv_blocks(on_gpu: Any) -> None:
    config = EngineConfig(gpu_memory_utilization=0.2, max_model_len=512)
    runner = CudaModelRunner(on_gpu.loaded, config, exact=True)
    _, total = torch.cuda.mem_get_info()
    assert 0.1 * total < runner.kv_cache.nbytes < 0.2 * total
