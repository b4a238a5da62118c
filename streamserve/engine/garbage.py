"""Keeping the garbage collector off the token path."""

from __future__ import annotations

import gc

_THRESHOLDS = (1_000, 2, 24_000)
"""Nothing is looked at for longer than a millisecond: 1,000 young objects, and 3,000 that have
survived once. What has survived twice, the prefix cache most of all, takes a tenth of a second:
that is left to idle moments, and to one in 50 million allocations where there are none."""


def freeze_gc() -> None:
    """Call once, after warm-up: what lives now is never looked at again, the rest rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


def collect_idle() -> None:
    """Collect everything that is not frozen. The engine calls it when it has been idle a while."""
    gc.collect()
