"""`fovea config show` and `example`: the configuration as YAML, from the models that check it."""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from deploy import service
from deploy.app import AppConfig

_PRODUCTION = Path(__file__).parent / "serve.yaml"
_WIDTH = 120
_PASSWORD = re.compile(r"(://[^:@/\s]*:)[^@/\s]+@")  # in a URL
_LIMITS = (
    ("ge", "at least {}"),
    ("gt", "above {}"),
    ("le", "at most {}"),
    ("lt", "below {}"),
    ("min_length", "at least {} characters"),
)


def checked(config: Mapping[str, Any]) -> AppConfig:
    """The `args:` of an application configuration. Raises ServiceError that names each wrong field."""
    try:
        return AppConfig.model_validate(service.application_of(config).get("args", {}))
    except ValidationError as exc:
        lines = [f"args.{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors()]
        raise service.ServiceError("; ".join(lines) + " (`fovea config example` shows every field)") from exc


def effective(config: Mapping[str, Any]) -> str:
    """With every default filled in, and without secrets."""
    args = checked(config).model_dump(mode="json")
    applications = [
        {**application, "args": args} if application["name"] == service.APPLICATION else application
        for application in config["applications"]
    ]
    text = yaml.safe_dump({**config, "applications": applications}, sort_keys=False, width=_WIDTH)
    return without_password(text)


def without_password(text: str) -> str:
    """URLs in it keep their users only."""
    return _PASSWORD.sub(r"\1**********@", text)


def example() -> str:
    """The production YAML with every field of `args:` under its description."""
    head, _, rest = _PRODUCTION.read_text().partition("    args:\n")
    deployments = rest[rest.index("    deployments:\n") :]
    return head + "    args:\n" + textwrap.indent(_fields(AppConfig()), " " * 6) + deployments


def _fields(model: BaseModel) -> str:
    """The fields of one model with its values; unset ones as comments."""
    lines = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            lines.append(f"{name}:\n" + textwrap.indent(_fields(value), "  "))
            continue
        lines += [f"# {line}" for line in textwrap.wrap(_meaning(field), _WIDTH - 12)]
        lines.append(f"# {name}:" if value is None else f"{name}: {yaml.safe_dump(value).splitlines()[0]}")
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def _meaning(field: FieldInfo) -> str:
    """The description, and what pydantic holds the value to."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    limits = [
        words.format(getattr(one, name)) for one in field.metadata for name, words in _LIMITS if hasattr(one, name)
    ]
    if choices:
        limits.append("one of " + ", ".join(choices))
    return "; ".join(part for part in (field.description, *limits) if part)
