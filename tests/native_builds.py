"""The native library as another CPU would load it: one build of those that this CPU can run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from streamserve_kernels.native import execute, library

_RUNNABLE = library.runnable_builds()


@contextmanager
def native_build(build: str | None) -> Iterator[None]:
    """The CPU has what this build needs and no more; of None, what it has.

    What was recorded before stays as it is. Raises ValueError for a build that is unknown or that
    this CPU cannot run. Within another it counts alone.
    """
    if build is None:
        yield
        return
    if build not in _RUNNABLE:
        raise ValueError(f"{build!r} is none of {', '.join(_RUNNABLE)}")
    with patch.object(library, "_cpu_flags", lambda: library.BUILDS[build]):
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    library.load_library.cache_clear()
    execute.eager.cache_clear()
