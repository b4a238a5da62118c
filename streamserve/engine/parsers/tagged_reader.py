"""One tool call whose arguments stand between tags: their JSON, while they are being written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from streamserve.engine.parsers.argument_types import json_of, parameter_types
from streamserve.engine.parsers.call_reader import HOLD_CHARACTERS
from streamserve.engine.parsers.markers import may_become, num_leading_spaces, num_undecided
from streamserve.engine.parsers.state_reader import StateReader

_MAX_KEY = 256  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class TagStyle:
    """The tags of a family. ``value_open`` is what comes between a key and its value, if anything.

    ``lenient_ends`` end a value, too, without being part of it: models forget to close one. With
    ``is_on_lines`` a line break in front of a value, and one behind it, are not part of it.
    """

    key_open: str
    key_close: str
    value_close: str
    call_close: str
    value_open: str = ""
    lenient_ends: tuple[str, ...] = ()
    is_on_lines: bool = False


class TaggedReader(StateReader):
    """A `StateReader` of arguments between tags.

    A string is shown while it is being written, a value of another type when it is whole.
    """

    def __init__(
        self, style: TagStyle, name: str, parameters: Any, *, hold: int = HOLD_CHARACTERS
    ) -> None:
        """``parameters`` is the JSON Schema of the arguments."""
        super().__init__(name, hold=hold)
        self._style = style
        self._parameters = parameters
        # A grammar that makes calls closes what it opens, and strings may hold anything else.
        self._value_ends = (style.value_close, *(style.lenient_ends if hold else ()))
        self._state = self._between
        self._key = ""
        self._keys: set[str] = set()
        self._types: frozenset[str] = frozenset()
        self._value = ""  # of which nothing has been shown
        self._is_at_start = True  # of a value

    def _between(self, text: str) -> int:
        """Before a key, or the end."""
        if spaces := num_leading_spaces(text):
            return spaces
        style = self._style
        if text.startswith(style.key_open):
            self._state = self._in_key
            return len(style.key_open)
        if text.startswith(style.call_close):
            self._new += "}"
            self.is_done = True
            return len(style.call_close)
        is_open = may_become(text, style.key_open) or may_become(text, style.call_close)
        return 0 if is_open else self._break()

    def _in_key(self, text: str) -> int:
        end = text.find(self._style.key_close)
        if (end if end >= 0 else len(text) - len(self._style.key_close)) > _MAX_KEY:
            return self._break()
        if end < 0:
            return 0
        self._key = text[:end].strip()
        if not self._key or self._key in self._keys or "<" in self._key:
            return self._break()
        self._keys.add(self._key)
        self._state = self._before_value if self._style.value_open else self._value_begins()
        return end + len(self._style.key_close)

    def _before_value(self, text: str) -> int:
        if spaces := num_leading_spaces(text):
            return spaces
        mark = self._style.value_open
        if text.startswith(mark):
            self._state = self._value_begins()
            return len(mark)
        return 0 if may_become(text, mark) else self._break()

    def _value_begins(self) -> Callable[[str], int]:
        separator = "" if len(self._keys) == 1 else ", "
        self._new += f"{separator}{json.dumps(self._key, ensure_ascii=False)}: "
        self._types = parameter_types(self._parameters, self._key)
        self._is_at_start, self._value = True, ""
        if self._is_string:
            self._new += '"'
        return self._in_value

    @property
    def _is_string(self) -> bool:
        return self._types == {"string"}

    def _in_value(self, text: str) -> int:
        found = [(at, mark) for mark in self._value_ends if (at := text.find(mark)) >= 0]
        if found:
            end, mark = min(found)
            is_broken_off = self._style.is_on_lines and text[:end].endswith("\n")
            self._say(text[: end - is_broken_off])
            self._value_ended()
            return end + (len(mark) if mark == self._style.value_close else 0)
        end = len(text) - max(num_undecided(text, mark) for mark in self._value_ends)
        if self._style.is_on_lines and text[:end].endswith("\n"):
            end -= 1
        self._say(text[:end])
        return end

    def _say(self, text: str) -> None:
        if self._is_at_start and text:
            self._is_at_start = False
            if self._style.is_on_lines:
                text = text.removeprefix("\n")
        if self._is_string:
            self._new += json.dumps(text, ensure_ascii=False)[1:-1]
        else:
            self._value += text

    def _value_ended(self) -> None:
        self._new += '"' if self._is_string else json_of(self._value, self._types)
        self._state = self._between
