"""From a request's grammar to llguidance's own notation. Runs in the worker process only."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from streamserve.core.structured_output import GrammarKind
from streamserve.engine.lark_writer import LarkWriter
from streamserve.engine.structural_tag import structural_tag_grammar, tool_call_grammar

# A few spaces, or a line break and its indentation. Where any white space may come, a model that
# does not know what to write next writes it for ever.
JSON_WHITESPACE = r"[ \t]{1,4}|\r?\n[ \t]{0,40}"


def llguidance_grammar(
    kind: GrammarKind,
    text: str,
    whitespace_pattern: str | None,
    special_tokens: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """The same grammar as text for ``LLMatcher``, and grammars of its parts, if it has any.

    Special tokens stand in it as ``with_special_ids`` expects. Raises ``ValueError`` where it is no
    grammar.
    """
    if kind is GrammarKind.JSON_SCHEMA:
        return _json_schema(text, whitespace_pattern), []
    if kind in _SOURCES:
        return _SOURCES[kind](text), []
    writer = LarkWriter(special_tokens, _whitespace(whitespace_pattern))
    grammar = _WRITTEN[kind](text, writer)
    return grammar, writer.render_parts()


def _json_schema(text: str, whitespace_pattern: str | None) -> str:
    schema = json.loads(text)
    if schema is True:
        text = "{}"
    elif not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object or true")
    options = _whitespace(whitespace_pattern)
    return LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]


def _whitespace(pattern: str | None) -> dict[str, Any]:
    if pattern == "":
        return {"whitespace_flexible": False}
    return {"whitespace_pattern": JSON_WHITESPACE if pattern is None else pattern}


def _regex(text: str) -> str:
    # Classes are ASCII, as JSON Schema and vLLM have it. Two slashes alone would be a comment.
    body = regex_to_lark(text, "dws") or "(?:)"
    return LLMatcher.grammar_from_lark(f"start: /{body}/")


def _choice(text: str) -> str:
    # Lark's strings are JSON's.
    choices = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(text)]
    return LLMatcher.grammar_from_lark(f"start: {' | '.join(choices)}")


def _lark(text: str) -> str:
    return LLMatcher.grammar_from_lark(any_to_lark(text))


_SOURCES: dict[GrammarKind, Callable[[str], str]] = {
    GrammarKind.REGEX: _regex,
    GrammarKind.CHOICE: _choice,
    GrammarKind.LARK: _lark,
}
_WRITTEN: dict[GrammarKind, Callable[[str, LarkWriter], str]] = {
    GrammarKind.STRUCTURAL_TAG: structural_tag_grammar,
    GrammarKind.TOOL_CALLS: tool_call_grammar,
}
