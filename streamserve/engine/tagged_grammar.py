"""Grammars of calls whose arguments have tags around them, and of those in sections.

Runs in the worker process only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from llguidance import regex_to_lark

from streamserve.engine.lark_writer import FREE, LarkWriter
from streamserve.engine.parsers.argument_types import parameter_types, resolved
from streamserve.engine.parsers.section_formats import SectionParser
from streamserve.engine.parsers.tagged_formats import TaggedParser
from streamserve.engine.parsers.tagged_reader import TagStyle
from streamserve.engine.schema_refs import moved

_BLANKS = r"/[ \t\r\n]{0,8}/"
_KEY = r'/[^<>"\n\r\t ]{1,64}/'
_MAX_DEPTH = 8  # of alternatives within alternatives
NOT_FOLLOWED = frozenset(
    {
        "allOf",
        "anyOf",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxProperties",
        "minProperties",
        "not",
        "oneOf",
        "patternProperties",
        "propertyNames",
        "then",
    }
)
"""What a schema of all arguments may not say: each is held by itself."""


def section_calls(parser: type[SectionParser], task: Mapping[str, Any], writer: LarkWriter) -> str:
    """An answer that may call tools in a `SectionParser`'s format."""
    calls = [
        f"{_header(parser, tool['name'], writer)} {writer.json(tool['arguments'])} "
        f"{writer.text(parser.arguments_end + parser.call_close)}"
        for tool in task["tools"]
    ]
    call = writer.rule(writer.either(calls))
    inside = f"{call}+ {writer.text(parser.section_close)}"
    return answer_with(parser.section_open, inside, task, writer)


def _header(parser: type[SectionParser], name: str, writer: LarkWriter) -> str:
    before, number, behind = parser.header.partition("0")
    digits = "/[0-9]{1,4}/" if number else ""
    parts = (writer.text(parser.call_open + before.format(name)), digits, writer.text(behind))
    return " ".join(filter(None, parts))


def tagged_calls(parser: type[TaggedParser], task: Mapping[str, Any], writer: LarkWriter) -> str:
    """An answer that may call tools in a `TaggedParser`'s format."""
    calls = [
        f"{writer.text(parser.call_open + tool['name'] + parser.name_close)} "
        f"{' '.join(_arguments(parser.style, tool['arguments'], writer))} {_BLANKS} "
        f"{writer.text(parser.style.call_close)}"
        for tool in task["tools"]
    ]
    call = writer.rule(writer.either(calls))
    more = f"({_BLANKS} {call})*" if parser.has_sections else ""
    close = f"{_BLANKS} {writer.text(parser.section_close)}" if parser.section_close else ""
    inside = " ".join(filter(None, (_BLANKS, call, more, close)))
    return answer_with(parser.section_open, inside, task, writer)


def answer_with(begin: str, inside: str, task: Mapping[str, Any], writer: LarkWriter) -> str:
    """An answer with calls: each is ``begin`` and ``inside``."""
    inside = writer.rule(inside)
    if task["answer"] is None:
        return f"({writer.until(begin)} {inside})* {FREE}"
    whole = writer.rule(f"{writer.text(begin)} {inside}")
    return f"{writer.json(task['answer'])} | {_BLANKS} {whole} ({_BLANKS} {whole})*"


def _arguments(style: TagStyle, schema: Any, writer: LarkWriter) -> Iterator[str]:
    """Each parameter at its place, or not at all where it is not required."""
    root = schema if isinstance(schema, dict) else {}
    outer = resolved(root, root)
    if unknown := sorted(NOT_FOLLOWED & outer.keys()):
        raise ValueError(f"{unknown[0]} of parameters cannot be followed where calls are tags")
    properties = outer.get("properties")
    if not isinstance(properties, dict):
        yield f"({_key(style, _KEY, writer)} {writer.until(style.value_close)})*"
        return
    required = outer.get("required", ())
    for name in [*properties, *(name for name in required if name not in properties)]:
        key = _key(style, writer.text(name), writer)
        # Of two alternatives that begin with a break, the lexer would know the longer one only.
        line = writer.text("\n") if style.is_on_lines else ""
        value = writer.either(Values(style, name, root, writer).all(properties.get(name)))
        argument = writer.rule(" ".join(filter(None, (key, line, value))))
        yield argument if name in required else f"{argument}?"


def _key(style: TagStyle, name: str, writer: LarkWriter) -> str:
    parts = [_BLANKS, writer.text(style.key_open), name, writer.text(style.key_close)]
    if style.value_open:
        parts += [_BLANKS, writer.text(style.value_open)]
    return " ".join(parts)


class Values:
    """What may stand for one parameter, each with the tag that closes it."""

    def __init__(
        self, style: TagStyle, name: str, root: Mapping[str, Any], writer: LarkWriter
    ) -> None:
        self._close = style.value_close
        self._break = "\\n?" if style.is_on_lines else ""
        self._name = name
        self._root = root
        self._writer = writer

    def all(self, schema: Any, depth: int = _MAX_DEPTH) -> list[str]:
        found = resolved(schema, self._root)
        if not depth or "allOf" in found or "not" in found:
            raise ValueError(f"the schema of {self._name} cannot be followed where calls are tags")
        for way in ("anyOf", "oneOf"):
            if isinstance(inner := found.get(way), list) and inner:
                return [body for item in inner for body in self.all(item, depth - 1)]
        values = [found["const"]] if "const" in found else found.get("enum")
        if isinstance(values, list):
            return [self.fixed(value) for value in values]
        types = parameter_types({"properties": {"": found}}, "")
        bodies = [self.string(found)] if "string" in types else []
        if others := sorted(types - {"string"}):
            bodies.append(self._json({**found, "type": others}))
        return bodies

    def fixed(self, value: Any) -> str:
        """One value, and the tag behind it."""
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return self._until(re.escape(text))

    def string(self, schema: Mapping[str, Any]) -> str:
        """Text of the schema, and the tag behind it."""
        pattern, least, most = (schema.get(key) for key in ("pattern", "minLength", "maxLength"))
        if pattern is None and not least and most is None:
            return self._writer.until(self._close)
        if pattern is None:
            return self._until(rf"(?:.|\n){{{least or 0},{'' if most is None else most}}}")
        if least or most is not None:
            raise ValueError(
                f"{self._name} has a pattern and a length: calls that are tags can have one"
            )
        before = "" if pattern.startswith("^") else r"(?:.|\n)*"
        behind = "" if pattern.endswith("$") else r"(?:.|\n)*"
        bare = pattern.removeprefix("^").removesuffix("$")
        return self._until(f"{before}(?:{bare}){behind}")

    def _until(self, pattern: str) -> str:
        """Text that matches as a whole, and the tag behind it."""
        pattern += self._break
        rest = self._writer.text(self._close)
        if rest.startswith("<["):  # it is no text
            return f"{self._writer.regex(pattern)} {rest}"
        self._writer.regex(pattern)  # tried by itself
        return self._writer.until_regex(regex_to_lark(pattern + re.escape(self._close), "dws"))

    def _json(self, schema: Mapping[str, Any]) -> str:
        inner: Any = schema
        if '"$ref"' in json.dumps(schema):
            place = "#/$defs/arguments"
            inner = {**moved(schema, place), "$defs": {"arguments": moved(self._root, place)}}
        return f"{self._writer.json(inner)} {_BLANKS} {self._writer.text(self._close)}"
