"""What a value that a model wrote as bare text is in JSON, by the schema of its parameter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

JsonSchema = Mapping[str, Any]

_MAX_REFERENCES = 8  # that refer to each other: the last one may refer to the first
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_STRING = frozenset({"string"})


def parameter_types(parameters: Any, key: str) -> frozenset[str]:
    """JSON Schema's names of what a parameter may be; a string where the schema does not say."""
    root = parameters if isinstance(parameters, Mapping) else {}
    properties = resolved(root, root).get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    return frozenset(_types(schema, root)) or _STRING


def resolved(schema: Any, root: JsonSchema) -> JsonSchema:
    """The schema, or what it refers to within ``root``."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        schema = _at(root, reference)
    return {}


def _at(root: JsonSchema, reference: str) -> Any:
    found: Any = root
    head, _, pointer = reference.partition("#")
    if head:
        return None
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _types(schema: Any, root: JsonSchema) -> set[str]:
    types: set[str] = set()
    seen: set[int] = set()
    left = [schema]
    while left:
        found = resolved(left.pop(), root)
        if id(found) in seen:
            continue
        seen.add(id(found))
        named, values = found.get("type"), found.get("enum")
        names = named if isinstance(named, list) else [named]
        types |= {name for name in names if isinstance(name, str)}
        types |= {_type_of(value) for value in values} if isinstance(values, list) else set()
        types |= {_type_of(found["const"])} if "const" in found else set()
        for way in ("anyOf", "oneOf", "allOf"):
            inner = found.get(way)
            left += inner if isinstance(inner, list) else ()
    return types


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def json_of(text: str, types: frozenset[str]) -> str:
    """JSON of a whole value of one of ``types``, the narrowest that its text can be.

    Templates write True, False and None as Python does, and so do models. What none of the types
    can be is a string, unless it is JSON by itself and no string is asked for.
    """
    bare = text.strip()
    for name, read in _READERS.items():
        if name in types and (found := read(bare)) is not None:
            return found
    if "string" not in types and _loaded(bare) is not _NOTHING:
        return bare
    return json.dumps(text, ensure_ascii=False)


def _null(text: str) -> str | None:
    return "null" if text.lower() == "null" or text == "None" else None


def _integer(text: str) -> str | None:
    return text if _INTEGER.fullmatch(text) else None


def _number(text: str) -> str | None:
    if _NUMBER.fullmatch(text):
        return text
    try:
        value = float(text)
    except ValueError:
        return None
    return repr(value) if math.isfinite(value) else None


def _boolean(text: str) -> str | None:
    return {"true": "true", "false": "false", "1": "true", "0": "false"}.get(text.lower())


def _object(text: str) -> str | None:
    return text if isinstance(_loaded(text), dict) else None


def _array(text: str) -> str | None:
    return text if isinstance(_loaded(text), list) else None


_READERS: dict[str, Callable[[str], str | None]] = {
    "null": _null,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "object": _object,
    "array": _array,
}
_NOTHING = object()


def _loaded(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NOTHING


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
