"""The `fovea` command. Commands import what they need themselves, so that `--help` answers at once."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from deploy import config_cli, media_cli
from deploy.bench.cli import bench
from deploy.options import URL, ApiKey, Url
from deploy.progress import waiting

app = typer.Typer(
    help="Serve vision-language models in two halves, with an embedding cache between them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(media_cli.media, name="media")
app.add_typer(media_cli.cache, name="cache")
app.add_typer(config_cli.config, name="config")
app.add_typer(bench, name="bench")

Dashboard = Annotated[str, typer.Option(help="Ray's dashboard, through which the application is managed.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A Serve YAML; default: serve_shapes.yaml, CPU.")]

_DASHBOARD = "http://127.0.0.1:8265"


def main() -> None:
    """The console script: errors a user can mend are one line on stderr and exit status 1."""
    if "RAY_ADDRESS" not in os.environ or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # read by Ray when it is imported
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end in order, as after Ctrl-C
    try:
        app()
    except Exception as exc:
        if type(exc).__name__ not in ("ServiceError", "ClientError"):
            raise
        print(f"fovea: {exc}", file=sys.stderr)
        sys.exit(1)


def progress() -> Callable[[str], None]:
    """Prints lines with the seconds since now."""
    started = time.monotonic()

    def report(line: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {line}", flush=True)

    return report


@app.command()
def up(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint directory or hub id; default: the embedded model.")
    ] = None,
    encoder_replicas: Annotated[int | None, typer.Option(min=1)] = None,
    llm_replicas: Annotated[int | None, typer.Option(min=1)] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="redis://, rediss:// or unix://; default: a private server.")
    ] = None,
    media_redis_url: Annotated[
        str | None, typer.Option(help="A second Redis, with noeviction, for managed media; default: a private server.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535)] = None,
    backend: Annotated[
        Literal["split", "transformers"],
        typer.Option(help="transformers: the one-piece model behind the same API, as a baseline."),
    ] = "split",
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Replicas write one JSON object a line.")] = False,
    config: ConfigFile = None,
) -> None:
    """Start the service and keep serving until Ctrl-C or `fovea down`."""
    from deploy import service

    report = progress()
    deployed = service.application_config(
        config=config or service.DEFAULT_CONFIG,
        model=model,
        encoder_replicas=encoder_replicas,
        llm_replicas=llm_replicas,
        redis_url=redis_url,
        media_redis_url=media_redis_url,
        port=port,
        backend=backend,
        json_logs=json_logs,
    )
    with service.running_service(deployed, report) as running:
        if running.dashboard != _DASHBOARD:
            report(f"manage it with --dashboard {running.dashboard}")
        report(f"ready at {running.url}/v1, a page to try it on at {running.url} - end with Ctrl-C or `fovea down`")
        service.wait_until_stopped(running.url)
        report("stopping")


@app.command()
def demo(
    port: Annotated[int | None, typer.Option(min=1, max=65535)] = None,
    stop: Annotated[bool, typer.Option("--exit", help="Stop after the questions.")] = False,
) -> None:
    """Draw pictures, start the service on the embedded model, and ask about them."""
    from deploy import demo as demonstration

    raise typer.Exit(0 if demonstration.run(port=port, stop=stop, report=progress()) else 1)


@app.command()
def ask(
    images_and_question: Annotated[list[str], typer.Argument(metavar="IMAGE... QUESTION")],
    video: Annotated[
        list[Path] | None,
        typer.Option(help="A clip: MP4, WebM, GIF, WebP, or a folder of its frames. May be repeated."),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames taken in a second of a clip; of a folder, how many there were.")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames taken of a clip, evenly spread.")] = None,
    url: Url = URL,
    api_key: ApiKey = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Ask about pictures and clips; the answer streams in. Without any the question stands alone."""
    from deploy import client

    *images, question = images_and_question
    videos = video or []
    sampling = {name: value for name, value in {"fps": fps, "num_frames": num_frames}.items() if value is not None}
    with client.Client(url, api_key) as service:
        answer = service.ask(
            [Path(image) for image in images],
            question,
            videos=videos,
            sampling=sampling,
            print_text=True,
            max_tokens=max_tokens,
        )
    for file, receipt in zip([*images, *videos], answer.images, strict=True):
        print(f"  {file}: {receipt['tokens']} tokens from {receipt['source']} in {receipt['wait_ms']:.1f} ms")
        if "grids" in receipt:
            cached, grids = receipt["cached_grids"], receipt["grids"]
            print(f"    {receipt['frames']} frames, {cached} of {grids} pairs of frames from the cache")
    print(f"  {answer.num_tokens} tokens in {answer.seconds * 1000:.0f} ms")


@app.command()
def chat(
    images: Annotated[list[Path] | None, typer.Argument(metavar="[IMAGE]...")] = None,
    url: Url = URL,
    api_key: ApiKey = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
) -> None:
    """Talk about pictures: name their paths anywhere in what you type. /help says more."""
    from deploy import chat as conversation
    from deploy.client import Client

    with Client(url, api_key) as client:
        conversation.run(client, images or [], system=system, max_tokens=max_tokens)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A checkpoint directory or hub id; only its config is read.")],
    gpu: Annotated[str, typer.Option(help="Memory of one GPU, as in 80GB.")] = "80GB",
    image: Annotated[str, typer.Option(help="Width x height of a typical picture.")] = "1024x1024",
    images: Annotated[int, typer.Option(min=1, help="Pictures in a request.")] = 1,
    text_tokens: Annotated[int, typer.Option(min=1)] = 106,
    output_tokens: Annotated[int, typer.Option(min=1)] = 100,
    reuse: Annotated[float, typer.Option(min=0, max=0.999, help="Share of pictures found in the cache.")] = 0.0,
    tflops: Annotated[float, typer.Option(min=1, help="Of the GPU, bf16 matrix products.")] = 790,
    bandwidth: Annotated[float, typer.Option(min=0.01, help="Of its memory, in TB/s.")] = 4.3,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="As model.max_pixels; default: the checkpoint's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """What a model needs, before anything is loaded: weights, KV, embeddings, sequences, encoders per decoder."""
    from deploy import plan as planning

    load = planning.Load(*planning.size_of(image), images, text_tokens, output_tokens, reuse)
    hardware = planning.Hardware(planning.bytes_of(gpu), tflops * 1e12, bandwidth * 1e12)
    planning.run(model, load, hardware, max_pixels=max_pixels, as_json=as_json)


@app.command()
def doctor(
    config: ConfigFile = None,
    model: Annotated[str | None, typer.Option(help="The checkpoint to look at; default: the configuration's.")] = None,
) -> None:
    """Look at what Fovea needs here, and say how to mend what is wrong."""
    from deploy import doctor as examination
    from deploy import service

    configured = service.application_config(config=config or service.DEFAULT_CONFIG, model=model)
    raise typer.Exit(0 if examination.run(configured) else 1)


@app.command()
def status(dashboard: Dashboard = _DASHBOARD, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Show the deployments and their replicas."""
    import dataclasses

    from deploy import service

    details = service.details_of(service.connect(dashboard))
    deployments = service.statuses(details)
    if as_json:
        print(json.dumps({"status": details["status"], "deployments": [dataclasses.asdict(d) for d in deployments]}))
        return
    print(f"{service.APPLICATION}: {details['status']}")
    for deployment in deployments:
        print(f"  {deployment.name:8} {deployment.status:10} {deployment.num_running} of {deployment.target} replicas")


@app.command()
def scale(
    deployment: Annotated[str, typer.Argument(help="encoder or llm")],
    replicas: Annotated[int, typer.Argument(help="how many replicas")],
    dashboard: Dashboard = _DASHBOARD,
) -> None:
    """Change the number of replicas of one deployment; the other one and running requests are left alone."""
    from deploy import service

    report = progress()
    connection = service.connect(dashboard)
    service.scale(connection, deployment, replicas)
    with waiting("starting and stopping replicas"):
        service.wait_until_scaled(connection, deployment, replicas, report)


@app.command()
def update(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[SETTING=VALUE]...", help="As in engine.max_num_seqs=16.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A Serve YAML in the place of what is deployed.")] = None,
    dashboard: Dashboard = _DASHBOARD,
) -> None:
    """Change settings of the running service; requests are answered meanwhile. `fovea config example` has them all."""
    from deploy import configuration, service

    report = progress()
    connection = service.connect(dashboard)
    changed = service.changed(connection, settings or [], config)
    configuration.checked(changed)
    with waiting("replacing the replicas"):
        service.update(connection, changed, report)
    report("the new version answers")


@app.command()
def down(dashboard: Dashboard = _DASHBOARD) -> None:
    """End the service; a `fovea up` that runs elsewhere ends too."""
    from deploy import service

    connection = service.connect(dashboard)
    service.details_of(connection)
    service.remove(connection)
    print("Fovea is down")


@app.command()
def verify(
    url: Annotated[str | None, typer.Option(help="A running service; default: one that is started for this.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The checkpoint the service serves; default: the embedded one.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="A folder of pictures; default: three drawn ones.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt a line; default: five prompts.")] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Only first sight of each picture.")] = False,
    warm: Annotated[bool, typer.Option("--warm", help="Only cache hits.")] = False,
    batched: Annotated[bool, typer.Option("--batched", help="Only 16 requests at a time.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    output: Annotated[Path, typer.Option(help="The report.")] = Path("fovea-verify.json"),
) -> None:
    """Prove that separating changes nothing: the one-piece model and the service, side by side."""
    from deploy import verify as verification

    chosen = [mode for mode, wanted in (("cold", cold), ("warm", warm), ("batched", batched)) if wanted]
    passed = verification.run(
        url=url,
        model=model,
        images=images,
        prompts=prompts,
        modes=chosen or ["cold", "warm", "batched"],
        max_tokens=max_tokens,
        output=output,
        report=progress(),
    )
    raise typer.Exit(0 if passed else 1)


if __name__ == "__main__":
    main()
