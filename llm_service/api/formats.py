"""What an answer must look like: OpenAI's `response_format`, vLLM's `structured_outputs`, and calls of tools."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from common.errors import InvalidRequestError
from llm_service.chat import Tool
from llm_service.engine.structured_output import StructuredOutput


class JsonSchemaFormat(BaseModel):
    """`name`, `description` and `strict` say nothing to a grammar: every schema is followed strictly."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def structured_output(self) -> StructuredOutput | None:
        match self.type:
            case "text":
                return None
            case "json_object":
                return StructuredOutput("json", {"type": "object"}, "response_format")
            case "json_schema":
                if self.json_schema is None:
                    raise InvalidRequestError("json_schema is required", param="response_format.json_schema")
                return StructuredOutput("json", self.json_schema.schema_, "response_format.json_schema.schema")


class StructuredOutputs(BaseModel):
    """vLLM's: one of the three."""

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)] | None = None

    def structured_output(self) -> StructuredOutput:
        values = {"json": self.json_, "regex": self.regex, "choice": self.choice}
        given = [(kind, value) for kind, value in values.items() if value is not None]
        if len(given) != 1:
            raise InvalidRequestError(
                f"structured_outputs must have one of json, regex and choice, not {len(given)} of them",
                param="structured_outputs",
            )
        kind, value = given[0]
        if kind == "json" and isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as exc:
                raise InvalidRequestError("the schema is not valid JSON", param="structured_outputs.json") from exc
        return StructuredOutput(cast(Any, kind), value, f"structured_outputs.{kind}")


def called_tools(
    tools: Sequence[Tool], choice: str, *, name: str | None = None, parallel: bool = True
) -> tuple[tuple[Tool, ...], StructuredOutput | None]:
    """The tools that an answer may call, and what it must be if it has to call one.

    `choice` is `auto`, `none`, `required`, or `named` with the `name` of the only one.
    """
    if choice == "none" or not tools:
        if choice in ("required", "named"):
            raise InvalidRequestError("tool_choice needs tools", param="tool_choice")
        return (), None
    if choice == "auto":
        return tuple(tools), None
    allowed = [tool for tool in tools if choice == "required" or tool.name == name]
    if not allowed:
        raise InvalidRequestError(
            f"tool_choice names {str(name)[:64]!r}, which is not one of tools", param="tool_choice"
        )
    calls = [{"name": tool.name, "parameters": tool.parameters} for tool in allowed]
    source = {"calls": calls, "parallel": parallel and choice == "required"}
    return tuple(tools), StructuredOutput("tool_calls", source, "tool_choice")
