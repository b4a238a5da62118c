"""How soon a place in the queue is expected: what a refused request is told."""

from __future__ import annotations

from streamserve.core.clock import Clock

SMOOTHING = 0.1  # weight of the newest interval
GUESS_S = 1.0
"""Between two admissions, as far as none were measured."""


class Backlog:
    """Smoothed seconds between two admissions while requests wait.

    The interval that is going on counts once it is longer than what is expected: where nobody has
    been admitted for a minute, the rate of before says little.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sum_s = 0.0
        self._weight = 0.0  # of what was measured: the rest is a guess
        self._waiting_since = 0.0
        self._since: float | None = None  # the last admission, if there was one since then

    def queued(self, num_waiting: int) -> None:
        """A request is queued behind ``num_waiting``."""
        # The time in which nobody waits says nothing about how fast the queue moves.
        if not num_waiting:
            self._since, self._waiting_since = None, self._clock()

    def admitted(self) -> None:
        """A request left the queue for its first seat."""
        now = self._clock()
        if self._since is not None:
            self._sum_s, self._weight = self._with(now - self._since)
        self._since = now

    def wait_s(self, place: int) -> float:
        """Until a request that ``place`` others are before has its seat; 0 if nobody knows."""
        if not self._weight:
            return 0.0
        sum_s, weight = self._until_now()
        return (place + 1) * sum_s / weight

    def seconds_until(self, num_admitted: int) -> float:
        """Until so many have their seats, by a guess as far as nobody knows."""
        sum_s, weight = self._until_now()
        return num_admitted * (sum_s + (1.0 - weight) * GUESS_S)

    def seconds_for(self, num_waiting: int, num_tokens: int, num_leaving: int) -> float:
        """Until so many of the tokens that wait have left the queue, or all that wait."""
        share = min(num_leaving / max(num_tokens, 1), 1.0)
        return self.seconds_until(1) * max(share * num_waiting, 1.0)

    def _with(self, interval_s: float) -> tuple[float, float]:
        """What was measured, and its weight, with one interval more."""
        sum_s = self._sum_s + SMOOTHING * (interval_s - self._sum_s)
        return sum_s, self._weight + SMOOTHING * (1.0 - self._weight)

    def _until_now(self) -> tuple[float, float]:
        """As ``_with`` the interval that is going on, if that makes it longer. Somebody waits."""
        since = self._waiting_since if self._since is None else self._since
        interval_s = self._clock() - since
        if interval_s <= self._sum_s + (1.0 - self._weight) * GUESS_S:
            return self._sum_s, self._weight
        return self._with(interval_s)
