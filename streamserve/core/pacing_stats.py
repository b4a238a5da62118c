"""What the pacing of steps can show of itself: counts for whoever exports them."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamserve.core.histogram import Counts

# fmt: off
_SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3,
    0.5, 1.0, 2.5,
)
_RATIOS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0)
_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# fmt: on


@dataclass(slots=True)
class PacingStats:
    """Counted for every step that was measured; the last two are of the last one with decodes."""

    step_time: Counts = field(default_factory=lambda: Counts(_SECONDS))
    step_time_ratio: Counts = field(default_factory=lambda: Counts(_RATIOS))  # actual / predicted
    chunk_tokens: Counts = field(default_factory=lambda: Counts(_TOKENS))  # where there were any
    itl_target_s: float = 0.0
    error: float = 0.0  # the share that was taken off the target
