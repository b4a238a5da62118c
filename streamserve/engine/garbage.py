"""Keeping the garbage collector off the token path."""

from __future__ import annotations

import gc

_YOUNG_THRESHOLD = 50_000
"""Allocations between two young collections: a step of 64 streams makes a few hundred."""


def freeze_gc() -> None:
    """Call once, after warm-up: what lives now is never looked at again.

    Collections of what is young become rare; whatever they leave is collected when the engine
    is idle.
    """
    gc.collect()
    gc.freeze()
    _, middle, old = gc.get_threshold()
    gc.set_threshold(_YOUNG_THRESHOLD, middle, old)


def collect_idle() -> None:
    """Collect everything that is not frozen. The engine calls it when it has been idle a while."""
    gc.collect()
