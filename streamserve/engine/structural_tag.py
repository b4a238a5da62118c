"""Grammars of answers that are free up to a marker: structural tags, and calls of strict tools.

Runs in the worker process only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark

from streamserve.engine.gemma_grammar import gemma4_calls
from streamserve.engine.lark_writer import EMPTY, FREE, LarkWriter
from streamserve.engine.parsers.harmony import CHANNEL, END, MESSAGE, START, call_header
from streamserve.engine.parsers.list_formats import CohereParser
from streamserve.engine.parsers.pythonic_formats import Lfm2Parser, Olmo3Parser
from streamserve.engine.parsers.response import response_marks
from streamserve.engine.parsers.section_formats import (
    DeepSeekV3Parser,
    DeepSeekV31Parser,
    KimiK2Parser,
)
from streamserve.engine.parsers.tagged_formats import (
    Glm45Parser,
    MinimaxM2Parser,
    Qwen3CoderParser,
    SeedOssParser,
)
from streamserve.engine.pythonic_grammar import python_lines, python_list, pythonic_calls
from streamserve.engine.schema_refs import moved
from streamserve.engine.tagged_grammar import answer_with, section_calls, tagged_calls

_BLANKS = r"/[ \t\r\n]{0,8}/"
_SEPARATOR = r"/[ \t\r\n]{0,8}[;,]?[ \t\r\n]{0,8}/"
_LLAMA_NAME = r'[ \t\r\n]*\{[ \t\r\n]*"name"[ \t\r\n]*:[ \t\r\n]*"%s"'
_LLAMA_KEY = r'/[ \t\r\n]{0,8},[ \t\r\n]{0,8}"parameters"[ \t\r\n]{0,8}:[ \t\r\n]{0,8}/'
_GLM_NAME = r"[ \t\r\n]*%s[ \t\r]*\n"
_ASSISTANT = f"{START}assistant"
Format = Mapping[str, Any]


def structural_tag_grammar(text: str, writer: LarkWriter) -> str:
    """The grammar of a tree of formats, as xgrammar and vLLM have them, checked by the API."""
    return writer.render(_body(json.loads(text), writer))


def _body(tree: Format, writer: LarkWriter) -> str:
    return _KINDS[tree["type"]](tree, writer)


def _sequence(tree: Format, writer: LarkWriter) -> str:
    return (
        f"({' '.join(filter(None, (_body(part, writer) for part in tree['elements']))) or EMPTY})"
    )


def _or(tree: Format, writer: LarkWriter) -> str:
    return writer.either([_body(part, writer) for part in tree["elements"]])


def _ends(tag: Format) -> Sequence[str]:
    end = tag["end"]
    return [end] if isinstance(end, str) else end


def _inside(tag: Format, writer: LarkWriter) -> str:
    """A tag behind its beginning."""
    content, ends = tag["content"], _ends(tag)
    if content["type"] == "any_text" and all(ends):
        return writer.either([writer.until(end) for end in ends])
    end = writer.either([writer.text(end) for end in ends])
    return " ".join(part for part in (_body(content, writer), end) if part)


def _tag(tag: Format, writer: LarkWriter) -> str:
    begin = writer.text(tag["begin"])
    return f"({' '.join(part for part in (begin, _inside(tag, writer)) if part) or EMPTY})"


def _triggered_tags(tree: Format, writer: LarkWriter) -> str:
    found: list[str] = []
    for trigger in tree["triggers"]:
        rests = [
            " ".join(
                part
                for part in (writer.text(tag["begin"][len(trigger) :]), _inside(tag, writer))
                if part
            )
            for tag in tree["tags"]
            if tag["begin"].startswith(trigger)
        ]
        found.append(writer.rule(f"{writer.until(trigger)} {writer.either(rests)}"))
    one = writer.rule(writer.either(found))
    more = FREE if tree["stop_after_first"] else f"{one}* {FREE}"
    if not tree["at_least_one"]:
        return f"({one} | {FREE})" if tree["stop_after_first"] else f"({more})"
    first = writer.either([_tag(tag, writer) for tag in tree["tags"]])
    return first if tree["stop_after_first"] else f"({first} {more})"


def _tags_with_separator(tree: Format, writer: LarkWriter) -> str:
    tag = writer.rule(writer.either([_tag(tag, writer) for tag in tree["tags"]]))
    separator = writer.text(tree["separator"])
    several = tag if tree["stop_after_first"] else f"{tag} ({separator} {tag})*"
    return f"({several})" if tree["at_least_one"] else f"({several})?"


_KINDS: dict[str, Callable[[Format, LarkWriter], str]] = {
    "any_text": lambda _tree, _writer: FREE,
    "const_string": lambda tree, writer: writer.text(tree["value"]),
    "grammar": lambda tree, writer: writer.grammar(any_to_lark(tree["grammar"])),
    "json_schema": lambda tree, writer: writer.json(tree["json_schema"]),
    "or": _or,
    "regex": lambda tree, writer: writer.regex(tree["pattern"]),
    "sequence": _sequence,
    "tag": _tag,
    "tags_with_separator": _tags_with_separator,
    "triggered_tags": _triggered_tags,
}


def tool_call_grammar(text: str, writer: LarkWriter) -> str:
    """The grammar of an answer that may call tools as the named parser reads them.

    ``tools`` have a ``name`` and the schema of their ``arguments``. What is no call is free, or,
    where there is one, JSON of the schema ``answer``.
    """
    task = json.loads(text)
    return writer.render(_FAMILIES[task["parser"]](task, writer))


def _call(
    tools: Sequence[Format],
    key: str,
    writer: LarkWriter,
    *,
    name_key: str = "name",
    before: Mapping[str, Format] = MappingProxyType({}),
) -> str:
    """One call as JSON: members ``before`` it, a name, and under ``key`` its arguments."""
    schemas = [
        {
            "type": "object",
            "properties": {
                **before,
                name_key: {"const": tool["name"]},
                key: moved(tool["arguments"], f"#/properties/{key}"),
            },
            "required": [*before, name_key, key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    for tool in tools:
        writer.json(tool["arguments"])  # tried by themselves: a walk would end in the names
    return writer.rule(writer.either([writer.json(schema, is_part=False) for schema in schemas]))


def _hermes(task: Format, writer: LarkWriter) -> str:
    begin = "<tool_call>"
    call = _call(task["tools"], "arguments", writer)
    inside = writer.rule(f"{_BLANKS} {call} {_BLANKS} {writer.text('</tool_call>')}")
    if task["answer"] is None:
        return f"({writer.until(begin)} {inside})* {FREE}"
    whole = writer.rule(f"{writer.text(begin)} {inside}")
    return f"{writer.json(task['answer'])} | {_BLANKS} {whole} ({_BLANKS} {whole})*"


def _llama3_json(task: Format, writer: LarkWriter) -> str:
    """A call is one from its name on: an answer may begin with other JSON."""
    tag = "<|python_tag|>"
    if task["answer"] is not None:
        call = _call(task["tools"], "parameters", writer)
        several = writer.rule(f"{call} ({_SEPARATOR} {call})*")
        return f"{writer.json(task['answer'])} | {several} | {writer.text(tag)} {several}"
    calls = [
        f"{writer.until_regex(_LLAMA_NAME % re.escape(tool['name']))} {_LLAMA_KEY} "
        f'{writer.json(tool["arguments"])} {_BLANKS} "}}"'
        for tool in task["tools"]
    ]
    call = writer.rule(writer.either(calls))
    several = writer.rule(f"{call} ({_SEPARATOR} {call})*")
    return f"{several}? ({writer.until(tag)} {several})* {FREE}"


def _mistral(task: Format, writer: LarkWriter) -> str:
    begin = "[TOOL_CALLS]"
    call = _call(task["tools"], "arguments", writer)
    array = f'"[" {_BLANKS} {call} ({_BLANKS} "," {_BLANKS} {call})* {_BLANKS} "]"'
    call_id = f"({writer.text('[CALL_ID]')} /[a-zA-Z0-9]{{9}}/)?"
    named = [
        f"{writer.text(tool['name'])} {call_id} ({writer.text('[ARGS]')})? {_BLANKS} "
        f"{writer.json(tool['arguments'], is_part=False)}"
        for tool in task["tools"]
    ]
    inside = writer.rule(f"{_BLANKS} {writer.either([array, *named])}")
    if task["answer"] is None:
        return f"({writer.until(begin)} {inside})* {FREE}"
    whole = writer.rule(f"{writer.text(begin)} {inside}")
    return f"{writer.json(task['answer'])} | {_BLANKS} {whole} ({_BLANKS} {whole})*"


def _glm4(task: Format, writer: LarkWriter) -> str:
    """One call, and that from its name on, or anything else."""
    calls = [
        f"{writer.until_regex(_GLM_NAME % re.escape(tool['name']))} {_BLANKS} "
        f"{writer.json(tool['arguments'])}"
        for tool in task["tools"]
    ]
    call = writer.rule(writer.either(calls))
    if task["answer"] is not None:
        return f"{writer.json(task['answer'])} | {call}"
    return f"{call}? {FREE}"


def _phi4_mini(task: Format, writer: LarkWriter) -> str:
    begin = "<|tool_call|>"
    call = _call(task["tools"], "arguments", writer)
    inside = writer.rule(f"{_array(call)} {writer.text('<|/tool_call|>')}")
    if task["answer"] is None:
        return f"({writer.until(begin)} {inside})* {FREE}"
    return f"{writer.json(task['answer'])} | {writer.text(begin)} {inside}"


def _array(call: str) -> str:
    return (
        f'{_BLANKS} "[" {_BLANKS} {call} ({_BLANKS} "," {_BLANKS} {call})* {_BLANKS} "]" {_BLANKS}'
    )


def _cohere(task: Format, writer: LarkWriter) -> str:
    call_id = {"tool_call_id": {"type": "string", "pattern": "^[0-9]{1,4}$"}}
    tools = task["tools"]
    call = _call(tools, "parameters", writer, name_key="tool_name", before=call_id)
    inside = f"{_array(call)} {writer.text(CohereParser.section_close)}"
    free = answer_with(CohereParser.section_open, inside, task, writer)
    if task["answer"] is not None:
        return free
    # Marks that are special tokens are no free text, and a model that may not write them calls.
    said = [
        f"{_BLANKS} {writer.text(marks.start)} {writer.until(marks.end)}"
        for marks in response_marks("cohere")
        if writer.is_token(marks.start) and writer.is_token(marks.end)
    ]
    return writer.either([free, *said])


def _harmony(task: Format, writer: LarkWriter) -> str:
    """Thoughts and words before the message that counts: a call, or what is said at last."""
    asides = [writer.text(f"{CHANNEL}{name}{MESSAGE}") for name in ("analysis", "commentary")]
    aside = writer.rule(f"{writer.either(asides)} {writer.until(END)} {writer.text(_ASSISTANT)}")
    lasts = [
        f"{writer.text(call_header(tool['name']))} {writer.json(tool['arguments'])}"
        for tool in task["tools"]
    ]
    if not task.get("is_forced"):
        said = FREE if task["answer"] is None else writer.json(task["answer"])
        lasts.append(f"{writer.text(f'{CHANNEL}final{MESSAGE}')} {said}")
    return f"{aside}* {writer.either(lasts)}"


_FAMILIES: dict[str, Callable[[Format, LarkWriter], str]] = {
    "hermes": _hermes,
    "llama3_json": _llama3_json,
    "mistral": _mistral,
    "glm4": _glm4,
    "phi4_mini_json": _phi4_mini,
    "openai": _harmony,
    "qwen3_coder": partial(tagged_calls, Qwen3CoderParser),
    "seed_oss": partial(tagged_calls, SeedOssParser),
    "glm45": partial(tagged_calls, Glm45Parser),
    "minimax_m2": partial(tagged_calls, MinimaxM2Parser),
    "kimi_k2": partial(section_calls, KimiK2Parser),
    "deepseek_v3": partial(section_calls, DeepSeekV3Parser),
    "deepseek_v31": partial(section_calls, DeepSeekV31Parser),
    "lfm2": partial(pythonic_calls, Lfm2Parser),
    "pythonic": python_list,
    "olmo3": partial(python_lines, Olmo3Parser),
    "gemma4": gemma4_calls,
    "cohere": _cohere,
}
