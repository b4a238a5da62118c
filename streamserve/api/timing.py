"""What a request is told about its own latency, if it asks: ``include_timing``.

::

    arrival      first step       first token ready     its frame is out                 last frame
       |<- queue ->|<---- prefill ---->|                     |<- inter-token gaps … ->|
       |<----------------- first_token --------------------->|
       |<---------------------------------- total ----------------------------------->|
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from streamserve.api.metrics import Delivery, Metrics
from streamserve.core.clock import Clock
from streamserve.engine.outputs import Usage
from streamserve.engine.stream import RequestStream


class TokenTimes:
    """When the pieces of one choice's text came."""

    def __init__(self, clock: Clock, arrival: float) -> None:
        self._clock = clock
        self._arrival = arrival
        self._times = array("d")

    def stamp(self) -> None:
        """A piece of text is there, or out."""
        self._times.append(self._clock())

    def content(self, stream: RequestStream, usage: Usage) -> dict[str, Any]:
        """The ``timing`` object, in milliseconds; ``null`` for what did not happen."""
        times, timings, arrival = self._times, stream.timings, self._arrival
        gaps = sorted(later - earlier for earlier, later in pairwise(times))
        return {
            "queue_ms": _ms(arrival, timings.first_scheduled),
            "prefill_ms": _ms(timings.first_scheduled, timings.first_token),
            "first_token_ms": _ms(arrival, times[0] if times else None),
            "inter_token_p50_ms": _percentile(gaps, 0.50),
            "inter_token_p99_ms": _percentile(gaps, 0.99),
            "total_ms": _ms(arrival, self._clock()),
            "cached_tokens": usage.cached_tokens,
        }


class TimedDelivery(Delivery):
    """A delivery that also remembers when its frames left."""

    __slots__ = ("times",)

    def __init__(self, metrics: Metrics, clock: Clock, arrival: float) -> None:
        super().__init__(metrics, clock, arrival)
        self.times = TokenTimes(clock, arrival)

    def text_sent(self) -> None:
        super().text_sent()
        self.times.stamp()


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else _rounded(end - start)


def _percentile(sorted_gaps: Sequence[float], share: float) -> float | None:
    """The nearest rank."""
    if not sorted_gaps:
        return None
    return _rounded(sorted_gaps[math.ceil(share * len(sorted_gaps)) - 1])


def _rounded(seconds: float) -> float:
    return round(seconds * 1e3, 3)
