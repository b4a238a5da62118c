"""The objects inside of a body of Anthropic's Messages API: blocks, tools, thinking, formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streamserve.api.fields import (
    FieldTable,
    Refused,
    Schema,
    integer,
    nested,
    one_of,
    read_bool,
    read_object,
    read_str,
    require_in,
    shown,
    typed,
    unsupported,
    wrong_type,
)
from streamserve.api.sampling import COMMON_FIELDS
from streamserve.api.structured import json_schema
from streamserve.api.tool_fields import Tool, ToolUse, check_tool_name, read_name, tools_reader
from streamserve.core.structured_output import StructuredOutput
from streamserve.errors import InvalidParameterError

# Prefixes are cached in any case, and for as long as there is room.
_CACHED = frozenset({"cache_control"})

_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_TOOL_CHOICES = ("auto", "any", "none", "tool")


_TEXT_TABLE = FieldTable(
    {"text": read_str, "type": one_of("text")},
    {"citations": Refused(([],))},
    _CACHED,
    ("text", "type"),
)
_TOOLSET = {"toolset_name": Refused()}
_TOOL_USE_TABLE = FieldTable(
    {"id": read_str, "input": read_object, "name": read_str, "type": one_of("tool_use")},
    {"caller": Refused(({"type": "direct"},)), **_TOOLSET},
    _CACHED,
    ("id", "input", "name", "type"),
)
_THOUGHT_TABLE = FieldTable(
    {"thinking": read_str, "type": one_of("thinking")},
    annotations=_CACHED | {"signature"},
    required=("thinking", "type"),
)


def _read_block(
    where: str, raw: Any, tables: Mapping[str, FieldTable], unknown: list[str]
) -> dict[str, Any]:
    """One content block of the kinds in ``tables``."""
    block = read_object(where, raw)
    kind = read_str(f"{where}.type", require_in(block, "type", where))
    if kind not in tables:
        allowed = ", ".join(tables)
        raise unsupported(f"{where}.type", f"{shown(kind)} is not supported here (only {allowed})")
    return tables[kind].read_inner(where, block, unknown)


def read_blocks(
    name: str, value: Any, tables: Mapping[str, FieldTable], unknown: list[str]
) -> list[dict[str, Any]]:
    """Content: a string, which is one block of text, or blocks of the kinds in ``tables``."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of blocks", value)
    return [_read_block(f"{name}[{i}]", raw, tables, unknown) for i, raw in enumerate(value)]


def blocks_schema(*tables: FieldTable) -> Schema:
    """The schema of what ``read_blocks`` takes."""
    items = {"anyOf": [table.schema() for table in tables]}
    return {"anyOf": [{"type": "string"}, {"type": "array", "items": items}]}


@nested(blocks_schema(_TEXT_TABLE))
def read_texts(name: str, value: Any, unknown: list[str]) -> list[dict[str, Any]]:
    """A string, or blocks of text."""
    return read_blocks(name, value, {"text": _TEXT_TABLE}, unknown)


_TOOL_RESULT_TABLE = FieldTable(
    {
        "content": read_texts,
        "is_error": read_bool,
        "tool_use_id": read_str,
        "type": one_of("tool_result"),
    },
    _TOOLSET,
    _CACHED,
    ("tool_use_id", "type"),
)

BLOCKS = {
    "text": _TEXT_TABLE,
    "thinking": _THOUGHT_TABLE,
    "tool_result": _TOOL_RESULT_TABLE,
    "tool_use": _TOOL_USE_TABLE,
}

MESSAGE_TOOL_TABLE = FieldTable(
    {
        "description": read_str,
        "input_schema": read_object,
        "name": read_name,
        "strict": read_bool,
        "type": one_of("custom"),
    },
    {
        "allowed_callers": Refused((["direct"],)),
        "defer_loading": Refused((False,)),
        "eager_input_streaming": Refused((True,), "is not supported: input always streams"),
        "input_examples": Refused(([],)),
    },
    _CACHED,
    ("input_schema", "name"),
)


def _read_tool(where: str, raw: Any, unknown: list[str]) -> Iterator[Tool]:
    given = read_object(where, raw)
    kind = given.get("type")
    if isinstance(kind, str) and kind != "custom":
        raise unsupported(
            f"{where}.type",
            f"{shown(kind)} is not supported: this server runs no tools of its own (only 'custom')",
        )
    values = MESSAGE_TOOL_TABLE.read_inner(where, given, unknown)
    parameters: dict[str, Any] = values["input_schema"]
    function = {"name": values["name"]}
    if "description" in values:
        function["description"] = values["description"]
    definition = {"type": "function", "function": {**function, "parameters": parameters}}
    yield Tool(values["name"], definition, parameters, values.get("strict", False))


read_message_tools = tools_reader(_read_tool, MESSAGE_TOOL_TABLE.schema(), "name")


MESSAGE_CHOICE_TABLE = FieldTable(
    {
        "disable_parallel_tool_use": read_bool,
        "name": read_name,
        "type": one_of(*_TOOL_CHOICES),
    },
    required=("type",),
)


@typed(MESSAGE_CHOICE_TABLE.closed_schema())
def read_message_tool_choice(name: str, value: Any) -> dict[str, Any]:
    """``tool_choice``."""
    choice = MESSAGE_CHOICE_TABLE.read_closed(name, value)
    if choice["type"] == "tool":
        require_in(choice, "name", name)
    elif "name" in choice:
        raise InvalidParameterError(
            f"{name}.name may be given only with type 'tool', got {shown(choice['type'])}",
            param=f"{name}.name",
            code="invalid_value",
        )
    return choice


def message_tool_use(tools: tuple[Tool, ...], choice: dict[str, Any] | None) -> ToolUse:
    """``tools`` and ``tool_choice`` together. Raises ``InvalidParameterError``."""
    kind = "auto" if choice is None else choice["type"]
    if not tools:
        if kind in ("any", "tool"):
            raise InvalidParameterError(
                f"tool_choice {kind!r} may be given only with tools, got none",
                param="tool_choice",
                code="invalid_value",
            )
        return ToolUse()
    choice = choice or {}
    tool_name = choice.get("name")
    if tool_name is not None:
        check_tool_name("tool_choice.name", tool_name, tools)
    is_parallel = not choice.get("disable_parallel_tool_use", False)
    words = {"any": "required", "tool": "named"}
    return ToolUse(tools, words.get(kind, kind), tool_name, is_parallel)


THINKING_TABLE = FieldTable(
    {
        "budget_tokens": integer(1),
        "display": one_of("summarized", "omitted"),
        "type": one_of("enabled", "disabled", "adaptive"),
    },
    required=("type",),
)


@dataclass(frozen=True, slots=True)
class ThinkingConfig:
    """Whether the model thinks, for how many tokens at most, and whether that is shown."""

    is_enabled: bool = False
    budget: int | None = None
    is_shown: bool = True


@typed(THINKING_TABLE.closed_schema())
def read_thinking(name: str, value: Any) -> ThinkingConfig:
    """``thinking``. Adaptive has no limit: how much is the model's own choice."""
    values = THINKING_TABLE.read_closed(name, value)
    kind: str = values["type"]
    if kind == "enabled":
        require_in(values, "budget_tokens", name)
    for field, kinds in (("budget_tokens", ("enabled",)), ("display", ("enabled", "adaptive"))):
        if field in values and kind not in kinds:
            raise InvalidParameterError(
                f"{name}.{field} may be given only with type {' or '.join(kinds)}, got {kind!r}",
                param=f"{name}.{field}",
                code="invalid_value",
            )
    is_shown = values.get("display") != "omitted"
    return ThinkingConfig(kind != "disabled", values.get("budget_tokens"), is_shown)


_FORMAT_TABLE = FieldTable(
    {"schema": read_object, "type": one_of("json_schema")}, required=("schema", "type")
)


@typed(_FORMAT_TABLE.closed_schema())
def read_format(name: str, value: Any) -> StructuredOutput:
    """A format of the answer: JSON of a schema."""
    return json_schema(f"{name}.schema", _FORMAT_TABLE.read_closed(name, value)["schema"])


OUTPUT_TABLE = FieldTable({"effort": one_of(*_EFFORTS), "format": read_format})


@typed(OUTPUT_TABLE.closed_schema())
def read_output_config(name: str, value: Any) -> dict[str, Any]:
    """``output_config``."""
    return OUTPUT_TABLE.read_closed(name, value)


METADATA_TABLE = FieldTable({"user_id": COMMON_FIELDS["user"]})


@nested(METADATA_TABLE.schema())
def read_metadata(name: str, value: Any, unknown: list[str]) -> str:
    """``metadata``: the user, ``""`` for nobody."""
    user: str = METADATA_TABLE.read_inner(name, value, unknown).get("user_id", "")
    return user
