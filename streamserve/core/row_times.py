"""How long the rows of a step take: a table that never falls, linear between its entries."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

_LEARNING_RATE = 0.05


class RowTimes:
    """A monotone piecewise-linear table from rows to seconds."""

    def __init__(self, samples: Iterable[tuple[int, float]]) -> None:
        """``samples``: at least one ``(rows, seconds)``; of equal rows the fastest counts."""
        fastest: dict[int, float] = {}
        for rows, seconds in samples:
            fastest[rows] = min(seconds, fastest.get(rows, seconds))
        measured = sorted(fastest.items())
        self._rows = [rows for rows, _ in measured]
        self._seconds = _isotonic([seconds for _, seconds in measured])
        self._refine()
        # As observed. Pushing neighbours into order for good would turn noise into a slope.
        self._raw = list(self._seconds)

    def _refine(self) -> None:
        """Add entries at powers of two between what was measured, for observations to move."""
        rows = 1
        while rows < self._rows[-1]:
            if rows not in self._rows:
                seconds = self(rows)
                place = bisect_right(self._rows, rows)
                self._rows.insert(place, rows)
                self._seconds.insert(place, seconds)
            rows *= 2

    def __call__(self, rows: int) -> float:
        """Seconds of ``rows``: level before the first entry, on its last slope behind the last."""
        left, share = self._place(rows)
        seconds = self._seconds
        if not share:
            return seconds[left]
        return seconds[left] + share * (seconds[left + 1] - seconds[left])

    @property
    def slope(self) -> float:
        """Seconds of one row more, on average over the table."""
        num_rows = self._rows[-1] - self._rows[0]
        return (self._seconds[-1] - self._seconds[0]) / num_rows if num_rows else 0.0

    def observe(self, rows: int, innovation: float) -> None:
        """Learn that ``rows`` took ``innovation`` seconds more; slowly, and staying monotone."""
        left, share = self._place(rows)
        share = min(share, 1.0)
        step = _LEARNING_RATE * innovation / ((1.0 - share) ** 2 + share**2)
        raw = self._raw
        raw[left] = max(raw[left] + (1.0 - share) * step, 1e-9)
        if share:
            raw[left + 1] = max(raw[left + 1] + share * step, 1e-9)
        self._seconds = _isotonic(raw)

    def _place(self, rows: int) -> tuple[int, float]:
        table = self._rows
        if rows <= table[0] or len(table) == 1:
            return 0, 0.0
        left = min(bisect_right(table, rows), len(table) - 1) - 1
        return left, (rows - table[left]) / (table[left + 1] - table[left])


def _isotonic(values: list[float]) -> list[float]:
    """The nearest sequence that never falls: neighbours out of order are pooled."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean = (mean * count + other * others) / (count + others)
            count += others
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]
