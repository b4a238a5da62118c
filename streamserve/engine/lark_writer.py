"""Putting a grammar together from JSON, text, regexes and other grammars, in llguidance's Lark.

Special tokens are no text to a grammar. They are written ``<[special:N]>``, N being the place in
the list of their names, because the process that tries a grammar numbers them otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, regex_to_lark

FREE = "FREE"
"""Any text. Greedy: it goes on where it may, so nothing can follow but in what ``until`` makes."""

_PLACEHOLDER = re.compile(r"<\[special:(\d+)\]>")
_HEADER = f"%llguidance {{}}\n{FREE}: /(.|\\n)*/\n"


def with_special_ids(grammar: str, token_ids: Sequence[int]) -> str:
    """The grammar with the ids of special tokens in place of their numbers."""
    return _PLACEHOLDER.sub(lambda found: f"<[{token_ids[int(found[1])]}]>", grammar)


class LarkWriter:
    """Collects rules. What its methods return stands in the body of another rule."""

    def __init__(self, special_tokens: Sequence[str], whitespace: Mapping[str, Any]) -> None:
        """``whitespace`` are llguidance's options for what may stand between JSON's tokens."""
        self._numbers = {name: number for number, name in enumerate(special_tokens)}
        longest_first = sorted(map(re.escape, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first) or r"(?!)")
        self._whitespace = dict(whitespace)
        self._rules: list[str] = []
        self._grammars: list[dict[str, str]] = []
        self._parts: dict[str, list[dict[str, str]]] = {}  # with the grammars that each names

    def rule(self, body: str, *, flags: str = "") -> str:
        """A rule of its own."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{flags}: {body}\n")
        return name

    def reserve(self) -> str:
        """The name of a rule that ``define`` gives its body, which may name it."""
        return self.rule(EMPTY)

    def define(self, name: str, body: str) -> None:
        """Give a reserved rule its body."""
        self._rules[int(name[1:])] = f"{name}: {body}\n"

    def either(self, bodies: Sequence[str]) -> str:
        """Any one of these."""
        return (
            bodies[0] if len(bodies) == 1 else f"({' | '.join(body or EMPTY for body in bodies)})"
        )

    def json(self, schema: Any, *, is_part: bool = True) -> str:
        """JSON of a schema: an object, or true."""
        known = schema if isinstance(schema, dict) else {}
        body = f"%json {json.dumps({**known, 'x-guidance': self._whitespace})}"
        return self._part(body) if is_part else body

    def regex(self, pattern: str) -> str:
        """Text that matches as a whole, with classes in ASCII."""
        # Two slashes alone would be a comment.
        return self._part(f"/{regex_to_lark(pattern, 'dws') or '(?:)'}/")

    def is_token(self, name: str) -> bool:
        """Whether this is a special token, which is no text."""
        return name in self._numbers

    def text(self, text: str) -> str:
        """This text, the special tokens in it as themselves."""
        parts: list[str] = []
        position = 0
        for found in self._special.finditer(text):
            parts += [_string(text[position : found.start()]), self._token(found[0])]
            position = found.end()
        parts.append(_string(text[position:]))
        return " ".join(part for part in parts if part)

    def grammar(self, lark: str) -> str:
        """Another grammar, in Lark."""
        name = f"g{len(self._grammars)}"
        self._grammars.append({"name": name, "lark_grammar": lark})
        return self._part(f"@{name}", self._grammars[-1])

    def until(self, marker: str) -> str:
        """Any text up to the first ``marker``, and that.

        A marker may begin with a special token, and be written with it or without.
        """
        spelt = self.rule(f"{FREE} {_string(marker)}", flags="[lazy]")
        found = self._special.match(marker)
        if found is None:
            return spelt
        rest = self.text(marker[found.end() :])
        return f"({spelt} | {FREE} {self._token(found[0])} {rest})"

    def until_regex(self, pattern: str) -> str:
        """The shortest text that matches; llguidance's syntax, without slashes."""
        return self.rule(f"/{pattern}/", flags="[lazy]")

    def render(self, start: str) -> str:
        """The whole as text for ``LLMatcher``."""
        return _rendered(start, self._rules, self._grammars)

    def render_parts(self) -> list[str]:
        """What was made of schemas, regexes and grammars, each by itself: they name no rules."""
        return [_rendered(body, [], grammars) for body, grammars in self._parts.items()]

    def _part(self, body: str, *grammars: dict[str, str]) -> str:
        self._parts.setdefault(body, list(grammars))
        return body

    def _token(self, name: str) -> str:
        return f"<[special:{self._numbers[name]}]>"


EMPTY = '""'


def _rendered(start: str, rules: Sequence[str], grammars: Sequence[Mapping[str, str]]) -> str:
    lark = f"{_HEADER}start: {start or EMPTY}\n{''.join(rules)}"
    if not grammars:
        return LLMatcher.grammar_from_lark(lark)
    return json.dumps({"grammars": [{"name": "main", "lark_grammar": lark}, *grammars]})


def _string(text: str) -> str:
    # Lark's strings are JSON's.
    return json.dumps(text, ensure_ascii=False) if text else ""
