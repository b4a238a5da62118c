"""Marks that a family writes around the answer's text itself."""

from __future__ import annotations

from collections.abc import Sequence

from streamserve.engine.parsers.markers import may_become, num_undecided
from streamserve.engine.parsers.reasoning import ThoughtMarks

_MARKS = {
    "cohere": (
        ThoughtMarks("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        ThoughtMarks("<|START_TEXT|>", "<|END_TEXT|>"),
    )
}


def response_marks(reasoning_parser: str) -> tuple[ThoughtMarks, ...]:
    """What may stand around the text of an answer whose thoughts are written so."""
    return _MARKS.get(reasoning_parser, ())


class ResponseParser:
    """Takes the marks off one answer: one that it begins with, and the one that ends it then.

    ``is_open``: the text began in the prompt, and only its end may be there.
    """

    def __init__(self, marks: Sequence[ThoughtMarks], *, is_open: bool = False) -> None:
        self._marks = marks
        self._buffer = ""
        self._is_at_start = True
        self._ends = tuple(mark.end for mark in marks) if is_open else ()  # that may come

    def feed(self, text: str) -> str:
        """Take the next text; return what has become certain."""
        self._buffer += text
        return self._take(is_final=False)

    def finish(self) -> str:
        """The text has ended; return what was held back."""
        return self._take(is_final=True)

    def _take(self, *, is_final: bool) -> str:
        if self._is_at_start:
            text = self._buffer.lstrip()
            if not is_final and any(may_become(text, mark.start) for mark in self._marks):
                return ""
            self._is_at_start = False
            for mark in self._marks:
                if text.startswith(mark.start):
                    self._buffer = text.removeprefix(mark.start)
                    self._ends = (mark.end,)
        buffer, self._buffer = self._buffer, ""
        found = [(at, mark) for mark in self._ends if (at := buffer.find(mark)) >= 0]
        if found:
            end, mark_end = min(found)
            self._ends = ()
            return buffer[:end] + buffer[end + len(mark_end) :]
        if not is_final:
            size = len(buffer) - max((num_undecided(buffer, end) for end in self._ends), default=0)
            buffer, self._buffer = buffer[:size], buffer[size:]
        return buffer
