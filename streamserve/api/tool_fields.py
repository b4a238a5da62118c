"""``tools``, ``tool_choice`` and the calls in messages, read from JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamserve.api.chat_messages import call_arguments, tool_call
from streamserve.api.fields import (
    FieldTable,
    NestedReader,
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
from streamserve.errors import InvalidParameterError

MAX_TOOLS = 512  # OpenAI's 128 are soon had by clients with a few MCP servers
MAX_CALLS = 1024  # in one message
_NAME = re.compile(r"^[a-zA-Z0-9_.-]{1,128}$")  # MCP's and Anthropic's: OpenAI's are half as long
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that the model may call.

    ``definition`` is what the chat template sees, ``parameters`` the JSON Schema of its arguments.
    """

    name: str
    definition: dict[str, Any]
    parameters: dict[str, Any]
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and what it wants of them.

    ``choice`` is none, auto, required, or named, and then ``name`` says which tool.
    """

    tools: tuple[Tool, ...] = ()
    choice: str = "none"
    name: str | None = None
    is_parallel: bool = True

    @property
    def is_forced(self) -> bool:
        """Whether the answer must be calls and nothing else."""
        return self.choice in ("required", "named")


NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@typed({"type": "string", "pattern": _NAME.pattern})
def read_name(name: str, value: Any) -> str:
    """A function's name."""
    text = read_str(name, value)
    if _NAME.fullmatch(text) is None:
        raise out_of_range(name, "1 to 128 letters, digits, underscores, dots and dashes", text)
    return text


@typed({"const": "function"})
def read_function_type(name: str, value: Any) -> str:
    """``type`` of a tool or a call: there is one."""
    kind = read_str(name, value)
    if kind != "function":
        raise unsupported(name, f"{shown(kind)} is not supported (only 'function' is)")
    return kind


FUNCTION_TABLE = FieldTable(
    {
        "name": read_name,
        "description": read_str,
        "parameters": read_object,
        "strict": read_bool,
    },
    required=("name",),
)
TOOL_TABLE = FieldTable(
    {
        "function": FUNCTION_TABLE.reader,
        "type": read_function_type,
    },
    required=("type", "function"),
)


def _read_tool(name: str, value: Any, unknown: list[str]) -> Iterator[Tool]:
    function = TOOL_TABLE.read_inner(name, value, unknown)["function"]
    is_strict = function.pop("strict", False)
    parameters = function.get("parameters", NO_PARAMETERS)
    yield Tool(function["name"], {"type": "function", "function": function}, parameters, is_strict)


def tools_reader(
    read_item: Callable[[str, Any, list[str]], Iterator[Tool]],
    item_schema: dict[str, Any],
    name_field: str,
) -> NestedReader[tuple[Tool, ...]]:
    """A reader of ``tools``; ``read_item`` finds one in an item, whose name stands in
    ``name_field``, or several.
    """

    @nested({"type": "array", "maxItems": MAX_TOOLS, "items": item_schema})
    def read(name: str, value: Any, unknown: list[str]) -> tuple[Tool, ...]:
        tools: dict[str, Tool] = {}
        for i, raw in enumerate(read_list(name, value, "tools", MAX_TOOLS)):
            where = f"{name}[{i}]"
            for tool in read_item(where, raw, unknown):
                if tool.name in tools:
                    raise out_of_range(
                        f"{where}.{name_field}", "unlike the other tools' names", tool.name
                    )
                tools[tool.name] = tool
        if len(tools) > MAX_TOOLS:
            raise out_of_range(name, f"an array of at most {MAX_TOOLS} tools", list(tools))
        return tuple(tools.values())

    return read


read_tools = tools_reader(_read_tool, TOOL_TABLE.schema(), "function.name")


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """``tool_choice`` as given: one of three words, or a name."""

    choice: str
    name: str | None = None


_NAMED_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": schema_of(read_name)},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}


@typed({"anyOf": [{"enum": list(_CHOICES)}, _NAMED_SCHEMA]})
def read_tool_choice(name: str, value: Any) -> ToolChoice:
    """``tool_choice``."""
    if isinstance(value, str):
        if value not in _CHOICES:
            raise out_of_range(name, f"one of {', '.join(_CHOICES)}, or a function", value)
        return ToolChoice(value)
    if not isinstance(value, dict):
        raise wrong_type(name, "a string or an object", value)
    read_function_type(f"{name}.type", require_in(value, "type", name))
    function = read_object(f"{name}.function", require_in(value, "function", name))
    where = f"{name}.function"
    return ToolChoice("named", read_name(f"{where}.name", require_in(function, "name", where)))


def check_tool_name(param: str, name: str, tools: Sequence[Tool]) -> None:
    """Raise ``InvalidParameterError`` unless one of the tools has this name."""
    names = [tool.name for tool in tools]
    if name not in names:
        some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise out_of_range(param, f"one of {some}", name)


def tool_use(values: Mapping[str, Any]) -> ToolUse:
    """Put a request's fields together. Raises ``InvalidParameterError`` if they do not agree."""
    tools: tuple[Tool, ...] = values.get("tools", ())
    choice: ToolChoice = values.get("tool_choice", ToolChoice("auto"))
    if not tools:
        if choice.choice in ("required", "named"):
            raise InvalidParameterError(
                "tool_choice may ask for a call only with tools, got none",
                param="tool_choice",
                code="invalid_value",
            )
        return ToolUse()
    if choice.name is not None:
        check_tool_name("tool_choice.function.name", choice.name, tools)
    return ToolUse(tools, choice.choice, choice.name, values.get("parallel_tool_calls", True))


@typed({"type": "string"})
def read_arguments(name: str, value: Any) -> dict[str, Any]:
    """The object that a call's arguments are: templates want it parsed."""
    return call_arguments(read_str(name, value))


# What clients leave there that put a streamed call together, or parsed it.
CALLED_TABLE = FieldTable(
    {"name": read_name, "arguments": read_arguments},
    annotations=frozenset({"parsed_arguments"}),
    required=("name", "arguments"),
)
CALL_TABLE = FieldTable(
    {
        "function": CALLED_TABLE.reader,
        "id": read_str,
        "type": read_function_type,
    },
    annotations=frozenset({"index"}),
    required=("function", "id"),
)


@nested({"type": "array", "maxItems": MAX_CALLS, "items": CALL_TABLE.schema()})
def read_tool_calls(name: str, value: Any, unknown: list[str]) -> list[dict[str, Any]]:
    """``tool_calls`` of a message, as templates expect them."""
    calls = read_list(name, value, "tool calls", MAX_CALLS)
    read = (CALL_TABLE.read_inner(f"{name}[{i}]", raw, unknown) for i, raw in enumerate(calls))
    return [tool_call(call["id"], **call["function"]) for call in read]
