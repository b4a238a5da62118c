"""Gemma 4's tool calls: objects whose keys are bare, and strings between marks of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from streamserve.engine.parsers.call_reader import HOLD_CHARACTERS
from streamserve.engine.parsers.json_scanner import SCALAR, SCALAR_RUN
from streamserve.engine.parsers.markers import may_become, num_undecided
from streamserve.engine.parsers.tagged_formats import TaggedParser
from streamserve.engine.parsers.tool_parser import Reader

QUOTE = '<|"|>'
BARE_KEY = re.compile(r'[^<>{}\[\],:"\r\n]+')
_MAX_KEY = 256  # characters
_MAX_SCALAR = 1024  # characters: it is read again with each that comes
_SPACES = re.compile(r"\s*")
_PYTHON = {"None": "null", "True": "true", "False": "false"}
"""What the template, and a model that follows it, writes for a null, and might for the others."""


class GemmaReader:
    """Reads ``key:value,…}`` up to the brace that closes it, as JSON; used as a `CallReader` is.

    A value is ``<|"|>text<|"|>``, a list, an object of the same kind, or a scalar of JSON; a key
    may have the marks of a string, too. A string is shown while it is being written. What is not
    decided yet, a mark, key or scalar that may go on, is not consumed, and comes again with more.

    ``hold``: so many characters are read before a call that has not ended is shown.
    """

    def __init__(self, name: str, *, hold: int = HOLD_CHARACTERS) -> None:
        self._hold = hold
        self._state: Callable[[str, int], int] = self._before_key
        self._keys: list[set[str] | None] = [set()]  # of what is open: None is a list
        self._may_close = True  # nothing stands between an opening mark and here
        self._new = ["{"]  # arguments that have not been taken
        self.name = name
        self.text = ""  # all that was read, until the call is shown
        self.is_shown = False
        self.is_done = False
        self.is_broken = False

    def feed(self, text: str) -> int:
        """Take the next characters; return how many were consumed."""
        position = 0
        while position < len(text) and not (self.is_done or self.is_broken):
            end = self._step(text, position)
            if end == position:
                break
            position = end
        if not self.is_shown:
            self.text += text[:position]
            self.is_shown = self.is_done or len(self.text) >= self._hold
        return position

    def take_arguments(self) -> str:
        """The part of the arguments that has become known since the last time."""
        if not self.is_shown:
            return ""
        new, self._new = self._new, []
        return "".join(new)

    def _step(self, text: str, at: int) -> int:
        """Where the next part that is decided ends; ``at`` if none is."""
        if self._state != self._in_string:
            found = _SPACES.match(text, at)
            assert found is not None
            if found.end() > at:
                return found.end()
        return self._state(text, at)

    def _break(self, at: int) -> int:
        self.is_broken = True
        return at

    def _before_key(self, text: str, at: int) -> int:
        if text[at] == "}" and self._may_close:
            return self._closes(at)
        if may_become(text[at : at + len(QUOTE)], QUOTE):
            return at
        if not text.startswith(QUOTE, at):
            return self._bare_key(text, at)
        start = at + len(QUOTE)
        end = text.find(QUOTE, start)
        stop = end if end >= 0 else len(text) - num_undecided(text[start:], QUOTE)
        if stop - start > _MAX_KEY:
            return self._break(at)
        return at if end < 0 else self._key_ends(text[start:end], at, end + len(QUOTE))

    def _bare_key(self, text: str, at: int) -> int:
        found = BARE_KEY.match(text, at)
        if found is None or found.end() - at > _MAX_KEY:
            return self._break(at)
        is_open = found.end() == len(text)
        return at if is_open else self._key_ends(found[0].rstrip(), at, found.end())

    def _key_ends(self, key: str, start: int, end: int) -> int:
        keys = self._keys[-1]
        assert keys is not None
        if key in keys:
            return self._break(start)
        keys.add(key)
        self._new.append(json.dumps(key, ensure_ascii=False))
        self._state = self._before_colon
        return end

    def _before_colon(self, text: str, at: int) -> int:
        if text[at] != ":":
            return self._break(at)
        self._new.append(": ")
        self._state, self._may_close = self._before_value, False
        return at + 1

    def _before_value(self, text: str, at: int) -> int:
        match text[at]:
            case "]" if self._may_close:
                return self._closes(at)
            case "{" | "[" as opener:
                self._new.append(opener)
                self._keys.append(set() if opener == "{" else None)
                self._state = self._before_key if opener == "{" else self._before_value
                self._may_close = True
                return at + 1
        if text.startswith(QUOTE, at):
            self._new.append('"')
            self._state = self._in_string
            return at + len(QUOTE)
        return at if may_become(text[at : at + len(QUOTE)], QUOTE) else self._scalar(text, at)

    def _scalar(self, text: str, at: int) -> int:
        found = SCALAR_RUN.match(text, at)
        assert found is not None
        if found.end() - at > _MAX_SCALAR:
            return self._break(at)
        if found.end() == len(text):
            return at
        value = _PYTHON.get(found[0], found[0])
        if SCALAR.fullmatch(value) is None:
            return self._break(at)
        self._new.append(value)
        self._state = self._behind_value
        return found.end()

    def _in_string(self, text: str, at: int) -> int:
        end = text.find(QUOTE, at)
        is_open = end < 0
        if is_open:
            end = len(text) - num_undecided(text[at:], QUOTE)
        self._new.append(json.dumps(text[at:end], ensure_ascii=False)[1:-1])
        if is_open:
            return end
        self._new.append('"')
        self._state = self._behind_value
        return end + len(QUOTE)

    def _behind_value(self, text: str, at: int) -> int:
        is_list = self._keys[-1] is None
        if text[at] == ("]" if is_list else "}"):
            return self._closes(at)
        if text[at] != ",":
            return self._break(at)
        self._new.append(", ")
        self._state = self._before_value if is_list else self._before_key
        self._may_close = False
        return at + 1

    def _closes(self, at: int) -> int:
        self._new.append("]" if self._keys.pop() is None else "}")
        self._state = self._behind_value
        self.is_done = not self._keys
        return at + 1


class Gemma4Parser(TaggedParser):
    """Gemma 4: ``<|tool_call>call:name{key:<|"|>text<|"|>,other:5}`` and ``<tool_call|>``, any
    number of times, mostly behind some text.
    """

    markers = ("<|tool_call>", "<tool_call|>", QUOTE)
    section_open, section_close = "<|tool_call>", "<tool_call|>"
    call_open, name_close = "call:", "{"

    def _in_text(self) -> bool:
        return self._say_until({self.section_open: self._before_call})

    def _new_reader(self, name: str) -> Reader:
        return GemmaReader(name, hold=self._hold)
