"""Reading a JSON body through a table of fields: each is honoured, refused by name, or reported.

A table maps a name to a reader, a function that returns the value checked and converted, or
raises ``InvalidParameterError`` naming the field and what was given. ``null`` always means
"not given", as in OpenAI's API.

A reader stands together with the JSON schema of what it takes (``typed``): ``/openapi.json`` and
the table of fields in ``docs/api.md`` are made from the tables that requests are read through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from streamserve.errors import InvalidParameterError

Reader = Callable[[str, Any], Any]
Schema = dict[str, Any]
_T = TypeVar("_T")

STATUS = "x-status"
"""In a field's schema: ``honoured``, ``refused`` (but for what asks for nothing), ``no effect``."""

MAX_INT = 2**31 - 1
MAX_INT64 = 2**63 - 1
_MAX_EXACT = 2**53
_MAX_SHOWN = 60
_MAX_UNKNOWN = 1024
_MAX_UNKNOWN_NAME = 64

_JSON_NAMES = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def shown(value: Any) -> str:
    """``value`` as an error message quotes it: short, however large it is."""
    if isinstance(value, (list, dict)):
        return f"{_JSON_NAMES[type(value)]} of {len(value)}"
    text = repr(value[:_MAX_SHOWN]) if isinstance(value, str) else repr(value)
    return text if len(text) <= _MAX_SHOWN + 2 else text[:_MAX_SHOWN] + "…"


def wrong_type(name: str, expected: str, value: Any) -> InvalidParameterError:
    """The error for a value of the wrong JSON type."""
    kind = _JSON_NAMES.get(type(value), type(value).__name__)
    given = kind if isinstance(value, (list, dict)) or value is None else f"{kind}: {shown(value)}"
    return InvalidParameterError(
        f"{name} must be {expected}, got {given}", param=name, code="invalid_type"
    )


def out_of_range(name: str, limit: str, value: Any) -> InvalidParameterError:
    """The error for a value of the right type outside its limit."""
    return InvalidParameterError(
        f"{name} must be {limit}, got {shown(value)}", param=name, code="invalid_value"
    )


def unsupported(name: str, why: str) -> InvalidParameterError:
    """The error for what is not built here, however it is written."""
    return InvalidParameterError(f"{name} {why}", param=name, code="unsupported_parameter")


class TypedReader(Generic[_T]):
    """A reader and the JSON schema of the values that it takes.

    The schema excludes nothing that a request may hold. It may allow more: limits that depend on
    other fields, or on the model, are not in it.
    """

    __slots__ = ("_read", "schema")

    def __init__(self, read: Callable[[str, Any], _T], schema: Schema) -> None:
        self._read = read
        self.schema = schema

    def __call__(self, name: str, value: Any) -> _T:
        return self._read(name, value)


class NestedReader(TypedReader[_T]):
    """A reader of what holds objects: ``read_nested`` notes the names in them that nobody knows.

    It takes the list that they are added to after the name and the value.
    """

    __slots__ = ("read_nested",)

    def __init__(self, read_nested: Callable[[str, Any, list[str]], _T], schema: Schema) -> None:
        super().__init__(lambda name, value: read_nested(name, value, []), schema)
        self.read_nested = read_nested


def typed(schema: Schema) -> Callable[[Callable[[str, Any], _T]], TypedReader[_T]]:
    """Decorates a reader with the schema of what it takes."""
    return lambda read: TypedReader(read, schema)


def nested(schema: Schema) -> Callable[[Callable[[str, Any, list[str]], _T]], NestedReader[_T]]:
    """As ``typed`` for a reader of what holds objects."""
    return lambda read: NestedReader(read, schema)


def schema_of(reader: Reader) -> Schema:
    """The schema of what ``reader`` takes; one that allows everything if it has none."""
    schema: Schema = getattr(reader, "schema", {})
    return schema


@typed({"type": "boolean"})
def read_bool(name: str, value: Any) -> bool:
    """A JSON boolean; 0, 1 and "true" are not one."""
    if not isinstance(value, bool):
        raise wrong_type(name, "a boolean", value)
    return value


@typed({"type": "string"})
def read_str(name: str, value: Any) -> str:
    """A JSON string."""
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    return value


def string(shortest: int, longest: int) -> TypedReader[str]:
    """A reader of strings of ``shortest .. longest`` characters."""
    limit = f"{shortest} to {longest}" if shortest else f"at most {longest}"
    minimum = {"minLength": shortest} if shortest else {}

    @typed({"type": "string", **minimum, "maxLength": longest})
    def read(name: str, value: Any) -> str:
        text = read_str(name, value)
        if not shortest <= len(text) <= longest:
            raise out_of_range(name, f"a string of {limit} characters", text)
        return text

    return read


def one_of(*names: str) -> TypedReader[str]:
    """A reader of one of these strings."""

    @typed({"enum": list(names)})
    def read(name: str, value: Any) -> str:
        text = read_str(name, value)
        if text not in names:
            raise out_of_range(name, f"one of {', '.join(names)}", text)
        return text

    return read


@typed({"type": "number"})
def read_number(name: str, value: Any) -> float:
    """A JSON number. JSON has no NaN and no infinity, so it is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type(name, "a number", value)
    return float(value)


def number(low: float, high: float) -> TypedReader[float]:
    """A reader of numbers within ``low .. high``."""

    @typed({"type": "number", "minimum": low, "maximum": high})
    def read(name: str, value: Any) -> float:
        given = read_number(name, value)
        if not low <= given <= high:
            raise out_of_range(name, f"between {low} and {high}", value)
        return given

    return read


def positive(high: float | None = None) -> TypedReader[float]:
    """A reader of numbers above 0, at most ``high``."""
    limit = "above 0" if high is None else f"above 0 and at most {high:g}"
    maximum = {} if high is None else {"maximum": high}

    @typed({"type": "number", "exclusiveMinimum": 0, **maximum})
    def read(name: str, value: Any) -> float:
        given = read_number(name, value)
        if given <= 0.0 or (high is not None and given > high):
            raise out_of_range(name, limit, value)
        return given

    return read


def integer(low: int = -MAX_INT, high: int = MAX_INT) -> TypedReader[int]:
    """A reader of integers within ``low .. high``. ``5.0`` is one: some languages write it so."""

    @typed({"type": "integer", "minimum": low, "maximum": high})
    def read(name: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            # Beyond, JSON's integers have become floats, and are not what was written.
            value = int(value) if abs(value) <= _MAX_EXACT else value
            if isinstance(value, float):
                raise out_of_range(name, f"between {low} and {high}", value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(name, "an integer", value)
        if not low <= value <= high:
            raise out_of_range(name, f"between {low} and {high}", value)
        return value

    return read


def read_list(name: str, value: Any, what: str, max_items: int) -> list[Any]:
    """A JSON array of at most ``max_items``; ``what`` they are is for messages."""
    if not isinstance(value, list):
        raise wrong_type(name, f"an array of {what}", value)
    if len(value) > max_items:
        raise out_of_range(name, f"an array of at most {max_items} {what}", value)
    return value


def list_of(read_item: Reader, what: str, max_items: int) -> TypedReader[tuple[Any, ...]]:
    """A reader of arrays, each item read by ``read_item``; the result is a tuple."""

    @typed({"type": "array", "items": schema_of(read_item), "maxItems": max_items})
    def read(name: str, value: Any) -> tuple[Any, ...]:
        items = read_list(name, value, what, max_items)
        return tuple(read_item(f"{name}[{i}]", item) for i, item in enumerate(items))

    return read


@typed({"type": "object"})
def read_object(name: str, value: Any) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    return value


@dataclass(frozen=True, slots=True)
class Refused:
    """A known field whose feature is not built: only values that ask for nothing pass."""

    neutral: tuple[Any, ...] = ()
    why: str = "is not supported"

    def check(self, name: str, value: Any) -> None:
        """Raise unless ``value`` asks for nothing."""
        if value is None:
            return
        for neutral in self.neutral:
            # bool is an int in Python and not in JSON: True must not pass for 1.
            if isinstance(value, bool) == isinstance(neutral, bool) and value == neutral:
                return
        allowed = " or ".join(shown_neutral(n) for n in self.neutral)
        hint = f" (only {allowed} is accepted)" if allowed else ""
        raise unsupported(name, f"{self.why}{hint}")

    def schema(self) -> Schema:
        """The schema of what passes."""
        return {"enum": [*self.neutral, None], STATUS: "refused", "description": self.why}


def shown_neutral(value: Any) -> str:
    """A neutral value as JSON writes it, near enough for a message."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def require(values: Mapping[str, Any], name: str) -> Any:
    """The value of a field that must be given."""
    if name not in values:
        raise InvalidParameterError(
            f"{name} is required", param=name, code="missing_required_parameter"
        )
    return values[name]


def require_in(values: Mapping[str, Any], field: str, where: str) -> Any:
    """The value of a field that an inner object must have."""
    if values.get(field) is None:
        raise InvalidParameterError(
            f"{where}.{field} is required", param=where, code="missing_required_parameter"
        )
    return values[field]


def check_keys(name: str, given: Mapping[str, Any], known: set[str]) -> None:
    """Raise ``InvalidParameterError`` for a key that is not known."""
    for key in given:
        if key not in known:
            allowed = ", ".join(sorted(known))
            raise unsupported(name, f"must hold only {allowed}, got {shown(key)}")


@dataclass(frozen=True, slots=True)
class FieldTable:
    """All fields of one kind of object: what it is read through, and its schema."""

    honoured: Mapping[str, Reader]
    refused: Mapping[str, Refused] = field(default_factory=dict)
    annotations: frozenset[str] = frozenset()
    required: tuple[str, ...] = ()

    def read(
        self, given: Mapping[str, Any], *, prefix: str = ""
    ) -> tuple[dict[str, Any], list[str]]:
        """Return the honoured fields that were given, and the names that nobody knows.

        ``prefix`` is where the object stands in the body (``"messages[2]."``), for messages.
        """
        values: dict[str, Any] = {}
        unknown: list[str] = []
        for name, value in given.items():
            reader = self.honoured.get(name)
            if reader is not None:
                if isinstance(reader, NestedReader) and value is not None:
                    values[name] = reader.read_nested(prefix + name, value, unknown)
                elif value is not None:
                    values[name] = reader(prefix + name, value)
            elif name in self.refused:
                self.refused[name].check(prefix + name, value)
            elif name not in self.annotations:
                unknown.append(prefix + name)
        return values, unknown

    def read_inner(self, where: str, value: Any, unknown: list[str]) -> dict[str, Any]:
        """As ``read`` for an object inside of a body, with all that it must have.

        The names that nobody knows are added to ``unknown``.
        """
        values, unknown_here = self.read(read_object(where, value), prefix=f"{where}.")
        for name in self.required:
            require_in(values, name, where)
        unknown += unknown_here
        return values

    def read_closed(self, where: str, value: Any) -> dict[str, Any]:
        """As ``read_inner``, and a name that nobody knows is refused: the answer would be another.

        For objects that say how to answer; their schema is ``closed_schema``.
        """
        check_keys(where, read_object(where, value), {*self.honoured})
        return self.read_inner(where, value, [])

    def closed_schema(self) -> Schema:
        """The schema of what ``read_closed`` takes."""
        return {**self.schema(), "additionalProperties": False}

    @property
    def reader(self) -> NestedReader[dict[str, Any]]:
        """Reads such an object where it is a field of another one."""
        return NestedReader(self.read_inner, self.schema())

    def schema(self) -> Schema:
        """The object's schema. A field that is not required may be ``null``."""
        properties: dict[str, Schema] = {}
        for name, reader in self.honoured.items():
            schema = schema_of(reader)
            optional = schema if name in self.required else nullable(schema)
            properties[name] = {**optional, STATUS: "honoured"}
        for name, refused in self.refused.items():
            properties[name] = refused.schema()
        for name in self.annotations:
            properties[name] = {STATUS: "no effect"}
        return {
            "type": "object",
            "properties": dict(sorted(properties.items())),
            **({"required": list(self.required)} if self.required else {}),
        }


def reported(unknown: Sequence[str]) -> tuple[str, ...]:
    """Of the names that nobody knows as many, and as much of each, as are worth telling of."""
    return tuple(name[:_MAX_UNKNOWN_NAME] for name in unknown[:_MAX_UNKNOWN])


def nullable(schema: Schema) -> Schema:
    """``schema``, or ``null``."""
    kind = schema.get("type")
    if isinstance(kind, str) and "enum" not in schema:
        return {**schema, "type": [kind, "null"]}
    return {"anyOf": [schema, {"type": "null"}]} if schema else {}
