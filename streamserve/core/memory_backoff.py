"""A limit on what a step holds: halved when memory runs out, doubled while all goes well."""

from __future__ import annotations

GOOD_STEPS_TO_DOUBLE = 32


class MemoryBackoff:
    """``limit`` is ``most``, and less while memory for so much is not to be had."""

    __slots__ = ("_most", "_num_good_steps", "limit")

    def __init__(self, most: int) -> None:
        self.limit = most
        self._most = most
        self._num_good_steps = 0  # with this limit

    @property
    def is_reduced(self) -> bool:
        """Whether memory ran out and all is not allowed again."""
        return self.limit < self._most

    def halve(self, num_used: int) -> bool:
        """A step with so much found no memory: allow half of that. ``False``: it had no two."""
        if num_used < 2:
            return False
        self.limit = min(self.limit, num_used // 2)
        self._num_good_steps = 0
        return True

    def went_well(self) -> None:
        """A step has retired while the limit ``is_reduced``: after many of them it is doubled."""
        self._num_good_steps += 1
        if self._num_good_steps == GOOD_STEPS_TO_DOUBLE:
            self._num_good_steps = 0
            self.limit = min(2 * self.limit, self._most)
