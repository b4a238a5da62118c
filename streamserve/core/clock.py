"""Time enters everywhere through one injected clock."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Returns seconds that never go backwards; the origin is arbitrary."""

monotonic: Clock = time.perf_counter
