"""What the process's environment must say before torch is imported."""

from __future__ import annotations

import os


def prepare_environment() -> None:
    """Set what is not set yet; without effect once torch is there."""
    # How long a compute thread spins for its next region before it sleeps: about 0.2 ms. libgomp's
    # own default, some 10 ms, takes the core from the event loop and from every other process.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
