"""Structural tags: answers that are free up to a trigger, read from JSON in vLLM's two spellings.

Old: ``structures`` and ``triggers``. New: ``format``, a tree of xgrammar's. What the grammar can
follow to the letter is honoured; anything else is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orjson

from streamserve.api.fields import (
    check_keys,
    out_of_range,
    read_bool,
    read_object,
    read_str,
    require_in,
    shown,
    unsupported,
    wrong_type,
)
from streamserve.errors import InvalidParameterError

MAX_ELEMENTS = 256  # of one list
MAX_DEPTH = 16

Format = dict[str, Any]


def read_tree(name: str, given: dict[str, Any]) -> Format:
    """The tree of an object of type ``structural_tag``, every part of it checked and settled."""
    if read_str(f"{name}.type", require_in(given, "type", name)) != "structural_tag":
        raise out_of_range(f"{name}.type", "'structural_tag'", given["type"])
    if given.get("format") is not None:
        check_keys(name, given, {"format", "type"})
        return _read_format(f"{name}.format", given["format"], 0)
    check_keys(name, given, {"structures", "triggers", "type"})
    where = f"{name}.structures"
    tags: list[Format] = []
    for i, raw in enumerate(_items(where, require_in(given, "structures", name))):
        structure = read_object(f"{where}[{i}]", raw)
        check_keys(f"{where}[{i}]", structure, {"begin", "end", "schema"})
        schema = structure.get("schema")
        content = {"type": "json_schema", "json_schema": {} if schema is None else schema}
        tags.append({"begin": structure.get("begin"), "content": content,
                     "end": structure.get("end")})  # fmt: skip
    triggered = {"type": "triggered_tags", "tags": tags, "triggers": given.get("triggers")}
    return _read_triggered(name, triggered, 0, of_tags="structures")


def is_open(tree: Format) -> bool:
    """Whether text may go on behind what has matched, so that nothing else can come there."""
    match tree["type"]:
        case "any_text":
            return True
        case "triggered_tags":
            always_ends = tree["stop_after_first"] and tree["at_least_one"]
            return not always_ends or any(map(is_open, tree["tags"]))
        case "or" | "tags_with_separator":
            return any(map(is_open, tree.get("elements") or tree["tags"]))
        case "sequence":
            return is_open(tree["elements"][-1])
        case "tag":
            return is_open(tree["content"]) and not all(_ends(tree))
    return False


def _ends(tag: Format) -> Sequence[str]:
    end = tag["end"]
    return [end] if isinstance(end, str) else end


def _read_format(name: str, value: Any, depth: int) -> Format:
    given = read_object(name, value)
    if depth > MAX_DEPTH:
        raise InvalidParameterError(
            f"{name} must be at most {MAX_DEPTH} levels deep", param=name, code="invalid_value"
        )
    kind = read_str(f"{name}.type", require_in(given, "type", name))
    reader = _READERS.get(kind)
    if reader is None:
        allowed = ", ".join(_READERS)
        raise unsupported(f"{name}.type", f"{shown(kind)} is not supported: it is one of {allowed}")
    return reader(name, given, depth)


def _read_any_text(name: str, given: Format, _depth: int) -> Format:
    if given.get("excludes"):
        raise InvalidParameterError(
            f"{name}.excludes is not supported", param=name, code="unsupported_parameter"
        )
    check_keys(name, given, {"excludes", "type"})
    return {"type": "any_text"}


def _read_json_schema(name: str, given: Format, _depth: int) -> Format:
    check_keys(name, given, {"json_schema", "style", "type"})
    if given.get("style") not in (None, "json"):
        raise InvalidParameterError(
            f"{name}.style {shown(given['style'])} is not supported (only 'json' is)",
            param=name,
            code="unsupported_parameter",
        )
    schema = require_in(given, "json_schema", name)
    if schema is not True and not isinstance(schema, dict):
        raise wrong_type(f"{name}.json_schema", "an object or true", schema)
    return {"type": "json_schema", "json_schema": schema}


def _text_reader(kind: str, key: str) -> Callable[[str, Format, int], Format]:
    def read(name: str, given: Format, _depth: int) -> Format:
        check_keys(name, given, {key, "type"})
        text = read_str(f"{name}.{key}", require_in(given, key, name))
        if not text:
            raise out_of_range(f"{name}.{key}", "a non-empty string", text)
        return {"type": kind, key: text}

    return read


def _elements_reader(kind: str) -> Callable[[str, Format, int], Format]:
    def read(name: str, given: Format, depth: int) -> Format:
        check_keys(name, given, {"elements", "type"})
        where = f"{name}.elements"
        elements = [
            _read_format(f"{where}[{i}]", raw, depth + 1)
            for i, raw in enumerate(_items(where, require_in(given, "elements", name)))
        ]
        for i, element in enumerate(elements[:-1] if kind == "sequence" else ()):
            _check_closed(f"{where}[{i}]", element)
        return {"type": kind, "elements": elements}

    return read


def _read_tag(name: str, value: Any, depth: int) -> Format:
    given = read_object(name, value)
    check_keys(name, given, {"begin", "content", "end", "type"})
    if given.get("type", "tag") != "tag":
        raise out_of_range(f"{name}.type", "'tag'", given["type"])
    end = require_in(given, "end", name)
    if isinstance(end, list):
        end = [read_str(f"{name}.end[{i}]", raw) for i, raw in enumerate(_items(name, end))]
    else:
        end = read_str(f"{name}.end", end)
    content = _read_format(f"{name}.content", require_in(given, "content", name), depth + 1)
    tag = {
        "type": "tag",
        "begin": read_str(f"{name}.begin", require_in(given, "begin", name)),
        "content": content,
        "end": end,
    }
    if any(_ends(tag)) and not (content["type"] == "any_text" and all(_ends(tag))):
        _check_closed(f"{name}.content", content)
    return tag


def _read_tags(name: str, given: Format, depth: int) -> list[Format]:
    tags = [
        _read_tag(f"{name}[{i}]", raw, depth + 1)
        for i, raw in enumerate(_items(name, given.get("tags")))
    ]
    if not given["stop_after_first"]:
        for i, tag in enumerate(tags):
            _check_closed(f"{name}[{i}]", tag)
    return tags


def _with_flags(name: str, given: Format) -> Format:
    flags = {}
    for key in ("at_least_one", "stop_after_first"):
        flags[key] = False if given.get(key) is None else read_bool(f"{name}.{key}", given[key])
    return {**given, **flags}


def _read_separated(name: str, given: Format, depth: int) -> Format:
    check_keys(name, given, {"at_least_one", "separator", "stop_after_first", "tags", "type"})
    given = _with_flags(name, given)
    separator = read_str(f"{name}.separator", require_in(given, "separator", name))
    return {**given, "tags": _read_tags(f"{name}.tags", given, depth), "separator": separator}


def _read_triggered(name: str, given: Format, depth: int, of_tags: str = "tags") -> Format:
    check_keys(name, given, {"at_least_one", "stop_after_first", "tags", "triggers", "type"})
    given = _with_flags(name, given)
    where = f"{name}.triggers"
    triggers = [
        read_str(f"{where}[{i}]", raw)
        for i, raw in enumerate(_items(where, require_in(given, "triggers", name)))
    ]
    tags = _read_tags(f"{name}.{of_tags}", given, depth)
    for i, trigger in enumerate(triggers):
        others = [other for j, other in enumerate(triggers) if j != i]
        if not trigger or any(other.startswith(trigger) for other in others):
            raise out_of_range(
                f"{where}[{i}]", "a non-empty string that no other trigger begins with", trigger
            )
        if not any(tag["begin"].startswith(trigger) for tag in tags):
            raise out_of_range(f"{where}[{i}]", "what some tag begins with", trigger)
    for i, tag in enumerate(tags):
        if not any(tag["begin"].startswith(trigger) for trigger in triggers):
            raise out_of_range(
                f"{name}.{of_tags}[{i}].begin", "a string that begins with a trigger", tag["begin"]
            )
    return {**given, "tags": tags, "triggers": triggers}


_READERS: dict[str, Callable[[str, Format, int], Format]] = {
    "any_text": _read_any_text,
    "const_string": _text_reader("const_string", "value"),
    "grammar": _text_reader("grammar", "grammar"),
    "json_schema": _read_json_schema,
    "or": _elements_reader("or"),
    "regex": _text_reader("regex", "pattern"),
    "sequence": _elements_reader("sequence"),
    "tag": _read_tag,
    "tags_with_separator": _read_separated,
    "triggered_tags": _read_triggered,
}


def _check_closed(name: str, tree: Format) -> None:
    if is_open(tree):
        raise unsupported(name, "may be any text, so nothing can follow it: only a tag's end can")


def _items(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise wrong_type(name, "an array", value)
    if not 1 <= len(value) <= MAX_ELEMENTS:
        raise out_of_range(name, f"an array of 1 to {MAX_ELEMENTS}", value)
    return value


def dumps(name: str, tree: Format) -> str:
    """The tree as JSON."""
    try:
        return orjson.dumps(tree).decode()
    except orjson.JSONEncodeError as exc:  # half of a surrogate pair, or too deep
        raise InvalidParameterError(
            f"{name} cannot be written as JSON: {exc}", param=name, code="invalid_value"
        ) from exc
