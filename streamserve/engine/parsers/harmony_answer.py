"""One answer in Harmony: its messages as thoughts, content and calls, in the order they come."""

from __future__ import annotations

from collections.abc import Callable, Collection

from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.parsers.call_reader import HOLD_CHARACTERS, CallReader
from streamserve.engine.parsers.events import (
    CallArguments,
    CallStart,
    Content,
    Event,
    Reasoning,
    joined,
)
from streamserve.engine.parsers.harmony import (
    HarmonyScanner,
    HarmonyTokens,
    Message,
    Segment,
    called_function,
)
from streamserve.engine.parsers.tool_parser import ToolParser

_GAP = "\n\n"
"""Between what two messages say, or think."""


class HarmonyParser(AnswerParser):
    """As `AnswerParser`. A message to a function that is not one of ``names`` is content."""

    def __init__(
        self,
        opened: str,
        names: Collection[str],
        token_bytes: Callable[[int], bytes],
        *,
        max_calls: int | None = None,
        is_certain: bool = False,
        include_reasoning: bool = True,
    ) -> None:
        """``opened`` is `opened_by` of the prompt; the others are as a `ToolParser` takes them."""
        super().__init__(
            tokens=HarmonyTokens(opened, token_bytes), include_reasoning=include_reasoning
        )
        self.has_reasoning = True
        self._scanner = HarmonyScanner(opened)
        self._names = names
        self._max_calls = max_calls
        self._hold = 0 if is_certain else HOLD_CHARACTERS
        self._num_calls = 0
        self._is_over = False
        self._said: set[type[Event]] = set()
        self._events: list[Event] = []
        # Of the message that is being read:
        self._message: Message | None = None
        self._is_first = True  # nothing of it was said
        self._reader: CallReader | None = None  # as long as it may be a call
        self._is_shown = False
        self._is_behind_call = False

    @property
    def num_calls(self) -> int:
        return self._num_calls

    @property
    def is_over(self) -> bool:
        return self._is_over

    def feed(self, text: str) -> list[Event]:
        return self._read(self._scanner.feed(text))

    def finish(self) -> list[Event]:
        events = self._read(self._scanner.finish())
        self._end_message()
        return joined([*events, *self._taken()])

    def _read(self, segments: list[Segment]) -> list[Event]:
        for segment in segments:
            if self.is_over:
                break
            if segment.message is not self._message:
                self._end_message()
                self._begin_message(segment.message)
            if segment.message is not None:
                self._add(segment.message, segment.text)
        return joined(self._taken())

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _begin_message(self, message: Message | None) -> None:
        self._message = message
        self._is_first = True
        self._is_behind_call = False
        name = None if message is None else called_function(message, self._names)
        if name is not None:
            self._reader = CallReader(self._names, name=name, hold=self._hold)
            self._is_shown = False

    def _end_message(self) -> None:
        """What no call came of is content; nothing at all stands for no arguments."""
        reader, self._reader = self._reader, None
        if reader is None or reader.is_shown:
            return
        if reader.text.strip():
            self._say(Content, reader.text)
        else:
            reader.feed("{}")
            self._show(reader)

    def _add(self, message: Message, text: str) -> None:
        reader = self._reader
        if reader is None:
            self._say(Reasoning if message.is_thought else Content, text)
            return
        rest = text[reader.feed(text) :]
        if reader.is_shown:
            self._show(reader)
        if reader.is_done:
            self._reader, self._is_behind_call = None, True
        elif reader.is_broken:
            self._reader = None
            rest = rest if reader.is_shown else reader.text + rest
        if rest and not self.is_over:
            self._say(Content, rest)

    def _show(self, reader: CallReader) -> None:
        if not self._is_shown:
            self._is_shown = True
            self._events.append(CallStart(self._num_calls, ToolParser.make_id(), reader.name))
            self._num_calls += 1
        self._events.append(CallArguments(self._num_calls - 1, reader.take_arguments()))
        if reader.is_done and self._num_calls == self._max_calls:
            self._is_over = True

    def _say(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        if self._is_first:
            if self._is_behind_call:
                text = text.lstrip()
            if not text:
                return
            self._is_first = False
            if kind in self._said:
                text = _GAP + text
            self._said.add(kind)
        if kind is Content or self._include_reasoning:
            self._events.append(kind(text))
