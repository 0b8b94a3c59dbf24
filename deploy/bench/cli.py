"""The commands of `fovea bench`. They import what they need themselves, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated

import typer

from deploy.options import URL, ApiKey
from deploy.progress import waiting
from deploy.shapes import CHECKPOINT

bench = typer.Typer(help="Measure, and print one table and write one JSON file.", no_args_is_help=True)


@bench.callback()
def _commands() -> None:
    """So that a single command keeps its name."""


@bench.command()
def cache(
    faults: Annotated[bool, typer.Option("--faults", help="What Redis in trouble costs requests, instead.")] = False,
    rounds: Annotated[int, typer.Option(min=5, help="Of each measurement.")] = 40,
    output: Annotated[Path, typer.Option(help="The figures.")] = Path("fovea-bench-cache.json"),
) -> None:
    """Values of megabytes to Redis and back, beside redis-py and redis-benchmark, on a server of its own."""
    from deploy.bench import cache as transfers
    from deploy.bench import cache_faults

    with waiting("measuring"):
        if faults:
            cache_faults.run(num_requests=5 * rounds, output=output)
        else:
            transfers.run(rounds=rounds, output=output)


@bench.command()
def serving(
    url: Annotated[str, typer.Option(help="Any OpenAI-compatible endpoint; /v1 may be left out.")] = URL,
    workload: Annotated[
        str, typer.Option(help="repeated, new, production or text: questions about few or new pictures, as at Qwen-VL.")
    ] = "repeated",
    concurrency: Annotated[str | None, typer.Option(help="Closed loop: callers at once, such as 1,4,16.")] = None,
    rate: Annotated[str | None, typer.Option(help="Open loop: requests per second, such as 1,2,4.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="At each load.")] = 64,
    image: Annotated[str, typer.Option(help="Width x height of pictures.")] = "448x448",
    questions: Annotated[int, typer.Option(min=1, help="About each picture, in repeated.")] = 8,
    text_tokens: Annotated[int, typer.Option(min=1)] = 32,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    scale: Annotated[float, typer.Option(min=0.001, help="Multiplies the text and answers of production.")] = 1.0,
    cv: Annotated[
        float | None, typer.Option(min=0.1, help="Of arrivals; 1 is Poisson, the default of production 2.2.")
    ] = None,
    probe_rate: Annotated[float, typer.Option(min=0, help="One-token text requests per second beside it.")] = 0.0,
    slo_ttft_ms: Annotated[float, typer.Option(min=1)] = 2000.0,
    slo_itl_ms: Annotated[float, typer.Option(min=1)] = 50.0,
    ignore_eos: Annotated[bool, typer.Option(help="vLLM's field, so that answers have their length.")] = True,
    model: Annotated[str | None, typer.Option(help="Default: the first one listed.")] = None,
    api_key: ApiKey = None,
    seed: int = 0,
    output: Annotated[Path, typer.Option(help="The figures.")] = Path("fovea-bench-serving.json"),
    plot: Annotated[Path, typer.Option(help="The picture.")] = Path("fovea-bench-serving.png"),
) -> None:
    """TTFT, ITL, E2E and goodput of a running service, at several concurrencies and request rates."""
    from deploy.bench import serving as measurement
    from deploy.bench.load import Endpoint
    from deploy.bench.workloads import PRODUCTION_CV, WORKLOADS, Shape
    from deploy.client import ClientError
    from deploy.plan import size_of

    if workload not in WORKLOADS:
        raise ClientError(f"--workload is one of {', '.join(WORKLOADS)}, not {workload!r}")
    closed = [measurement.Load(concurrency=int(one)) for one in measurement.numbers(concurrency, "--concurrency")]
    opened = [measurement.Load(rate=one) for one in measurement.numbers(rate, "--rate")]
    settings = measurement.Settings(
        workload=workload,
        shape=Shape(*size_of(image), text_tokens, output_tokens, questions, scale),
        loads=closed + opened or [measurement.Load(concurrency=number) for number in (1, 4, 16)],
        num_requests=requests,
        cv=cv or (PRODUCTION_CV if workload == "production" else 1.0),
        probe_rate=probe_rate,
        slo=measurement.Slo(slo_ttft_ms / 1000, slo_itl_ms / 1000),
        seed=seed,
    )
    endpoint = Endpoint(url, model, api_key, {"ignore_eos": True} if ignore_eos else {})
    measurement.run(endpoint, settings, output=output, picture=plot)


@bench.command()
def tiers(
    output: Annotated[Path, typer.Option(help="The figures.")] = Path("fovea-bench-tiers.json"),
) -> None:
    """What the local tier saves beside LRU on a replayed trace, and a hit beside the preprocessing of a miss."""
    from deploy.bench import tiers as policies

    with waiting("replaying"):
        policies.run(output)


@bench.command()
def engine(
    model: Annotated[Path | None, typer.Option(help="On a CPU: a checkpoint; by default the embedded one.")] = None,
    exactness: Annotated[bool, typer.Option("--exactness", help="GPU: whether company changes bits, instead.")] = False,
    output: Annotated[Path, typer.Option(help="The figures.")] = Path("fovea-bench-engine.json"),
) -> None:
    """The decoder alone: on a GPU beside the limits of its memory and its products, on a CPU beside `generate()`."""
    import torch

    from deploy.bench import engine as decoder

    with waiting("measuring"):
        if not torch.cuda.is_available():
            decoder.run_cpu(model or CHECKPOINT, output)
        elif exactness:
            decoder.exactness(output)
        else:
            decoder.run_gpu(output)


@bench.command()
def encoder(
    sizes: Annotated[str, typer.Option(help="Sides of square pictures.")] = "448,980,1024,1792",
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each rate.")] = 5.0,
    output: Annotated[Path, typer.Option(help="The figures.")] = Path("fovea-bench-encoder.json"),
) -> None:
    """One encoder: images per second from JPEG bytes, each step, the tower's arithmetic, and transformers beside it."""
    from deploy.bench import encoder as measurement

    with waiting("measuring"):
        measurement.run([int(size) for size in sizes.split(",")], seconds, output)


@bench.command("bad-input")
def bad_input(
    model: Annotated[Path, typer.Option(help="A checkpoint directory; the embedded model by default.")] = CHECKPOINT,
    rounds: Annotated[int, typer.Option(min=1, help="Of each case.")] = 10,
    output: Annotated[Path, typer.Option(help="The figures.")] = Path("fovea-bench-bad-input.json"),
) -> None:
    """How long a request that can never be answered takes to be refused, and what that costs the event loop."""
    from deploy.bench import bad_input as refusals

    with waiting("measuring"):
        refusals.run(model, rounds, output)


@bench.command()
def overhead(
    rounds: Annotated[int, typer.Option(min=1, help="Of each measurement.")] = 10,
    tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    output: Annotated[Path, typer.Option(help="The figures.")] = Path("fovea-bench-overhead.json"),
) -> None:
    """What HTTP, Serve and the API add to the bare engine; and 50 decisions beside 50 chat requests."""
    from deploy.bench import overhead as comparison

    comparison.run(rounds=rounds, num_tokens=tokens, output=output)


@bench.command()
def replicas(
    model: Annotated[
        Path | None, typer.Option(help="A checkpoint; by default the 2B shape on GPUs, the embedded model on CPUs.")
    ] = None,
    counts: Annotated[str, typer.Option(help="Of encoder replicas.")] = "1,2,4",
    gpus: Annotated[float, typer.Option(min=0, help="Of one replica; 0: CPU.")] = 0.0,
    cpus: Annotated[float, typer.Option(min=0, help="Of one replica, as Ray counts them.")] = 0.1,
    image: Annotated[str, typer.Option(help="Width x height of pictures.")] = "448x448",
    seconds: Annotated[float, typer.Option(min=1, help="At each count.")] = 20.0,
    in_flight: Annotated[int, typer.Option(min=1, help="Images on their way, for each replica.")] = 64,
    preprocess_threads: Annotated[int, typer.Option(min=1, help="Of one replica.")] = 2,
    output: Annotated[Path, typer.Option(help="The figures.")] = Path("fovea-bench-replicas.json"),
) -> None:
    """Images per second of one, two and four encoder replicas on Serve, as a share of linear."""
    from deploy.bench import replicas as throughput
    from deploy.bench.serving import numbers
    from deploy.plan import size_of

    width, height = size_of(image)
    wanted = [int(count) for count in numbers(counts, "--counts")]
    settings = throughput.Settings(wanted, gpus, cpus, width, height, seconds, in_flight, preprocess_threads)
    throughput.run(model, settings, output)


@bench.command()
def scaling(
    counts: Annotated[str, typer.Option(help="Of encoder replicas, one after another.")] = "1,4,1",
    callers: Annotated[int, typer.Option(min=1, help="Who each ask again when answered.")] = 8,
    hold: Annotated[float, typer.Option(min=0, help="Seconds at each count.")] = 20.0,
    config: Annotated[Path | None, typer.Option(help="As `fovea up`; by default the embedded model.")] = None,
    output: Annotated[Path, typer.Option(help="The figures and the ledger.")] = Path("fovea-bench-scaling.json"),
) -> None:
    """Whether a request is lost while the number of encoder replicas changes under load; 1 if one is."""
    from deploy import service
    from deploy.bench import scaling as drill
    from deploy.bench.serving import numbers

    wanted = [int(count) for count in numbers(counts, "--counts")]
    application = service.application_config(
        config=config or service.DEFAULT_CONFIG, encoder_replicas=wanted[0], port=service.free_port()
    )
    if not drill.run(application, wanted, callers=callers, hold_s=hold, output=output):
        raise typer.Exit(1)


@bench.command()
def reduction(
    model: Annotated[Path, typer.Option(help="A checkpoint; by default the embedded one.")] = CHECKPOINT,
    ratios: Annotated[str, typer.Option(help="Shares of the tokens of a picture that are kept.")] = "0.75,0.5,0.25",
    questions_per_category: Annotated[int, typer.Option(min=2)] = 60,
    processes: Annotated[int, typer.Option(min=1, help="Each uses one thread.")] = 2,
    output: Annotated[Path, typer.Option(help="The figures.")] = Path("fovea-bench-reduction.json"),
) -> None:
    """Accuracy of the embedded model by method and ratio of `model.token_reduction`."""
    from deploy.bench import reduction as accuracy
    from deploy.bench.serving import numbers

    with waiting("asking"):
        accuracy.run(model, list(numbers(ratios, "--ratios")), questions_per_category, processes, output)
