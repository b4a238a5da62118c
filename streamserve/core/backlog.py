"""How soon a place in the queue is expected: what a refused request is told."""

from __future__ import annotations

SMOOTHING = 0.1  # weight of the newest interval


class Backlog:
    """Smoothed seconds between two admissions while requests wait.

    ``seconds_per_admission`` is a guess until there was one.
    """

    def __init__(self, seconds_per_admission: float = 1.0) -> None:
        self.seconds_per_admission = seconds_per_admission
        self._is_measured = False
        self._last_admission_s: float | None = None

    def admitted(self, now: float, num_waiting: int) -> None:
        """A request left the queue for its first seat; ``num_waiting`` stayed behind."""
        if self._last_admission_s is not None:
            interval = now - self._last_admission_s
            self.seconds_per_admission += SMOOTHING * (interval - self.seconds_per_admission)
            self._is_measured = True
        # The time in which nobody waits says nothing about how fast the queue moves.
        self._last_admission_s = now if num_waiting else None

    def wait_s(self, place: int) -> float:
        """Until a request that ``place`` others are before has its seat; 0 if nobody knows."""
        return (place + 1) * self.seconds_per_admission if self._is_measured else 0.0

    def seconds_for(self, num_waiting: int, num_tokens: int, num_leaving: int) -> float:
        """Until so many of the tokens that wait have left the queue, or all that wait."""
        share = min(num_leaving / max(num_tokens, 1), 1.0)
        return self.seconds_per_admission * max(share * num_waiting, 1.0)
