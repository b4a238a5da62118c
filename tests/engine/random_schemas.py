"""JSON schemas at random, of what people write: nested, with enums, numbers, patterns, unions."""

from __future__ import annotations

import random
from typing import Any

WORDS = ["name", "größe", "名前", "a b", 'quote"d', "back\\slash", "😀", "x", "count", "tags"]
PATTERNS = ["^[a-c]{1,4}$", r"^\d{2}-\d{2}$", "^(yes|no|ja|nein)$", "[é-ü]", "^$", "^[^a-z]{2,3}$"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4"]


def random_schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema that something validates against; ``depth`` bounds its nesting."""
    kinds = [_string, _number, _integer, _enum, _constant]
    if depth:
        kinds += [_object, _object, _array, _union, _nullable]
    return draw.choice(kinds)(draw, depth - 1)


def _string(draw: random.Random, _depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    match draw.randrange(4):
        case 0:
            schema["pattern"] = draw.choice(PATTERNS)
        case 1:
            schema["minLength"] = draw.randrange(4)
            schema["maxLength"] = schema["minLength"] + draw.randrange(6)
        case 2:
            schema["format"] = draw.choice(FORMATS)
    return schema


def _number(draw: random.Random, _depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "number"}
    if draw.random() < 0.5:
        schema["minimum"] = round(draw.uniform(-1e3, 1e3), 2)
        schema["maximum"] = schema["minimum"] + round(draw.uniform(1, 1e3), 2)
    return schema


def _integer(draw: random.Random, _depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    match draw.randrange(3):
        case 0:
            schema["minimum"] = draw.randrange(-1000, 1000)
            schema["exclusiveMaximum"] = schema["minimum"] + draw.randrange(2, 5000)
        case 1:
            schema["multipleOf"] = draw.choice([2, 5, 7])
    return schema


def _scalar(draw: random.Random) -> Any:
    return draw.choice([*WORDS, draw.randrange(-99, 99), 1.5, True, False, None])


def _enum(draw: random.Random, _depth: int) -> dict[str, Any]:
    return {"enum": [_scalar(draw) for _ in range(draw.randrange(1, 5))]}


def _constant(draw: random.Random, _depth: int) -> dict[str, Any]:
    return {"const": _scalar(draw)}


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(WORDS, draw.randrange(4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(draw, depth) for name in names},
        "required": [name for name in names if draw.random() < 0.6],
    }
    if draw.random() < 0.7:
        schema["additionalProperties"] = draw.choice([False, {"type": "boolean"}])
    return schema


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    schema = {"type": "array", "items": random_schema(draw, depth), "maxItems": 3}
    if draw.random() < 0.4:
        schema["minItems"] = draw.randrange(3)
    if draw.random() < 0.2:
        schema["prefixItems"] = [random_schema(draw, 0)]
    return schema


def _union(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(draw, depth) for _ in range(draw.randrange(1, 4))]}


def _nullable(draw: random.Random, _depth: int) -> dict[str, Any]:
    return {"type": [draw.choice(["string", "boolean", "integer"]), "null"]}
