"""When conversations arrive: seconds from a group's start, the same for the same seed."""

from __future__ import annotations

import math
import random

from streamserve_loadtest.workloads import OpenLoop

ARRIVALS = ("poisson", "burst", "uniform")


def arrival_times(load: OpenLoop, rng: random.Random) -> list[float]:
    """All arrivals within ``duration_s``, ascending.

    A Poisson process at another rate has the same draws on another scale, so that a curve over
    rates compares like with like. Raises ``ValueError`` for a process that nobody knows.
    """
    if load.arrivals not in ARRIVALS:
        raise ValueError(f"arrivals must be one of {', '.join(ARRIVALS)}, got {load.arrivals!r}")
    if load.rate <= 0:
        raise ValueError(f"a rate must be above 0, got {load.rate:g}")
    if load.arrivals == "poisson":
        return _poisson(load, rng)
    size = load.burst_size if load.arrivals == "burst" else 1
    # Ulps must not decide whether an arrival at the very end still counts.
    count = math.ceil(load.duration_s * load.rate / size - 1e-9)
    return [index * size / load.rate for index in range(count) for _ in range(size)]


def _poisson(load: OpenLoop, rng: random.Random) -> list[float]:
    times = []
    now = rng.expovariate(1.0) / load.rate
    while now < load.duration_s:
        times.append(now)
        now += rng.expovariate(1.0) / load.rate
    return times
