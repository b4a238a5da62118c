"""glibc's allocator, told to keep what a step will ask for again."""

from __future__ import annotations

import ctypes

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Makes this process keep freed memory instead of handing it back between steps.

    By default a thread's own arena unmaps what a step frees, and the next step faults every page
    of its activations in again: thousands of faults, a millisecond or more. One arena, no
    trimming and no private mappings below a gigabyte end that, and with it the growth by
    fragmentation. It is a setting of the whole process and must come before the threads that it
    is for. False where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, _KEPT_BYTES),
        (_M_TRIM_THRESHOLD, _KEPT_BYTES),
    )
    accepted = [mallopt(name, value) for name, value in settings]
    return all(accepted)
