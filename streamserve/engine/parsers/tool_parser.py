"""What the parsers of tool calls share: a buffer, a state, and the way back to text."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from streamserve.engine.parsers.call_reader import HOLD_CHARACTERS, CallReader
from streamserve.engine.parsers.events import CallArguments, CallStart, Content, Event, joined
from streamserve.engine.parsers.markers import may_become, num_leading_spaces, num_undecided


class Reader(Protocol):
    """What reads one call: a `CallReader`, or the like."""

    name: str
    is_shown: bool

    @property
    def is_done(self) -> bool: ...
    @property
    def is_broken(self) -> bool: ...
    @property
    def text(self) -> str: ...

    def feed(self, text: str) -> int:
        """Take the next characters; return how many were consumed."""

    def take_arguments(self) -> str:
        """The part of the arguments that has become known since the last time."""


class ToolParser(ABC):
    """Finds the calls in one answer. One object for each choice.

    A subclass is a set of states, methods that consume the front of ``_buffer``, which is not
    empty, and return whether to go on: ``False`` means that more text is needed. At the end of the
    text, when ``_is_final`` is set, none may wait. What is consumed on the way to a call stands in
    ``_raw``: it is text again if no call comes of it.

    White space between calls, and between a call and the end, is not content.
    """

    markers: ClassVar[tuple[str, ...]] = ()
    """What the model writes around calls. Where these are special tokens, they must not be left out
    of the text."""

    def __init__(
        self, tools: Mapping[str, Any], *, max_calls: int | None = None, is_certain: bool = False
    ) -> None:
        """``tools`` have a JSON Schema each; what comes behind ``max_calls`` calls is dropped.

        ``is_certain``: a grammar makes the calls, so they are shown as soon as they can be.
        """
        self._tools = tools
        self._is_certain = is_certain
        self._hold = 0 if is_certain else HOLD_CHARACTERS
        self._max_calls = max_calls
        self._buffer = ""
        self._raw = ""
        self._spaces = ""  # said where a call may precede and follow
        self._is_at_edge = True
        self._events: list[Event] = []
        self._is_final = False
        self._reader: Reader | None = None
        self._state: Callable[[], bool] = self._begin
        self.num_calls = 0
        self.is_over = False  # the last call that counts was read: what follows is dropped

    @staticmethod
    def make_id() -> str:
        """An id in OpenAI's form, unlike any other."""
        return f"call_{secrets.token_hex(12)}"

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what has become certain."""
        self._buffer += text
        return self._run()

    def finish(self) -> list[Event]:
        """The text has ended; return what was held back."""
        self._is_final = True
        events = self._run()
        if self._reader is not None:
            if not self._reader.is_shown:
                self._raw += self._reader.text + self._buffer
            self._buffer = ""  # undecided: the beginning of a tag
        self._say_raw()
        if not self.num_calls:
            self._events.append(Content(self._spaces))
        return joined(events + self._run())

    @abstractmethod
    def _begin(self) -> bool:
        """The state before the first character."""

    @abstractmethod
    def _in_text(self) -> bool:
        """The state in which text is said."""

    @abstractmethod
    def _after_call(self) -> bool:
        """The state behind a call that was read to its end."""

    def _run(self) -> list[Event]:
        while self._buffer and self._state():
            pass
        events, self._events = joined(self._events), []
        return events

    def _say_until(self, ways: Mapping[str, Callable[[], bool]]) -> bool:
        """Say text up to the first of the markers, which goes to ``_raw``: its state is next."""
        buffer = self._buffer
        found = [(start, marker) for marker in ways if (start := buffer.find(marker)) >= 0]
        if found:
            start, marker = min(found)
            self._say(buffer[:start])
            self._buffer = buffer[start:]
            self._consume(len(marker))
            self._state = ways[marker]
            return True
        end = len(buffer)
        if not self._is_final:
            end -= max(num_undecided(buffer, marker) for marker in ways)
        self._say(buffer[:end])
        self._buffer = buffer[end:]
        return False

    def _say_rest(self) -> bool:
        """Say all there is: no call can come."""
        text, self._buffer = self._buffer, ""
        self._say(text)
        return False

    def _at_text(self) -> bool:
        """Whether there is more than white space, which goes to ``_raw``."""
        self._consume(num_leading_spaces(self._buffer))
        return bool(self._buffer)

    def _may_become(self, marker: str) -> bool:
        """Whether it takes more text to know if ``marker`` comes next."""
        return not self._is_final and may_become(self._buffer, marker)

    def _consume(self, size: int) -> str:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        self._raw += taken
        return taken

    def _read_call(self, name: str | None = None) -> bool:
        """Read a call from here. Then comes ``_after_call``, or text if it is none."""
        return self._read_with(CallReader(self._tools, name=name, hold=self._hold))

    def _read_with(self, reader: Reader) -> bool:
        self._reader = reader
        self._state = self._in_call
        return True

    def _after_item(self) -> bool:
        """The state behind a call of an array."""
        if not self._at_text():
            return False
        if self._buffer[0] == ",":
            self._consume(1)
            return self._read_call()
        if self._buffer[0] == "]":
            self._consume(1)
            self._raw = ""
        return self._fail()

    def _in_call(self) -> bool:
        reader = self._reader
        assert reader is not None
        was_shown = reader.is_shown
        size = reader.feed(self._buffer)
        self._buffer = self._buffer[size:]
        if reader.is_shown:
            if not was_shown:
                self._show(reader.name)
            self._events.append(CallArguments(self.num_calls - 1, reader.take_arguments()))
        if reader.is_done:
            self._reader = None
            is_last = self._max_calls is not None and self.num_calls >= self._max_calls
            self._state = self._drop if is_last else self._after_call
            self.is_over = is_last
        elif reader.is_broken:
            self._reader = None
            if not reader.is_shown:
                self._raw += reader.text
            return self._fail()
        return size > 0

    def _show(self, name: str) -> None:
        self._events.append(CallStart(self.num_calls, self.make_id(), name))
        self.num_calls += 1
        self._raw = self._spaces = ""
        self._is_at_edge = True

    def _fail(self) -> bool:
        """What was read is no call: it is text, and what follows is looked at as text."""
        self._say_raw()
        self._state = self._in_text
        return True

    def _drop(self) -> bool:
        self._buffer = ""
        return False

    def _say_raw(self) -> None:
        text, self._raw = self._raw, ""
        self._say(text)

    def _say(self, text: str) -> None:
        if self._is_at_edge:
            text = self._spaces + text
            if not text.strip():
                self._spaces = text
                return
            self._spaces, self._is_at_edge = "", False
        self._events.append(Content(text))


class MarkedParser(ToolParser):
    """Text, then ``section_open``, and calls that ``call_open`` begins; then ``section_close``.

    A call without a section, as behind a malformed one, is read too, unless a grammar makes them.
    """

    section_open: ClassVar[str]
    section_close: ClassVar[str]
    call_open: ClassVar[str]

    @abstractmethod
    def _in_header(self) -> bool:
        """The state behind ``call_open``."""

    def _begin(self) -> bool:
        return self._in_text()

    def _in_text(self) -> bool:
        ways = {self.section_open: self._before_call}
        if self.call_open and not self._is_certain:
            ways[self.call_open] = self._in_header
        return self._say_until(ways)

    def _before_call(self) -> bool:
        if not self._at_text() or self._may_become(self.call_open):
            return False
        if not self._buffer.startswith(self.call_open):
            return self._fail()
        self._consume(len(self.call_open))
        self._state = self._in_header
        return True
