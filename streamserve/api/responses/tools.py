"""``tools`` and ``tool_choice`` in the flat shape of the Responses API."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streamserve.api.fields import (
    FieldTable,
    Refused,
    nested,
    out_of_range,
    read_bool,
    read_list,
    read_object,
    read_str,
    require_in,
    schema_of,
    shown,
    typed,
    unsupported,
    wrong_type,
)
from streamserve.api.tool_fields import (
    MAX_TOOLS,
    NO_PARAMETERS,
    Tool,
    ToolChoice,
    ToolUse,
    read_function_type,
    read_name,
    tool_use,
    tools_reader,
)

_WORDS = ("none", "auto", "required")
_MODES = ("auto", "required")


TOOL_TABLE = FieldTable(
    {
        "description": read_str,
        "name": read_name,
        "parameters": read_object,
        "strict": read_bool,
        "type": read_function_type,
    },
    {
        "allowed_callers": Refused((["direct"],)),
        "async": Refused((False,)),
        "defer_loading": Refused((False,)),
        "output_schema": Refused(),
    },
    required=("name", "type"),
)


@dataclass(frozen=True, slots=True)
class NamespacedTool(Tool):
    """A function in a namespace, which the model knows by the names of both."""

    namespace: str = ""
    own_name: str = ""
    description: str | None = None  # the namespace's


def qualified(namespace: str | None, name: str) -> str:
    """The name by which the model knows a function."""
    return name if namespace is None else f"{namespace.removesuffix('__')}__{name}"


@typed({"const": "namespace"})
def _read_namespace_type(_name: str, _value: Any) -> str:
    return "namespace"  # it is by this that the table was found


@nested({"type": "array", "maxItems": MAX_TOOLS, "items": TOOL_TABLE.schema()})
def _read_functions(name: str, value: Any, unknown: list[str]) -> list[Tool]:
    functions = read_list(name, value, "tools", MAX_TOOLS)
    return [_read_function(f"{name}[{i}]", raw, unknown) for i, raw in enumerate(functions)]


NAMESPACE_TABLE = FieldTable(
    {
        "description": read_str,
        "name": read_name,
        "tools": _read_functions,
        "type": _read_namespace_type,
    },
    required=("name", "tools", "type"),
)


def _read_item(name: str, value: Any, unknown: list[str]) -> Iterator[Tool]:
    given = read_object(name, value)
    kind = read_str(f"{name}.type", require_in(given, "type", name))
    if kind == "function":
        yield _read_function(name, given, unknown)
        return
    if kind != "namespace":
        raise unsupported(
            f"{name}.type", f"{shown(kind)} is not supported (only 'function' and 'namespace' are)"
        )
    values = NAMESPACE_TABLE.read_inner(name, given, unknown)
    namespace: str = values["name"]
    for tool in values["tools"]:
        known_as = qualified(namespace, tool.name)
        yield NamespacedTool(
            known_as,
            {"type": "function", "function": {**tool.definition["function"], "name": known_as}},
            tool.parameters,
            tool.is_strict,
            namespace,
            tool.name,
            values.get("description"),
        )


def _read_function(name: str, value: Any, unknown: list[str]) -> Tool:
    given = read_object(name, value)
    # First, because the other fields are another type's.
    read_function_type(f"{name}.type", require_in(given, "type", name))
    values = TOOL_TABLE.read_inner(name, given, unknown)
    function = {key: values[key] for key in ("name", "description", "parameters") if key in values}
    definition = {"type": "function", "function": function}
    parameters = values.get("parameters", NO_PARAMETERS)
    return Tool(values["name"], definition, parameters, values.get("strict", True))


read_tools = tools_reader(
    _read_item, {"anyOf": [TOOL_TABLE.schema(), NAMESPACE_TABLE.schema()]}, "name"
)


@dataclass(frozen=True, slots=True)
class AllowedTools:
    """``tool_choice`` that allows some of the tools only."""

    mode: str
    names: tuple[str, ...]


_NAMED: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": schema_of(read_name)},
    "required": ["type", "name"],
}
_ALLOWED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"const": "allowed_tools"},
        "mode": {"enum": list(_MODES)},
        "tools": {"type": "array", "minItems": 1, "maxItems": MAX_TOOLS, "items": _NAMED},
    },
    "required": ["type", "mode", "tools"],
}


@typed({"anyOf": [{"enum": list(_WORDS)}, _NAMED, _ALLOWED]})
def read_tool_choice(name: str, value: Any) -> ToolChoice | AllowedTools:
    """``tool_choice``."""
    if isinstance(value, str):
        if value not in _WORDS:
            raise out_of_range(name, f"one of {', '.join(_WORDS)}, or an object", value)
        return ToolChoice(value)
    if not isinstance(value, dict):
        raise wrong_type(name, "a string or an object", value)
    if value.get("type") == "allowed_tools":
        return _read_allowed(name, value)
    return ToolChoice("named", _read_named(name, value))


def _read_named(name: str, value: Any) -> str:
    given = read_object(name, value)
    read_function_type(f"{name}.type", require_in(given, "type", name))
    return read_name(f"{name}.name", require_in(given, "name", name))


def _read_allowed(name: str, value: dict[str, Any]) -> AllowedTools:
    mode = read_str(f"{name}.mode", require_in(value, "mode", name))
    if mode not in _MODES:
        raise out_of_range(f"{name}.mode", f"one of {', '.join(_MODES)}", mode)
    tools = require_in(value, "tools", name)
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        raise out_of_range(f"{name}.tools", f"an array of 1 to {MAX_TOOLS} tools", tools)
    names = [_read_named(f"{name}.tools[{i}]", tool) for i, tool in enumerate(tools)]
    return AllowedTools(mode, tuple(names))


def use_of_tools(values: Mapping[str, Any]) -> ToolUse:
    """Put a request's fields together. Raises ``InvalidParameterError`` if they do not agree."""
    choice = values.get("tool_choice")
    if not isinstance(choice, AllowedTools):
        return tool_use(values)
    tools: tuple[Tool, ...] = values.get("tools", ())
    known = {tool.name for tool in tools}
    for name in choice.names:
        if name not in known:
            raise out_of_range("tool_choice.tools", "among the request's tools", name)
    allowed = tuple(tool for tool in tools if tool.name in choice.names)
    return ToolUse(allowed, choice.mode, None, values.get("parallel_tool_calls", True))


def shown_tools(tools: Iterable[Tool]) -> list[dict[str, Any]]:
    """The tools as a response repeats them."""
    shown: list[dict[str, Any]] = []
    namespaces: dict[str, list[dict[str, Any]]] = {}
    for tool in tools:
        function = {
            "type": "function",
            "name": tool.name,
            "description": tool.definition["function"].get("description"),
            "parameters": tool.parameters,
            "strict": tool.is_strict,
        }
        if not isinstance(tool, NamespacedTool):
            shown.append(function)
            continue
        name = tool.namespace
        if name not in namespaces:
            namespaces[name] = []
            shown.append(
                {
                    "type": "namespace",
                    "name": name,
                    "description": tool.description,
                    "tools": namespaces[name],
                }
            )
        namespaces[name].append({**function, "name": tool.own_name})
    return shown


def names_in_namespaces(tools: Iterable[Tool]) -> dict[str, tuple[str, str]]:
    """By the name that the model knows: the namespace, and the name in it."""
    return {
        tool.name: (tool.namespace, tool.own_name)
        for tool in tools
        if isinstance(tool, NamespacedTool)
    }
