"""Options that commands have in common."""

from typing import Annotated

import typer

URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option(help="Where the service answers.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="FOVEA_API_KEY", help="For a service with keys.", show_default=False)
]
