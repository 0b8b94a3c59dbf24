"""The decoder engine alone: no HTTP, no Ray, no encoder. On a GPU beside the limit of its memory, on a CPU beside
`generate()`.

A decode step cannot take less time than reading every weight and every key and value once (the
bandwidth limit); a prompt cannot take less than its multiplications. Both limits are printed beside.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import count, product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen2VLConfig

from common.checkpoint import LoadedHalf, load_half
from common.config import ModelConfig
from common.embedding import VisionEmbedding
from deploy.bench.report import circumstances, show, write
from llm_service.config import EngineConfig
from llm_service.engine.engine import LLMEngine
from llm_service.engine.request import MultiModalFeature, PlaceholderRange, Request, SamplingParams

BANDWIDTH = 4.3e12  # bytes/s, copies on an H200
MATRIX_FLOPS = 790e12  # bf16 products on an H200
QWEN2_VL_2B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
Numerics = Literal["exact", "fast"]
NUMERICS: tuple[Numerics, ...] = ("fast", "exact")
_ids = count()


def run_gpu(output: Path, *, concurrencies: Sequence[int] = (1, 64, 256)) -> None:
    """The 2B shape with seeded random weights in bf16 on one GPU."""
    with tempfile.TemporaryDirectory() as directory:
        Qwen2VLConfig(**QWEN2_VL_2B).save_pretrained(directory)
        begin = time.perf_counter()
        loaded = load_half(ModelConfig(path=directory, load_format="dummy", device="cuda"), "language")
        weights_s = time.perf_counter() - begin
    result: dict[str, Any] = circumstances(gpu=torch.cuda.get_device_name(), triton=version("triton"))
    result["shape"] = QWEN2_VL_2B["text_config"]
    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for numerics in NUMERICS:
        begin = time.perf_counter()
        engine = gpu_engine(loaded, numerics)
        ready_s = time.perf_counter() - begin
        tables["start"].append({"numerics": numerics, "dummy weights s": weights_s, "engine ready s": ready_s})
        for context, batch in product((512, 2048), (1, 8, 16, 64, 256)):
            tables["decode step"].append(decode_step(engine, numerics, batch, context))
        for batch in (1, 16, 64, 256):
            tables["engine"].append(engine_throughput(engine, numerics, batch, 2048, tables["decode step"]))
        tables["prompt"] += [prompt(engine, numerics, num_tokens) for num_tokens in (64, 300, 512, 1024, 8192)]
        tables["prefix"].append(prefix_hit(engine, numerics, 2048))
        tables["generate"] += [decode_rate(engine, numerics, concurrency) for concurrency in concurrencies]
        del engine
        torch.cuda.empty_cache()
    for name, rows in tables.items():
        show(name, rows)
    write(output, result | tables)


def gpu_engine(loaded: LoadedHalf, numerics: Numerics, **limits: Any) -> LLMEngine:
    config = {"max_num_seqs": 256, "max_model_len": 8448, "max_num_batched_tokens": 8192, "prefill_chunk_size": 512}
    memory = {"gpu_memory_utilization": 0.8}
    return LLMEngine(
        loaded,
        EngineConfig(**(config | memory | limits)),
        numerics=numerics,
        eos_token_ids=frozenset(),
        mrope_rule="qwen",
    )


def decode_step(engine: LLMEngine, numerics: Numerics, batch: int, context: int) -> dict[str, Any]:
    """A replayed step of `batch` sequences of `context` tokens in blocks all over the memory, beside its limit."""
    runner: Any = engine.model_runner
    graph = runner.graphs[min(size for size in runner.graphs if size >= batch)]
    num_blocks = -(-context // engine.config.block_size)
    blocks = torch.randperm(engine.model_runner.num_kv_blocks)[: batch * num_blocks].view(batch, num_blocks)
    runner.tables.device_tables[:batch, :num_blocks] = blocks.to(runner.device, torch.int32)
    graph.inputs.zero_()
    graph.inputs[1:] = torch.tensor([[-1], [context], [context - 1]], device=runner.device)
    step_s = device_seconds(graph.graph.replay, repeats=20)
    limit_s = step_limit_s(runner, batch, context)
    return {
        "numerics": numerics,
        "batch": batch,
        "context": context,
        "step ms": step_s * 1e3,
        "limit ms": limit_s * 1e3,
        "fraction": limit_s / step_s,
        "tok/s": batch / step_s,
    }


def step_limit_s(runner: Any, batch: int, context: int) -> float:
    weights = sum(tensor.nbytes for tensor in layer_weights(runner)) + runner.decoder.head.nbytes
    token_bytes = runner.kv_cache[:, :, 0, 0].nbytes
    return float((weights + batch * context * token_bytes) / BANDWIDTH)


def layer_weights(runner: Any) -> list[Tensor]:
    """The matrices that every token passes, without the head."""
    layers = runner.decoder.layers
    return [tensor for layer in layers for tensor in (layer.qkv, layer.out, layer.gate_up, layer.down)]


def engine_throughput(
    engine: LLMEngine,
    numerics: Numerics,
    batch: int,
    context: int,
    steps: Sequence[dict[str, Any]],
    num_tokens: int = 256,
) -> dict[str, Any]:
    """Tokens a second while all of `batch` requests decode, around `context` tokens, beside the bare steps."""
    for _ in range(batch):
        engine.add_request(request_of(context - num_tokens // 2, num_tokens))
    started: set[str] = set()
    while len(started) < batch:
        started |= {output.request_id for output in engine.step()}
    begin, num_outputs, has_finished = time.perf_counter(), 0, False
    while not has_finished:
        outputs = engine.step()
        num_outputs += len(outputs)
        has_finished = any(output.finish_reason is not None for output in outputs)
    rate = num_outputs / (time.perf_counter() - begin)
    while engine.has_unfinished_requests():
        engine.step()
    bare = next(
        row["tok/s"] for row in steps if (row["numerics"], row["batch"], row["context"]) == (numerics, batch, context)
    )
    shape = {"numerics": numerics, "batch": batch, "context": context}
    return shape | {"tok/s": rate, "bare steps tok/s": bare, "fraction": rate / bare}


def prompt(engine: LLMEngine, numerics: Numerics, num_tokens: int) -> dict[str, Any]:
    """A new prompt up to its first token."""
    seconds = statistics.median(first_token_s(engine, request_of(num_tokens, 1)) for _ in range(5))
    runner: Any = engine.model_runner
    layers, heads = len(runner.decoder.layers), runner.decoder.num_heads
    weights = sum(tensor.numel() for tensor in layer_weights(runner))
    flops = 2 * weights * num_tokens + layers * 2 * heads * runner.kv_cache.shape[-1] * num_tokens**2
    rate = flops / seconds
    return {
        "numerics": numerics,
        "tokens": num_tokens,
        "ms": seconds * 1e3,
        "TFLOP/s": rate / 1e12,
        "of products": rate / MATRIX_FLOPS,
    }


def prefix_hit(engine: LLMEngine, numerics: Numerics, num_tokens: int) -> dict[str, Any]:
    """The first token of a prompt whose beginning, all but 32 tokens, is in KV memory, and of one that is new."""
    hits, misses = [], []
    for _ in range(5):
        request = request_of(num_tokens, 1)
        misses.append(first_token_s(engine, request))
        again = request.prompt_token_ids[:-32] + request_of(32, 1).prompt_token_ids
        hits.append(first_token_s(engine, request_of(num_tokens, 1, token_ids=again)))
    return {
        "numerics": numerics,
        "tokens": num_tokens,
        "miss ms": statistics.median(misses) * 1e3,
        "hit ms": statistics.median(hits) * 1e3,
    }


def decode_rate(
    engine: LLMEngine, numerics: Numerics, concurrency: int, num_prompt_tokens: int = 300, num_tokens: int = 256
) -> dict[str, Any]:
    """Tokens a second of `concurrency` requests between the first token and token 256: all of `generate` less the same
    with one token of answer, as deploy/bench/vllm_peer.py measures vLLM; and of these prompts a second."""

    def seconds(length: int) -> float:
        requests = [request_of(num_prompt_tokens, length) for _ in range(concurrency)]
        begin = time.perf_counter()
        for request in requests:
            engine.add_request(request)
        while engine.has_unfinished_requests():
            engine.step()
        return time.perf_counter() - begin

    seconds(num_tokens)  # warm
    rounds = [(seconds(num_tokens), seconds(1)) for _ in range(3)]
    decode_s = statistics.median(whole_s - prompts_s for whole_s, prompts_s in rounds)
    return {
        "numerics": numerics,
        "concurrency": concurrency,
        "tok/s": concurrency * (num_tokens - 1) / decode_s,
        "prompts/s": concurrency / statistics.median(prompts_s for _, prompts_s in rounds),
    }


def first_token_s(engine: LLMEngine, request: Request) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    engine.add_request(request)
    while engine.has_unfinished_requests():
        engine.step()
    return time.perf_counter() - begin


def request_of(
    num_prompt_tokens: int,
    num_tokens: int,
    *,
    token_ids: list[int] | None = None,
    features: Sequence[MultiModalFeature] = (),
    generator: torch.Generator | None = None,
    vocab_size: int = 150_000,
) -> Request:
    """A request of random text, greedy, of exactly `num_tokens` of answer."""
    if token_ids is None:
        token_ids = torch.randint(vocab_size, (num_prompt_tokens,), generator=generator).tolist()
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    positions = torch.arange(num_prompt_tokens).expand(3, -1)
    return Request(f"bench-{next(_ids)}", token_ids, positions, num_prompt_tokens, params, list(features))


def device_seconds(launch: Callable[[], None], *, repeats: int) -> float:
    """The median over five of the seconds of one launch among `repeats`."""
    launch()
    seconds = []
    for _ in range(5):
        stream = torch.cuda.current_stream()
        begin = stream.record_event(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        for _ in range(repeats):
            launch()
        end = stream.record_event(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / repeats / 1e3)
    return float(statistics.median(seconds))


# Are the bits of `exact` the same in every company?


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: list[int]
    logits: Tensor  # [tokens, V]


def exactness(output: Path, *, num_requests: int = 64, num_tokens: int = 48) -> None:
    """Tokens and logits of the same requests alone, in batches of 16, 64 and 256, in small budgets, preempted, and with
    their prefixes in KV memory."""
    with tempfile.TemporaryDirectory() as directory:
        Qwen2VLConfig(**QWEN2_VL_2B).save_pretrained(directory)
        loaded = load_half(ModelConfig(path=directory, load_format="dummy", device="cuda"), "language")
    engine = gpu_engine(loaded, "exact", gpu_memory_utilization=0.3)
    tight = gpu_engine(
        loaded,
        "exact",
        gpu_memory_utilization=None,
        num_kv_blocks=200,
        max_num_batched_tokens=520,
        max_model_len=2048,
        max_num_seqs=48,
    )
    workload = exactness_workload(num_requests, num_tokens)
    alone = [answers(engine, [make()], reuse=False)[0] for make in workload]
    rows: list[dict[str, Any]] = []

    def compare(name: str, found: Sequence[Answer]) -> None:
        tokens = sum(one.token_ids == other.token_ids for one, other in zip(alone, found, strict=False))
        bits = sum(torch.equal(one.logits, other.logits) for one, other in zip(alone, found, strict=False))
        rows.append({"company": name, "requests": len(found), "same tokens": tokens, "same logits": bits})

    for size in (16, 64):
        found: list[Answer] = []
        for start in range(0, num_requests, size):
            found += answers(engine, [make() for make in workload[start : start + size]], reuse=False)
        compare(f"batches of {size}", found)
    others = [request_of(200, num_tokens) for _ in range(256 - num_requests)]
    requests = [make() for make in workload] + others
    compare("256 at once", answers(engine, requests, reuse=False)[:num_requests])
    before = tight.scheduler.num_preemptions
    compare("520 tokens a step, 200 blocks", answers(tight, [make() for make in workload], reuse=False))
    rows[-1]["company"] += f", {tight.scheduler.num_preemptions - before} preemptions"
    answers(engine, [make() for make in workload], reuse=True)
    compare("prefixes reused", answers(engine, [make() for make in workload], reuse=True))
    show("exact numerics", rows)
    write(output, circumstances(gpu=torch.cuda.get_device_name()) | {"exactness": rows})


def exactness_workload(num_requests: int, num_tokens: int) -> list[Callable[[], Request]]:
    """Prompts of 20 to 1,500 tokens, every other one with an image of random features."""
    generator = torch.Generator().manual_seed(0)
    makers: list[Callable[[], Request]] = []
    for index in range(num_requests):
        length = int(torch.randint(20, 1500, (), generator=generator))
        token_ids = torch.randint(150_000, (length,), generator=generator).tolist()
        features = []
        if index % 2 and length > 80:
            size = int(torch.randint(16, length - 40, (), generator=generator))
            embedding = VisionEmbedding(
                {"features": torch.randn(size, 1536, generator=generator) * 0.02}, (1, 2, 2 * size)
            )
            features.append(MultiModalFeature(f"image-{index}", PlaceholderRange(20, size), embedding))

        makers.append(partial(request_of, length, num_tokens, token_ids=token_ids, features=features))
    return makers


def answers(engine: LLMEngine, requests: Sequence[Request], *, reuse: bool) -> list[Answer]:
    """Serves them together; without `reuse` under a tenant of their own, so that no prefix of before is found."""
    logits: dict[str, list[Tensor]] = {request.request_id: [] for request in requests}
    runner: Any = engine.model_runner
    execute = runner.execute

    def recording(output: Any) -> Tensor:
        rows: Tensor = execute(output)
        for request, row in zip(output.yielding_requests, rows, strict=True):
            logits[request.request_id].append(row.clone())
        return rows

    for request in requests:
        request.cache_salt = "" if reuse else f"run-{next(_ids)}"
        engine.add_request(request)
    runner.execute = recording
    try:
        while engine.has_unfinished_requests():
            engine.step()
    finally:
        del runner.execute
    found = []
    for request in requests:
        num_tokens = len(request.output_token_ids)
        found.append(Answer(request.output_token_ids, torch.stack(logits[request.request_id][:num_tokens])))
    return found


# The same on a CPU, beside generate()


def run_cpu(model: Path, output: Path, *, num_requests: int = 16, num_tokens: int = 64) -> None:
    """Tokens a second of one request after another, of all at once, and of `generate()` on the padded batch."""
    config = ModelConfig(path=str(model), device="cpu")
    loaded = load_half(config, "language")
    whole = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    engine = LLMEngine(loaded, EngineConfig(), numerics="fast", eos_token_ids=frozenset(), mrope_rule="hf5")
    vocab_size = loaded.config.get_text_config().vocab_size - 20  # no special tokens
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(40, 120, (num_requests,), generator=generator).tolist()

    def requests() -> list[Request]:
        return [request_of(length, num_tokens, vocab_size=vocab_size) for length in lengths]

    def serve(requests: Sequence[Request]) -> None:
        for request in requests:
            engine.add_request(request)
        while engine.has_unfinished_requests():
            engine.step()

    def one_after_another() -> None:
        for request in requests():
            serve([request])

    def generate() -> None:
        width = max(lengths)
        token_ids = torch.randint(vocab_size, (num_requests, width))
        mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
        whole.generate(
            input_ids=token_ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=0,
        )

    rates: dict[str, list[float]] = {"one after another": [], f"{num_requests} at once": [], "generate(), padded": []}

    def at_once() -> None:
        serve(requests())

    works: tuple[Callable[[], None], ...] = (one_after_another, at_once, generate)
    for turn in range(4):
        for name, work in zip(rates, works, strict=True):
            begin = time.perf_counter()
            work()
            if turn:  # the first warms up
                rates[name].append(num_requests * num_tokens / (time.perf_counter() - begin))
    base = statistics.median(rates["one after another"])
    rows = [
        {"way": name, "tok/s": statistics.median(values), "x": statistics.median(values) / base}
        for name, values in rates.items()
    ]
    show(f"{num_requests} requests of 40 to 120 tokens, {num_tokens} tokens of answer each", rows)
    write(output, circumstances(threads=str(torch.get_num_threads())) | {"concurrency": rows})
