"""What requests ask of time while they are queued and served."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count

from streamserve.core.request import RequestStatus
from streamserve.engine.live import Live
from streamserve.errors import DeadlineExceededError

_MIN_COMPACTED = 64


class Deadlines:
    """The times at which requests are looked at, soonest first. False while there are none."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, str, Live]] = []
        self._order = count()
        self._num_compacted = 0  # entries when those of ended requests were last dropped

    def __bool__(self) -> bool:
        return bool(self._due)

    def add(self, live: Live) -> None:
        """A request with limits was queued."""
        request = live.request
        limits = request.time_limits
        assert limits is not None
        self._compact()
        for name, limit_s in limits.by_field():
            if limit_s is not None:
                due = request.arrival_time + limit_s
                heappush(self._due, (due, next(self._order), name, live))

    def seconds_left(self, now: float) -> float:
        """Until the next is due; there must be one."""
        return max(self._due[0][0] - now, 0.0)

    def missed(self, now: float) -> list[tuple[Live, DeadlineExceededError]]:
        """The requests that have not kept a limit, each once and with what it is told."""
        found: dict[Live, DeadlineExceededError] = {}
        while self._due and self._due[0][0] <= now:
            _, _, name, live = heappop(self._due)
            if not live.stream.has_ended and _is_missed(name, live):
                found.setdefault(live, DeadlineExceededError(name, _milliseconds(name, live)))
        return list(found.items())

    def _compact(self) -> None:
        """Drop what belongs to requests that have ended, when there may be as many of them."""
        if len(self._due) > 2 * max(self._num_compacted, _MIN_COMPACTED):
            self._due = [entry for entry in self._due if not entry[3].stream.has_ended]
            heapify(self._due)
            self._num_compacted = len(self._due)


def _is_missed(name: str, live: Live) -> bool:
    if name == "max_queue_ms":
        request = live.request
        return request.status is RequestStatus.WAITING
    return name == "deadline_ms" or live.stream.timings.first_token is None


def _milliseconds(name: str, live: Live) -> float:
    limits = live.request.time_limits
    assert limits is not None
    return 1e3 * (dict(limits.by_field())[name] or 0.0)
