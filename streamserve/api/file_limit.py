"""How many connections the system lets this process have."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger(__name__)

_NUM_OTHER_FILES = 256
"""Weights, shared libraries, workers, the sockets that listen."""


def connections_allowed(wanted: int) -> int:
    """Raise the process's limit of open files as far as ``wanted`` needs; return what fits.

    Without this an accept would fail at the limit, which is 1,024 on many systems, and who is
    connected would suffer with who is not.
    """
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _NUM_OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = max(1, soft - _NUM_OTHER_FILES)
    logger.warning("%d connections at most: the limit of open files is %d", allowed, soft)
    return allowed
