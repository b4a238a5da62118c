"""One tool call, from the JSON that a model writes for it."""

from __future__ import annotations

import json
from collections.abc import Collection

from streamserve.engine.parsers.json_scanner import JsonScanner

HOLD_CHARACTERS = 256
"""A call of up to so many characters is shown whole or not at all, so that a malformed one comes
out as text. Of a longer one the arguments are shown as they come: if they break after that, what
was shown stays, and the rest of the answer is text."""

_ARGUMENTS = ("arguments", "parameters")


class CallReader:
    """Reads ``{"name": …, "arguments": {…}}``, or with ``name`` given the arguments alone.

    After each ``feed``, ``is_shown`` says whether the call may be shown, under ``name``, and
    ``take_arguments`` what of its arguments is new. A call counts if it names one of ``names``, and
    its arguments are an object, or the same as a string, or left out.

    ``name_key`` is what the family calls a name. ``hold`` of 0 is for text that a grammar made: it
    is shown as soon as it can be.
    """

    def __init__(
        self,
        names: Collection[str],
        *,
        name: str | None = None,
        name_key: str = "name",
        hold: int = HOLD_CHARACTERS,
    ) -> None:
        self._names = names
        self._name_key = name_key
        self._step = hold or 1
        self._scanner = JsonScanner()
        self._is_bare = name is not None
        self._start = 0 if self._is_bare else -1  # of the arguments, once they are shown live
        self._key = ""
        self._num_taken = 0  # characters of the text
        self._decoded: str | None = None  # arguments that do not stand in the text as they are
        self._is_malformed = False
        self.name = name or ""
        self.is_shown = False

    @property
    def is_done(self) -> bool:
        """Whether the call was read to its end, and is one."""
        return self._scanner.is_done and not self._is_malformed

    @property
    def is_broken(self) -> bool:
        """Whether what was read is not a call."""
        return self._scanner.is_broken or self._is_malformed

    @property
    def text(self) -> str:
        """All that was read."""
        return self._scanner.text

    def feed(self, text: str) -> int:
        """Take the next characters; return how many were consumed, all unless the call has ended.

        Where a call is first shown depends on how much of it was read, not on how it was cut.
        """
        scanner, position = self._scanner, 0
        while position < len(text) and not self._has_ended:
            size = len(text) - position
            if not self.is_shown:
                size = min(size, self._step - len(scanner.text) % self._step)
            position += scanner.feed(text[position : position + size])
            if not self.is_shown:
                self._look()
        return position

    def take_arguments(self) -> str:
        """The part of the arguments that has become known since the last time."""
        if not self.is_shown:
            return ""
        if self._decoded is not None:
            return self._decoded  # once: the call is whole
        scanner = self._scanner
        begin = max(self._num_taken, self._start)
        end: int | None = len(scanner.text)
        if not self._is_bare:
            end = scanner.members[self._key][1]
        self._num_taken = len(scanner.text) if end is None else end
        return scanner.text[begin : self._num_taken]

    @property
    def _has_ended(self) -> bool:
        return self._scanner.is_done or self._scanner.is_broken

    def _look(self) -> None:
        """See whether the call may be shown now."""
        scanner = self._scanner
        if scanner.is_done:
            self._read_whole()
        elif not scanner.is_broken and len(scanner.text) % self._step == 0:
            self._show_early()

    def _show_early(self) -> None:
        """Show a call that is not whole yet, if its name is there and its arguments begin."""
        if self._is_bare:
            self._start = num_leading = len(self.text) - len(self.text.lstrip())
            self.is_shown = num_leading < len(self.text)
            return
        name, key = self._read_name(), self._arguments_key()
        if name is None or key is None:
            return
        start = self._scanner.members[key][0]
        if self.text[start] == "{":
            self.name, self._key, self._start, self.is_shown = name, key, start, True

    def _read_whole(self) -> None:
        if self._is_bare:
            self._show_early()
            return
        name = self._read_name()
        key = self._arguments_key()
        if name is None:
            self._is_malformed = True
            return
        self.name = name
        if key is None:
            self._decoded = "{}"
        elif self.text[self._scanner.members[key][0]] == "{":
            self._key, self._start = key, self._scanner.members[key][0]
        else:
            self._decoded = self._decode(key)
            self._is_malformed = self._decoded is None
        self.is_shown = not self._is_malformed

    def _read_name(self) -> str | None:
        span = self._scanner.members.get(self._name_key)
        if span is None or span[1] is None or self.text[span[0]] != '"':
            return None
        name: str = json.loads(self.text[span[0] : span[1]])
        return name if name in self._names else None

    def _arguments_key(self) -> str | None:
        return next((key for key in _ARGUMENTS if key in self._scanner.members), None)

    def _decode(self, key: str) -> str | None:
        """Arguments that are null, or an object written as a string."""
        start, end = self._scanner.members[key]
        raw = self.text[start:end]
        if raw == "null":
            return "{}"
        if raw[0] != '"':
            return None
        inner = json.loads(raw)
        scanner = JsonScanner()
        num_consumed = scanner.feed(inner)
        return inner if scanner.is_done and not inner[num_consumed:].strip() else None
