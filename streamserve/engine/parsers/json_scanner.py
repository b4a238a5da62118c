"""One JSON object that arrives in pieces: checked character by character, as far as it is there."""

from __future__ import annotations

import json
import re
from enum import Enum, auto

_SPACE = re.compile(r"[ \t\n\r]*")
_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]*')
SCALAR_RUN = re.compile(r"[-+.0-9A-Za-z]*")
SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")


class _Expect(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()  # behind "["
    KEY = auto()
    KEY_OR_END = auto()  # behind "{"
    COLON = auto()
    COMMA_OR_END = auto()
    STRING = auto()  # inside one
    ESCAPE = auto()
    HEX = auto()
    SCALAR = auto()


class JsonScanner:
    """Follows an object to its closing brace. White space before it counts as part of it.

    ``text`` is what was consumed. ``members`` maps the outer object's keys to where their values
    begin and end in it; the last one's end is ``None`` while it is open. Strict as RFC 8259, and a
    key of the outer object may come once.
    """

    def __init__(self) -> None:
        self.text = ""
        self.members: dict[str, tuple[int, int | None]] = {}
        self.is_done = False
        self.is_broken = False
        self._expect = _Expect.VALUE
        self._closers: list[str] = []
        self._token_start = 0  # of the string or scalar that is being read
        self._is_key = False
        self._num_hex = 0
        self._key = ""

    def feed(self, text: str) -> int:
        """Take the next characters; return how many belong to the object.

        All of them, until it is done or broken; a character that breaks it does not belong to it.
        """
        start = position = len(self.text)
        self.text += text
        end = len(self.text)
        while position < end and not (self.is_done or self.is_broken):
            position = self._step(position)
        self.text = self.text[:position]
        return position - start

    def _step(self, position: int) -> int:
        """Consume at least one character, unless that breaks the object."""
        match self._expect:
            case _Expect.STRING:
                return self._in_string(position)
            case _Expect.ESCAPE:
                return self._in_escape(position)
            case _Expect.HEX:
                return self._in_hex(position)
            case _Expect.SCALAR:
                return self._in_scalar(position)
        found = _SPACE.match(self.text, position)
        assert found is not None
        if found.end() > position:
            return found.end()
        return self._between(position, self.text[position])

    def _between(self, position: int, character: str) -> int:
        expect, closers = self._expect, self._closers
        if expect is _Expect.COLON:
            if character != ":":
                return self._break(position)
            self._expect = _Expect.VALUE
            return position + 1
        if expect is _Expect.COMMA_OR_END and character == ",":
            self._expect = _Expect.KEY if closers[-1] == "}" else _Expect.VALUE
            return position + 1
        may_end = expect in (_Expect.COMMA_OR_END, _Expect.KEY_OR_END, _Expect.VALUE_OR_END)
        if may_end and character == closers[-1]:
            closers.pop()
            return self._value_ended(position + 1)
        if expect in (_Expect.KEY, _Expect.KEY_OR_END):
            if character != '"':
                return self._break(position)
            return self._string_begins(position, is_key=True)
        if expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            return self._value_begins(position, character)
        return self._break(position)

    def _value_begins(self, position: int, character: str) -> int:
        if not self._closers and character != "{":
            return self._break(position)
        if len(self._closers) == 1:
            self.members[self._key] = (position, None)
        if character == "{":
            self._closers.append("}")
            self._expect = _Expect.KEY_OR_END
            return position + 1
        if character == "[":
            self._closers.append("]")
            self._expect = _Expect.VALUE_OR_END
            return position + 1
        if character == '"':
            return self._string_begins(position, is_key=False)
        if character not in "-0123456789tfn":
            return self._break(position)
        self._token_start = position
        self._expect = _Expect.SCALAR
        return position + 1

    def _value_ended(self, position: int) -> int:
        if not self._closers:
            self.is_done = True
        elif len(self._closers) == 1:
            self.members[self._key] = (self.members[self._key][0], position)
        self._expect = _Expect.COMMA_OR_END
        return position

    def _string_begins(self, position: int, *, is_key: bool) -> int:
        self._token_start = position
        self._is_key = is_key
        self._expect = _Expect.STRING
        return position + 1

    def _in_string(self, position: int) -> int:
        found = _STRING_RUN.match(self.text, position)
        assert found is not None
        if found.end() > position:
            return found.end()
        character = self.text[position]
        if character == "\\":
            self._expect = _Expect.ESCAPE
            return position + 1
        if character != '"':
            return self._break(position)
        if not self._is_key:
            return self._value_ended(position + 1)
        if len(self._closers) == 1:
            self._key = json.loads(self.text[self._token_start : position + 1])
            if self._key in self.members:
                return self._break(position)
        self._expect = _Expect.COLON
        return position + 1

    def _in_escape(self, position: int) -> int:
        character = self.text[position]
        if character == "u":
            self._expect, self._num_hex = _Expect.HEX, 0
        elif character in _ESCAPES:
            self._expect = _Expect.STRING
        else:
            return self._break(position)
        return position + 1

    def _in_hex(self, position: int) -> int:
        if self.text[position] not in _HEX:
            return self._break(position)
        self._num_hex += 1
        if self._num_hex == 4:
            self._expect = _Expect.STRING
        return position + 1

    def _in_scalar(self, position: int) -> int:
        found = SCALAR_RUN.match(self.text, position)
        assert found is not None
        if found.end() == len(self.text):
            return found.end()  # it may go on
        if SCALAR.fullmatch(self.text, self._token_start, found.end()) is None:
            return self._break(found.end())
        return self._value_ended(found.end())

    def _break(self, position: int) -> int:
        self.is_broken = True
        return position
