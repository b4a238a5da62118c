"""Grammars of calls in Python's syntax, whose values are JSON's: readers take that, too.

Runs in the worker process only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from streamserve.engine.lark_writer import EMPTY, FREE, LarkWriter
from streamserve.engine.parsers.argument_types import resolved
from streamserve.engine.parsers.python_reader import ARGUMENT_KEY
from streamserve.engine.parsers.pythonic_formats import PythonicParser
from streamserve.engine.schema_refs import moved
from streamserve.engine.tagged_grammar import NOT_FOLLOWED, answer_with

_BLANKS = r"/[ \t\r\n]{0,8}/"
_KEY = "/[a-zA-Z_][a-zA-Z0-9_]{0,63}/"
_LIST_UP_TO_NAME = r"[ \t\r\n]*\[[ \t\r\n]*%s\("


def pythonic_calls(
    parser: type[PythonicParser], task: Mapping[str, Any], writer: LarkWriter
) -> str:
    """An answer that may call tools in lists between the parser's marks."""
    call = _any_call(task, writer)
    inside = f'"[" {call} {_more(call)} {writer.text(parser.section_close)}'
    return answer_with(parser.section_open, inside, task, writer)


def python_lines(parser: type[PythonicParser], task: Mapping[str, Any], writer: LarkWriter) -> str:
    """An answer that may call tools on lines between the parser's marks."""
    call = _any_call(task, writer)
    inside = f'{_BLANKS} {call} ("\\n" {call})* {_BLANKS} {writer.text(parser.section_close)}'
    return answer_with(parser.section_open, inside, task, writer)


def python_list(task: Mapping[str, Any], writer: LarkWriter) -> str:
    """A list of calls, and that from the first one's name on, or anything else."""
    more = _more(_any_call(task, writer))
    if task["answer"] is not None:
        return f'{writer.json(task["answer"])} | "[" {_any_call(task, writer)} {more}'
    lists = [
        f"{writer.until_regex(_LIST_UP_TO_NAME % re.escape(tool['name']))} "
        f"{_arguments(tool['arguments'], writer)} {more}"
        for tool in task["tools"]
    ]
    return f"{writer.rule(writer.either(lists))}? {FREE}"


def _any_call(task: Mapping[str, Any], writer: LarkWriter) -> str:
    calls = [
        f"{writer.text(tool['name'] + '(')} {_arguments(tool['arguments'], writer)}"
        for tool in task["tools"]
    ]
    return writer.rule(writer.either(calls))


def _more(call: str) -> str:
    return f'({_BLANKS} "," {_BLANKS} {call})* {_BLANKS} "]"'


def _arguments(schema: Any, writer: LarkWriter) -> str:
    """Behind a call's ``(``: each argument at its place, or not where it is not required."""
    root = schema if isinstance(schema, dict) else {}
    outer = resolved(root, root)
    if unknown := sorted(NOT_FOLLOWED & outer.keys()):
        raise ValueError(f"{unknown[0]} of parameters cannot be followed where calls are Python")
    properties = outer.get("properties")
    if not isinstance(properties, dict):
        any_argument = writer.rule(f'{_KEY} "=" {_value(True, root, writer)}')
        return f'({any_argument} ("," {_BLANKS} {any_argument})*)? ")"'
    required = outer.get("required", ())
    names = [*properties, *(name for name in required if name not in properties)]
    arguments = [
        (_argument(name, properties.get(name, True), root, writer), name in required)
        for name in names
    ]
    return f'{_in_turn(arguments, writer)} ")"'


def _argument(name: str, schema: Any, root: Mapping[str, Any], writer: LarkWriter) -> str:
    if not name or not ARGUMENT_KEY.fullmatch(name):
        raise ValueError(f"{name!r} cannot be the name of an argument where calls are Python")
    return writer.rule(f"{writer.text(name + '=')} {_value(schema, root, writer)}")


def _value(schema: Any, root: Mapping[str, Any], writer: LarkWriter) -> str:
    if '"$ref"' not in json.dumps(schema):
        return writer.json(schema)
    place = "#/$defs/arguments"
    return writer.json({**moved(schema, place), "$defs": {"arguments": moved(root, place)}})


def _in_turn(arguments: Sequence[tuple[str, bool]], writer: LarkWriter) -> str:
    """The arguments with commas between them. Each has its body, and whether it is required."""
    starts: list[str] = []
    behind = EMPTY
    for body, is_required in reversed(arguments):
        starts = [f"{body} {behind}", *([] if is_required else starts)]
        repeat = "" if is_required else "?"
        behind = writer.rule(f'("," {_BLANKS} {body}){repeat} {behind}')
    if not any(is_required for _, is_required in arguments):
        starts.append(EMPTY)
    return writer.rule(writer.either(starts))
