"""Calls that must be made: the schema that a grammar holds the answer to, as vLLM builds it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson

from streamserve.api.tool_fields import Tool, ToolUse
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.errors import InvalidParameterError


def forced_schema(use: ToolUse) -> dict[str, Any]:
    """The JSON Schema of the whole answer: a named tool's arguments, or an array of calls."""
    if use.name is not None:
        [tool] = [tool for tool in use.tools if tool.name == use.name]
        return tool.parameters
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call_schema(tool) for tool in use.tools]},
    }
    if not use.is_parallel:
        schema["maxItems"] = 1
    return schema


def _call_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": tool.parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def forced(params: SamplingParams, use: ToolUse) -> SamplingParams:
    """The same sampling, held to ``forced_schema``.

    Raises ``InvalidParameterError`` where the request says otherwise what the answer looks like.
    """
    if (other := params.structured_output) is not None:
        raise InvalidParameterError(
            f"tool_choice {use.choice} and {other.param} both say what the answer looks like: give"
            " one",
            param="tool_choice",
            code="invalid_value",
        )
    schema = orjson.dumps(forced_schema(use)).decode()
    grammar = StructuredOutput(kind=GrammarKind.JSON_SCHEMA, text=schema, param="tools")
    return replace(params, structured_output=grammar)
