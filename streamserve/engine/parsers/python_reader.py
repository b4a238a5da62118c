"""One tool call in Python's syntax, ``key="text", other=[1, None])``: its arguments' JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

from streamserve.engine.parsers.call_reader import HOLD_CHARACTERS
from streamserve.engine.parsers.markers import may_become, num_leading_spaces
from streamserve.engine.parsers.state_reader import StateReader

ARGUMENT_KEY = re.compile(r"[^\s=(),:'\"\[\]{}\\]{0,128}")
"""As much of an argument's name as there is: Python's, and what else a schema may name."""

_WORD = re.compile(r"[-+.\w]*", re.ASCII)
_MAX_WORD = 128  # characters of a number
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORDS = {
    "True": "true",
    "False": "false",
    "None": "null",
    **{name: name for name in ("true", "false", "null")},
}
_ESCAPES = {
    **{character: character for character in "\\'\"/"},
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "b": "\b",
    "f": "\f",
    "a": "\a",
    "v": "\v",
    "\n": "",  # a line that goes on
}
_HEX_SIZES = {"x": 2, "u": 4, "U": 8}
_HEX = re.compile(r"[0-9a-fA-F]+")
_OCTAL = re.compile(r"[0-7]{1,3}")
_JSON_CLOSERS = {")": "}", "]": "]", "}": "}"}


class PythonReader(StateReader):
    """A `StateReader` of what stands behind ``name(``, up to the ``)``.

    Values are literals: strings in either quote, or three of it, numbers, lists, dictionaries with
    strings for keys, and True, False and None, or JSON's words for them. A string may go on over
    lines, as templates write it; an escape that Python does not know is what it looks like. Each
    argument has a name, and comes once. Strings are shown while they are being written.
    """

    def __init__(self, name: str, *, hold: int = HOLD_CHARACTERS) -> None:
        super().__init__(name, hold=hold)
        self._state = self._before_key
        self._keys: set[str] = set()
        self._closers = [")"]  # of what is open
        self._is_empty = True  # what was opened last
        self._quote = ""
        self._behind_string: Callable[[str], int] = self._after_value

    def _before_key(self, text: str) -> int:
        """Before the name of an argument, or the end."""
        if spaces := num_leading_spaces(text):
            return spaces
        if text[0] == ")":
            return self._close()
        found = ARGUMENT_KEY.match(text)
        assert found is not None
        key = found[0]
        if found.end() == len(text):
            return 0
        if not key or key in self._keys:
            return self._break()
        self._keys.add(key)
        self._separate()
        self._new += f"{json.dumps(key, ensure_ascii=False)}: "
        self._state = self._behind_key
        return found.end()

    def _behind_key(self, text: str) -> int:
        return self._sign(text, "=")

    def _behind_dict_key(self, text: str) -> int:
        if text[0] == ":":
            self._new += ": "
        return self._sign(text, ":")

    def _sign(self, text: str, sign: str) -> int:
        if spaces := num_leading_spaces(text):
            return spaces
        if text[0] != sign:
            return self._break()
        self._state = self._before_value
        return 1

    def _before_item(self, text: str) -> int:
        """Before a list's item, or its end."""
        if spaces := num_leading_spaces(text):
            return spaces
        if text[0] == "]":
            return self._close()
        self._separate()
        self._state = self._before_value
        return self._before_value(text)

    def _before_dict_key(self, text: str) -> int:
        if spaces := num_leading_spaces(text):
            return spaces
        if text[0] == "}":
            return self._close()
        if text[0] not in "'\"":
            return self._break()
        return self._string_begins(text, self._behind_dict_key)

    def _before_value(self, text: str) -> int:
        if spaces := num_leading_spaces(text):
            return spaces
        if text[0] in "'\"":
            return self._string_begins(text, self._after_value)
        if text[0] in "[{":
            self._new += text[0]
            self._closers.append("]" if text[0] == "[" else "}")
            self._is_empty = True
            self._state = self._state_inside()
            return 1
        return self._word(text)

    def _state_inside(self) -> Callable[[str], int]:
        states = {")": self._before_key, "]": self._before_item, "}": self._before_dict_key}
        return states[self._closers[-1]]

    def _word(self, text: str) -> int:
        found = _WORD.match(text)
        assert found is not None
        if found.end() > _MAX_WORD:
            return self._break()
        if found.end() == len(text):
            return 0
        value = _WORDS.get(found[0]) or _number(found[0])
        if value is None:
            return self._break()
        self._new += value
        self._state = self._after_value
        return found.end()

    def _after_value(self, text: str) -> int:
        if spaces := num_leading_spaces(text):
            return spaces
        if text[0] == ",":
            self._state = self._state_inside()
            return 1
        return self._close() if text[0] == self._closers[-1] else self._break()

    def _separate(self) -> None:
        self._new += "" if self._is_empty else ", "
        self._is_empty = False

    def _close(self) -> int:
        self._new += _JSON_CLOSERS[self._closers.pop()]
        self._is_empty = False
        self._state = self._after_value
        self.is_done = not self._closers
        return 1

    def _string_begins(self, text: str, behind: Callable[[str], int]) -> int:
        if may_become(text, text[0] * 3):
            return 0
        self._quote = text[0] * (3 if text.startswith(text[0] * 3) else 1)
        if behind == self._behind_dict_key:
            self._separate()
        self._behind_string = behind
        self._new += '"'
        self._state = self._in_string
        return len(self._quote)

    def _in_string(self, text: str) -> int:
        quote = self._quote
        if text[0] == "\\":
            return self._escape(text)
        if text.startswith(quote):
            self._new += '"'
            self._state = self._behind_string
            return len(quote)
        if may_become(text, quote):
            return 0
        ends = [end for mark in ("\\", quote[0]) if (end := text.find(mark, 1)) > 0]
        return self._say(text, min(ends, default=len(text)))

    def _say(self, text: str, size: int) -> int:
        self._new += json.dumps(text[:size], ensure_ascii=False)[1:-1]
        return size

    def _escape(self, text: str) -> int:
        kind = text[1:2]
        if not kind:
            return 0
        if kind in _HEX_SIZES:
            return self._hex_escape(text, 2 + _HEX_SIZES[kind])
        if octal := _OCTAL.match(text, 1):
            if octal.end() == len(text) < 4:
                return 0
            self._say(chr(int(octal[0], 8)), 1)
            return octal.end()
        said = _ESCAPES.get(kind, text[:2])
        self._say(said, len(said))
        return 2

    def _hex_escape(self, text: str, size: int) -> int:
        digits = text[2:size]
        if digits and not _HEX.fullmatch(digits):
            return self._break()
        if len(text) < size:
            return 0
        if size == 6:
            self._new += text[:size]  # JSON's, which may be half of a pair
            return size
        code = int(digits, 16)
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            return self._break()
        self._say(chr(code), 1)
        return size


def _number(text: str) -> str | None:
    """JSON of one of Python's numbers."""
    if _JSON_NUMBER.fullmatch(text):
        return text
    try:
        if not set(".eE") & set(text) or "x" in text.lower():
            return str(int(text, 0))
        value = float(text)
    except ValueError:
        return None
    return repr(value) if math.isfinite(value) else None
