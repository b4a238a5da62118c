"""What an answer has said so far, with the number of output tokens that each part ends at."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from streamserve.engine.parsers.events import CallStart, Event

_PART_BYTES = 200
"""What a part keeps beside its text, about."""


class ReplayLog:
    """Parts in order, each known by the number of tokens up to which the text is out then.

    ``first`` is the position before the oldest part that is still there, ``last`` behind the
    newest. Never dropped by itself: ``drop`` is told what may go.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._positions: list[int] = []
        self._parts: list[Sequence[Event]] = []
        self._num_bytes = 0
        self.first = 0
        self.last = 0

    @property
    def is_full(self) -> bool:
        """Whether no more should be added before something is dropped."""
        return self._num_bytes > self._max_bytes

    @property
    def num_bytes(self) -> int:
        """About what it keeps."""
        return self._num_bytes

    def add(self, num_tokens: int, events: Sequence[Event]) -> None:
        """Append what was said between ``last`` and ``num_tokens``."""
        assert num_tokens >= self.last
        if not events:
            return
        self.last = num_tokens
        self._num_bytes += _size_of(events)
        if self._positions and self._positions[-1] == num_tokens:  # the end brings no token
            self._parts[-1] = [*self._parts[-1], *events]
            return
        self._positions.append(num_tokens)
        self._parts.append(events)

    def after(self, position: int, max_bytes: int) -> tuple[list[Event], int]:
        """The next parts behind ``position``, about ``max_bytes`` of them, and where they end."""
        index = bisect_right(self._positions, position)
        events: list[Event] = []
        num_bytes = 0
        while index < len(self._positions) and num_bytes < max_bytes:
            events += self._parts[index]
            num_bytes += _size_of(self._parts[index]) - _PART_BYTES
            position = self._positions[index]
            index += 1
        return events, position

    def drop(self, position: int) -> None:
        """While it is full, forget the oldest parts that end at ``position`` or before."""
        count = 0
        while self.is_full and count < len(self._parts) and self._positions[count] <= position:
            self._num_bytes -= _size_of(self._parts[count])
            self.first = self._positions[count]
            count += 1
        del self._positions[:count], self._parts[:count]


def _size_of(events: Sequence[Event]) -> int:
    size = _PART_BYTES
    for event in events:
        text = event.name if isinstance(event, CallStart) else event.text
        size += len(text) if text.isascii() else 4 * len(text)
    return size
