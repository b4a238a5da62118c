"""What loading has freed, given back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _malloc_trim() -> Any:
    """glibc's; None for another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_freed_memory() -> None:
    """Has the C library return the pages that nobody uses, wherever in its heaps they are.

    By itself it keeps what was freed below a piece still in use, and a loader frees a matrix or two
    for each that it keeps: without this it ends with hundreds of megabytes that are nobody's.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
