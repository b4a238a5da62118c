"""Counts by upper bound, without locks: the event loop is its only user."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Counts:
    """How many values fell below each of ``bounds``, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value; a bound belongs to its own bucket (Prometheus's ``le``)."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self.counts)
