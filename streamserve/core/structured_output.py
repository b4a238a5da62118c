"""What an answer must look like, as a request says it: a grammar's kind and its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class GrammarKind(StrEnum):
    """What ``StructuredOutput.text`` is written in."""

    JSON_SCHEMA = "json_schema"  # a JSON Schema; "true" and "{}" allow any JSON value
    REGEX = "regex"  # the whole answer matches
    CHOICE = "choice"  # a JSON array of strings: the answer is one of them
    LARK = "lark"  # Lark or EBNF with a rule called start (GBNF: root)
    STRUCTURAL_TAG = "structural_tag"  # a tree of formats as JSON, free text among them
    TOOL_CALLS = "tool_calls"  # a parser's name and tools, as JSON: calls in free text


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """The grammar that an answer follows. Hashable: equal ones are compiled once.

    The whole answer is a sentence of the grammar unless ``max_tokens`` or a stop string cuts it.
    ``whitespace_pattern`` is a regex for what may stand between the tokens of JSON, ``""`` for
    nothing; ``None`` allows a few spaces, and line breaks with their indentation. ``param`` is the
    request field that errors name. Those of another ``salt`` are others.
    """

    kind: GrammarKind
    text: str
    whitespace_pattern: str | None = None
    salt: str = field(default="", repr=False)
    param: str = field(default="structured_outputs", compare=False)
