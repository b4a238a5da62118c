"""The grammars of calls: those that must be made, and those that a model may choose to make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson

from streamserve.api.tool_fields import Tool, ToolUse
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.engine.schema_refs import moved
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
        "items": {"anyOf": [_call_schema(tool, i) for i, tool in enumerate(use.tools)]},
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
    return schema if '"allOf":' in _dumps(schema) else _closed(schema)


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


def _call_schema(tool: Tool, index: int) -> dict[str, Any]:
    parameters = moved(closed(tool.parameters), f"#/items/anyOf/{index}/properties/parameters")
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def forced(params: SamplingParams, use: ToolUse) -> SamplingParams:
    """The same sampling, held to ``forced_schema``.

    Raises ``InvalidParameterError`` where the request says otherwise what the answer looks like.
    """
    _check_free(params, use)
    schema = _dumps(forced_schema(use))
    grammar = StructuredOutput(kind=GrammarKind.JSON_SCHEMA, text=schema, param="tools")
    return replace(params, structured_output=grammar)


def forced_in_format(params: SamplingParams, use: ToolUse, tool_parser: str) -> SamplingParams:
    """The same sampling, held to one call as the model itself writes it. Raises as `forced`."""
    _check_free(params, use)
    tools = [tool for tool in use.tools if use.name in (None, tool.name)]
    task = {
        "parser": tool_parser,
        "tools": [{"name": tool.name, "arguments": closed(tool.parameters)} for tool in tools],
        "answer": None,
        "is_forced": True,
    }
    grammar = StructuredOutput(kind=GrammarKind.TOOL_CALLS, text=_dumps(task), param="tools")
    return replace(params, structured_output=grammar)


def _check_free(params: SamplingParams, use: ToolUse) -> None:
    if (other := params.structured_output) is not None:
        raise InvalidParameterError(
            f"tool_choice {use.choice} and {other.param} both say what the answer looks like: give"
            " one",
            param="tool_choice",
            code="invalid_value",
        )


def chosen(params: SamplingParams, use: ToolUse, tool_parser: str) -> SamplingParams:
    """The same sampling, with calls in free text held to their tools' schemas.

    That is for tools that are ``strict``; arguments of others are any object. If the whole answer
    has a JSON schema, it is that or calls. Raises ``InvalidParameterError`` for another format.
    """
    answer = params.structured_output
    if answer is not None and answer.kind is not GrammarKind.JSON_SCHEMA:
        raise InvalidParameterError(
            f"{answer.param} leaves no room for the calls of tool_choice 'auto': set"
            " tool_choice to 'none' or 'required'",
            param=answer.param,
            code="invalid_value",
        )
    if not are_held(params, use):
        return params
    task = {
        "parser": tool_parser,
        "tools": [
            {
                "name": tool.name,
                "arguments": closed(tool.parameters) if tool.is_strict else {"type": "object"},
            }
            for tool in use.tools
        ],
        "answer": None if answer is None else orjson.loads(answer.text),
    }
    grammar = StructuredOutput(
        kind=GrammarKind.TOOL_CALLS,
        text=_dumps(task),
        whitespace_pattern=None if answer is None else answer.whitespace_pattern,
        param="tools" if answer is None else answer.param,
    )
    return replace(params, structured_output=grammar)


def are_held(params: SamplingParams, use: ToolUse) -> bool:
    """Whether a grammar says what calls look like: none of them can be malformed."""
    is_held = any(tool.is_strict for tool in use.tools) or params.structured_output is not None
    return use.is_forced or (use.choice == "auto" and is_held)


def may_be_free(grammar: StructuredOutput | None) -> bool:
    """Whether an answer that follows the grammar may begin with any text."""
    return grammar is not None and grammar.kind in (
        GrammarKind.STRUCTURAL_TAG, GrammarKind.TOOL_CALLS,
    )  # fmt: skip


def _dumps(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError as exc:  # half of a surrogate pair
        raise InvalidParameterError(
            f"tools cannot be written as JSON: {exc}", param="tools", code="invalid_value"
        ) from exc
