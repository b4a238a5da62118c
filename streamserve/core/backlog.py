"""How soon a place in the queue is expected: what a refused request is told."""

from __future__ import annotations

SMOOTHING = 0.1  # weight of the newest interval


class Backlog:
    """Smoothed seconds between two admissions while requests wait."""

    def __init__(self, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        self._last_admission_s: float | None = None

    def admitted(self, now: float, num_waiting: int) -> None:
        """A request left the queue for its first seat; ``num_waiting`` stayed behind."""
        if self._last_admission_s is not None:
            interval = now - self._last_admission_s
            self.retry_after_s += SMOOTHING * (interval - self.retry_after_s)
        # The time in which nobody waits says nothing about how fast the queue moves.
        self._last_admission_s = now if num_waiting else None
