"""What readers of calls share whose arguments are not JSON: states, and the JSON made so far."""

from __future__ import annotations

from collections.abc import Callable

from streamserve.engine.parsers.call_reader import HOLD_CHARACTERS


class StateReader:
    """Reads arguments up to the end of their call; used as a `CallReader` is.

    A subclass is a set of states: methods that take what has not been consumed, which is not empty,
    and return how much of it they consume. Of what is not decided yet that is nothing, and it comes
    again with more. They add JSON to ``_new``.

    ``hold``: so many characters are read before a call that has not ended is shown.
    """

    _state: Callable[[str], int]

    def __init__(self, name: str, *, hold: int = HOLD_CHARACTERS) -> None:
        self._hold = hold
        self._new = "{"  # arguments that have not been taken
        self.name = name
        self.text = ""
        self.is_shown = False
        self.is_done = False
        self.is_broken = False

    def feed(self, text: str) -> int:
        """Take the next characters; return how many were consumed."""
        self.is_shown = self.is_shown or not self._hold
        position = 0
        while position < len(text) and not (self.is_done or self.is_broken):
            size = self._state(text[position:])
            if not size:
                break
            self.text += text[position : position + size]
            position += size
            self.is_shown = self.is_shown or self.is_done or len(self.text) >= self._hold
        return position

    def take_arguments(self) -> str:
        """The part of the arguments that has become known since the last time."""
        if not self.is_shown:
            return ""
        new, self._new = self._new, ""
        return new

    def _break(self) -> int:
        self.is_broken = True
        return 0
