"""`fovea config`. Commands import what they need themselves, so that `--help` answers at once."""

import json
from pathlib import Path
from typing import Annotated

import typer

config = typer.Typer(help="The configuration: what is in force, what there is, an example.", no_args_is_help=True)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="A Serve YAML; default: serve_shapes.yaml, CPU.")]


@config.command()
def show(file: ConfigFile = None) -> None:
    """A Serve YAML with every default filled in; secrets stay hidden."""
    from deploy import configuration, service

    print(configuration.effective(service.application_config(config=file or service.DEFAULT_CONFIG)), end="")


@config.command()
def schema() -> None:
    """The JSON schema of `args:`, for editors that check YAML."""
    from deploy.app import AppConfig

    print(json.dumps(AppConfig.model_json_schema(), indent=2))


@config.command()
def example() -> None:
    """A Serve YAML with every field of `args:`, its default and what it means."""
    from deploy import configuration

    print(configuration.example(), end="")
