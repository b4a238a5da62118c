"""What a request asks of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class TimeLimits(NamedTuple):
    """Seconds from a request's arrival: to its seat, to its first token, and to its end."""

    queue_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None

    def by_field(self) -> Iterator[tuple[str, float | None]]:
        """Each with the name of its field in a request."""
        return zip(("max_queue_ms", "ttft_ms", "deadline_ms"), self, strict=True)
