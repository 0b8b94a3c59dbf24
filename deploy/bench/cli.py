"""The commands of `fovea bench`. They import what they need themselves, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated

import typer

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

    if faults:
        cache_faults.run(num_requests=5 * rounds, output=output)
    else:
        transfers.run(rounds=rounds, output=output)


@bench.command()
def tiers(
    output: Annotated[Path, typer.Option(help="The figures.")] = Path("fovea-bench-tiers.json"),
) -> None:
    """What the local tier saves beside LRU on a replayed trace, and a hit beside the preprocessing of a miss."""
    from deploy.bench import tiers as policies

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

    if not torch.cuda.is_available():
        decoder.run_cpu(model or CHECKPOINT, output)
    elif exactness:
        decoder.exactness(output)
    else:
        decoder.run_gpu(output)


@bench.command("bad-input")
def bad_input(
    model: Annotated[Path, typer.Option(help="A checkpoint directory; the embedded model by default.")] = CHECKPOINT,
    rounds: Annotated[int, typer.Option(min=1, help="Of each case.")] = 10,
    output: Annotated[Path, typer.Option(help="The figures.")] = Path("fovea-bench-bad-input.json"),
) -> None:
    """How long a request that can never be answered takes to be refused, and what that costs the event loop."""
    from deploy.bench import bad_input as refusals

    refusals.run(model, rounds, output)
