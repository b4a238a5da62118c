"""``input``: what is said, called, thought and returned, as items. Read from JSON, and listed."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from typing import Any

from streamserve.api.fields import (
    FieldTable,
    Reader,
    Refused,
    Schema,
    list_of,
    nested,
    one_of,
    out_of_range,
    read_object,
    read_str,
    require_in,
    shown,
    string,
    typed,
    unsupported,
    wrong_type,
)
from streamserve.api.tool_fields import read_name
from streamserve.errors import InvalidParameterError

Item = dict[str, Any]

MAX_ITEMS = 4096
MAX_PARTS = 1024
ROLES = ("assistant", "developer", "system", "user")

read_id = string(1, 128)
"""An id of an item, a call or a response."""

# What servers put on the items of an answer, and clients send back.
_STATUS = frozenset({"status"})


def seal(thoughts: str) -> str:
    """Thoughts as ``encrypted_content``. They are no secret here: only opaque."""
    return base64.b64encode(thoughts.encode()).decode()


def unseal(content: str) -> str | None:
    """The thoughts of an ``encrypted_content`` of ours, else ``None``."""
    try:
        return base64.b64decode(content, validate=True).decode()
    except (binascii.Error, ValueError):
        return None


@typed({"type": "string"})
def _read_sealed(name: str, value: Any) -> str:
    text = read_str(name, value)
    if unseal(text) is None:
        raise InvalidParameterError(
            f"{name} must be as this server wrote it", param=name, code="invalid_value"
        )
    return text


def _const(kind: str) -> Reader:
    @typed({"const": kind})
    def read(_name: str, _value: Any) -> str:
        return kind  # it is by this that the table was found

    return read


def _text_parts(kinds: tuple[str, ...], why: str) -> Callable[[str, Any], tuple[str, ...]]:
    """A reader of text parts: their texts. What servers add to a part says nothing."""

    @typed(
        {
            "type": "object",
            "properties": {"type": {"enum": list(kinds)}, "text": {"type": "string"}},
            "required": ["type", "text"],
        }
    )
    def read_part(name: str, value: Any) -> str:
        part = read_object(name, value)
        kind = read_str(f"{name}.type", require_in(part, "type", name))
        if kind not in kinds:
            raise unsupported(f"{name}.type", f"{shown(kind)} is not supported: {why}")
        return read_str(f"{name}.text", require_in(part, "text", name))

    return list_of(read_part, "text parts", MAX_PARTS)


_ONLY_TEXT = "this server reads only text"
_read_parts = _text_parts(("input_text", "output_text"), _ONLY_TEXT)
_read_returned = _text_parts(("input_text",), _ONLY_TEXT)


def _text_or(read_parts: Callable[[str, Any], tuple[str, ...]]) -> Reader:
    parts_schema: Schema = getattr(read_parts, "schema", {})

    @typed({"anyOf": [{"type": "string"}, parts_schema]})
    def read(name: str, value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list):
            raise wrong_type(name, "a string or an array of text parts", value)
        return read_parts(name, value)

    return read


MESSAGE_TABLE = FieldTable(
    {
        "content": _text_or(_read_parts),
        "id": read_id,
        "role": one_of(*ROLES),
        "type": _const("message"),
    },
    annotations=_STATUS | {"phase"},
    required=("content", "role"),
)
CALL_TABLE = FieldTable(
    {
        "arguments": read_str,
        "call_id": read_id,
        "id": read_id,
        "name": read_name,
        "namespace": read_name,
        "type": _const("function_call"),
    },
    {"async": Refused((False,)), "caller": Refused()},
    annotations=_STATUS | {"parsed_arguments"},
    required=("arguments", "call_id", "name", "type"),
)
RETURN_TABLE = FieldTable(
    {
        "call_id": read_id,
        "id": read_id,
        "output": _text_or(_read_returned),
        "type": _const("function_call_output"),
    },
    {"caller": Refused()},
    annotations=_STATUS | {"name", "namespace"},
    required=("call_id", "output", "type"),
)
REASONING_TABLE = FieldTable(
    {
        "content": _text_parts(("reasoning_text",), "thoughts are reasoning_text"),
        "encrypted_content": _read_sealed,
        "id": read_id,
        "summary": _text_parts(("summary_text",), "summaries are summary_text"),
        "type": _const("reasoning"),
    },
    annotations=_STATUS,
    required=("type",),
)
REFERENCE_TABLE = FieldTable(
    {"id": read_id, "type": _const("item_reference")}, required=("id", "type")
)
_TABLES = {
    "message": MESSAGE_TABLE,
    "function_call": CALL_TABLE,
    "function_call_output": RETURN_TABLE,
    "reasoning": REASONING_TABLE,
    "item_reference": REFERENCE_TABLE,
}


def message_item(role: str, texts: Iterable[str]) -> Item:
    """A message as it is listed."""
    if role == "assistant":
        parts = [
            {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
            for text in texts
        ]
    else:
        parts = [{"type": "input_text", "text": text} for text in texts]
    return {"type": "message", "role": role, "status": "completed", "content": parts}


def _kept(kind: str, values: dict[str, Any]) -> Item:
    """What was read, as it is listed."""
    if kind == "message":
        item = message_item(values["role"], values["content"])
    elif kind == "function_call":
        item = {"type": kind, "status": "completed"} | {
            name: values[name]
            for name in ("call_id", "name", "namespace", "arguments")
            if name in values
        }
    elif kind == "function_call_output":
        texts = values["output"]
        output = (
            texts[0]
            if len(texts) == 1
            else [{"type": "input_text", "text": text} for text in texts]
        )
        item = {
            "type": kind,
            "status": "completed",
            "call_id": values["call_id"],
            "output": output,
        }
    elif kind == "reasoning":
        item = {
            "type": kind,
            "summary": _parts_of("summary_text", values.get("summary", ())),
            "content": _parts_of("reasoning_text", values.get("content", ())),
        }
        if "encrypted_content" in values:
            item["encrypted_content"] = values["encrypted_content"]
    else:
        item = {"type": kind}
    if "id" in values:
        item["id"] = values["id"]
    return item


def _parts_of(kind: str, texts: Iterable[str]) -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for text in texts]


def _read_item(name: str, raw: Any, unknown: list[str]) -> Item:
    item = read_object(name, raw)
    kind = "message" if "role" in item else None
    if item.get("type") is not None:
        kind = read_str(f"{name}.type", item["type"])
    if kind is None:
        require_in(item, "type", name)
    table = _TABLES.get(kind or "")
    if table is None:
        allowed = ", ".join(_TABLES)
        raise unsupported(f"{name}.type", f"{shown(kind)} is not supported (only {allowed} are)")
    return _kept(kind or "", table.read_inner(name, item, unknown))


def _schema() -> Schema:
    """By ``type``, which a message need not name."""
    options: list[Schema] = []
    for kind, table in _TABLES.items():
        schema = table.schema()
        if kind == "message":
            properties = {**schema["properties"], "type": {"enum": [kind, None]}}
            schema = {**schema, "properties": properties}
        options.append(schema)
    return {"anyOf": options}


@nested(
    {"anyOf": [{"type": "string"}, {"type": "array", "maxItems": MAX_ITEMS, "items": _schema()}]}
)
def read_input(name: str, value: Any, unknown: list[str]) -> tuple[Item, ...]:
    """``input``: what a user says, or items, in the form in which they are kept."""
    if isinstance(value, str):
        return (message_item("user", (value,)),)
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of items", value)
    if len(value) > MAX_ITEMS:
        raise out_of_range(name, f"an array of at most {MAX_ITEMS} items", value)
    return tuple(
        _plain_message(raw) or _read_item(f"{name}[{i}]", raw, unknown)
        for i, raw in enumerate(value)
    )


def _plain_message(raw: Any) -> Item | None:
    """What most items are, without the names of fields."""
    if not isinstance(raw, dict) or len(raw) != 2:
        return None
    role, content = raw.get("role"), raw.get("content")
    if not isinstance(role, str) or not isinstance(content, str) or role not in ROLES:
        return None
    return message_item(role, (content,))
