"""The grammar of Gemma 4's calls: a JSON Schema's values in its own notation.

Runs in the worker process only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamserve.engine.lark_writer import EMPTY, LarkWriter
from streamserve.engine.parsers.argument_types import parameter_types, resolved
from streamserve.engine.parsers.gemma_calls import BARE_KEY, QUOTE, Gemma4Parser
from streamserve.engine.parsers.tagged_reader import TagStyle
from streamserve.engine.tagged_grammar import NOT_FOLLOWED, Values, answer_with

_KEY = r'/[^<>{}\[\],:"\n\r\t ]{1,64}/'
_STRING = TagStyle(key_open="", key_close=":", value_close=QUOTE, call_close="}")
_OF_NUMBERS = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
)
_NOT_FOLLOWED_IN_LISTS = frozenset(
    {"contains", "maxContains", "minContains", "prefixItems", "unevaluatedItems", "uniqueItems"}
)
_MAX_DEPTH = 16  # of values within values, but for those that are referred to


def gemma4_calls(task: Mapping[str, Any], writer: LarkWriter) -> str:
    """An answer that may call tools as `Gemma4Parser` reads them."""
    calls = [
        f"{writer.text(Gemma4Parser.call_open + tool['name'])} "
        f"{_Notation(tool['arguments'], writer).arguments()} "
        f"{writer.text(Gemma4Parser.section_close)}"
        for tool in task["tools"]
    ]
    return answer_with(Gemma4Parser.section_open, writer.either(calls), task, writer)


class _Notation:
    """What may stand for the values of one tool's schema. Without white space, as trained on."""

    def __init__(self, schema: Any, writer: LarkWriter) -> None:
        self._root: Mapping[str, Any] = schema if isinstance(schema, dict) else {}
        self._writer = writer
        self._referred: dict[str, str] = {}  # rules of references
        self._strings = Values(_STRING, "a parameter", self._root, writer)
        self._any = ""  # the rule of any value, if it was needed

    def arguments(self) -> str:
        """The outer object."""
        return self._object(resolved(self._root, self._root), _MAX_DEPTH)

    def _value(self, schema: Any, depth: int) -> str:
        if schema is False:
            raise ValueError("a schema that nothing follows cannot be followed in Gemma 4's calls")
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str):
            return self._body(schema if isinstance(schema, dict) else {}, depth)
        if reference not in self._referred:
            name = self._referred[reference] = self._writer.reserve()
            self._writer.define(name, self._body(resolved(schema, self._root), _MAX_DEPTH))
        return self._referred[reference]

    def _body(self, schema: Mapping[str, Any], depth: int) -> str:
        if not depth or "allOf" in schema or "not" in schema:
            raise ValueError("a schema of parameters cannot be followed in Gemma 4's calls")
        for way in ("anyOf", "oneOf"):
            if isinstance(inner := schema.get(way), list) and inner:
                if "properties" in schema:
                    raise ValueError(f"{way} beside properties cannot be followed")
                return self._writer.either([self._value(item, depth - 1) for item in inner])
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list) and values:
            return self._writer.either([self._fixed(value) for value in values])
        if not schema.keys() & {"type", "properties", "items"}:
            return self._any_value()
        return self._writer.either(list(self._typed(schema, depth)))

    def _fixed(self, value: Any) -> str:
        written = _written(value)
        if not value or not isinstance(value, str):
            return self._writer.text(written)
        # As a lexeme like that of any text, which another way may lead to from the same beginning.
        return f"{self._writer.text(QUOTE)} {self._strings.fixed(value)}"

    def _typed(self, schema: Mapping[str, Any], depth: int) -> Iterator[str]:
        types = parameter_types({"properties": {"": schema}}, "")
        if "type" not in schema:
            types = frozenset({"object" if "properties" in schema else "array"})
        if "string" in types:
            yield f"{self._writer.text(QUOTE)} {self._strings.string(schema)}"
        if "object" in types:
            yield self._object(schema, depth)
        if "array" in types:
            yield self._list(schema, depth)
        if scalars := sorted(types - {"string", "object", "array"}):
            limits = {key: schema[key] for key in schema.keys() & _OF_NUMBERS}
            yield self._writer.json({**limits, "type": scalars})

    def _list(self, schema: Mapping[str, Any], depth: int) -> str:
        if unknown := sorted(_NOT_FOLLOWED_IN_LISTS & schema.keys()):
            raise ValueError(f"{unknown[0]} of a list cannot be followed in Gemma 4's calls")
        least, most = (schema.get(key) for key in ("minItems", "maxItems"))
        if most == 0:
            return '"[]"'
        item = self._writer.rule(self._value(schema.get("items", {}), depth - 1))
        others = f"{{{max((least or 0) - 1, 0)},{'' if most is None else most - 1}}}"
        items = item if most == 1 else f'{item} ("," {item}){others}'
        return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'

    def _object(self, schema: Mapping[str, Any], depth: int) -> str:
        if unknown := sorted(NOT_FOLLOWED & schema.keys()):
            raise ValueError(f"{unknown[0]} of parameters cannot be followed in Gemma 4's calls")
        properties, required = schema.get("properties"), schema.get("required", ())
        known = properties if isinstance(properties, dict) else {}
        names = [*known, *(name for name in required if name not in known)]
        if names:
            members = [(name, self._member(name, known.get(name), depth)) for name in names]
            return f'"{{" {self._in_order(members, required)} "}}"'
        others = schema.get("additionalProperties")
        if others is False:
            return '"{}"'
        return self._any_object(self._value(others, depth - 1))

    def _member(self, name: str, schema: Any, depth: int) -> str:
        key = f"{_written_key(name)}:"
        return self._writer.rule(f"{self._writer.text(key)} {self._value(schema, depth - 1)}")

    def _in_order(self, members: Sequence[tuple[str, str]], required: Sequence[str]) -> str:
        """Each member at its place, or not at all where it is not required."""
        first, rest = EMPTY, EMPTY  # from here on, where none was written before, and where one was
        for name, member in reversed(members):
            with_it, behind = f"{member} {rest}", f'"," {member} {rest}'
            is_needed = name in required
            first = self._writer.rule(with_it if is_needed else f"{with_it} | {first}")
            rest = self._writer.rule(behind if is_needed else f"{behind} | {rest}")
        return first

    def _any_object(self, value: str) -> str:
        member = self._writer.rule(f'{_KEY} ":" {value}')
        return f'"{{" ({member} ("," {member})*)? "}}"'

    def _any_value(self) -> str:
        if not self._any:
            writer = self._writer
            self._any = writer.reserve()
            text = f"{writer.text(QUOTE)} {writer.until(QUOTE)}"
            items = f'"[" ({self._any} ("," {self._any})*)? "]"'
            scalar = writer.json({"type": ["boolean", "null", "number"]})
            kinds = (text, items, self._any_object(self._any), scalar)
            writer.define(self._any, writer.either(kinds))
        return self._any


def _written(value: Any) -> str:
    """A fixed value in the notation."""
    match value:
        case str():
            if QUOTE in value:
                raise ValueError(f"{value!r} cannot be written in Gemma 4's calls")
            return f"{QUOTE}{value}{QUOTE}"
        case dict():
            members = (f"{_written_key(key)}:{_written(item)}" for key, item in value.items())
            return f"{{{','.join(members)}}}"
        case list():
            return f"[{','.join(map(_written, value))}]"
    return json.dumps(value)


def _written_key(key: str) -> str:
    is_bare = BARE_KEY.fullmatch(key) is not None and key == key.strip()
    return key if is_bare else _written(key)
