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
        parameters: dict[str, Any] = closed(tool.parameters)
        return parameters
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call_schema(tool) for tool in use.tools]},
    }
    if not use.is_parallel:
        schema["maxItems"] = 1
    return schema


_SAYS_MORE = frozenset(
    {
        "$ref",
        "additionalProperties",
        "anyOf",
        "dependentSchemas",
        "if",
        "not",
        "oneOf",
        "patternProperties",
        "unevaluatedProperties",
    }
)


def closed(schema: Any) -> Any:
    """The schema of a call's arguments with no members but those it names, as vLLM has it.

    A function takes no others, and a model that may invent some may do so for ever. An object that
    names none, or says anything else of its members, stays as it is, and so does a schema with an
    ``allOf``, where one part does not know the other's.
    """
    return schema if b'"allOf":' in orjson.dumps(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    result = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(inner := schema.get(key), dict):
            result[key] = {name: _closed(value) for name, value in inner.items()}
    for key in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(inner := schema.get(key), list):
            result[key] = [_closed(value) for value in inner]
    result |= {key: _closed(schema[key]) for key in ("items",) if key in schema}
    names = schema.get("properties")
    required = schema.get("required", [])
    if (
        isinstance(names, dict)
        and names
        and isinstance(required, list)
        and names.keys() >= {name for name in required if isinstance(name, str)}
        and not _SAYS_MORE & schema.keys()
    ):
        result["additionalProperties"] = False
    return result


def _call_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": closed(tool.parameters)},
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
