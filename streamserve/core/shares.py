"""What one tenant has been served, and holds."""

from __future__ import annotations


class Account:
    """A tenant's virtual token counter and seats. `fairness` keeps the one, `seats` the others."""

    __slots__ = (
        "counter",
        "is_listed",
        "last_served",
        "name",
        "num_paused",
        "num_running",
        "num_waiting",
        "num_waiting_tokens",
        "rank",
        "weight",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.weight = 1.0
        self.counter = 0.0  # tokens that were served, over the weight
        self.last_served = 0.0  # in seconds, or when it came if that was later
        self.num_waiting = 0
        self.num_waiting_tokens = 0  # of prompts
        self.num_running = 0
        self.num_paused = 0
        self.rank = 0  # what its requests' keys begin with
        self.is_listed = False  # among those that are ranked

    @property
    def is_idle(self) -> bool:
        """Whether it has no requests."""
        return not (self.num_waiting or self.num_running or self.num_paused)

    def may_take_seat_of(self, other: Account) -> bool:
        """Whether one seat more here and one less there leaves ``other`` its share of the seats.

        The share is by weight, and at least one. It never holds both ways round, now or after the
        seat has changed hands: nobody takes back what was taken.
        """
        if not self.num_running:
            return other.num_running > 1
        mine, theirs = self.num_running + 1, other.num_running - 1
        return mine * other.weight <= theirs * self.weight
