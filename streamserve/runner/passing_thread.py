"""Where parallel work is done that is not a step: on a thread that ends with it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import TypeVar

_T = TypeVar("_T")


def on_passing_thread(work: Callable[[], _T]) -> _T:
    """Call ``work`` on a thread that ends before this returns; raises what it raises.

    libgomp keeps a pool of workers for each thread that has opened a parallel region. When all
    pools together have more threads than there are cores, every barrier sleeps instead of spinning,
    which doubles a decode step of a small model. Only the device thread may keep one, and a thread
    that ends takes its pool with it. An interrupt does not wait for the thread.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="streamserve-passing")
    try:
        result = executor.submit(work).result()
    except BaseException:
        executor.shutdown(wait=False)
        raise
    executor.shutdown()
    return result


def in_background(work: Callable[[], object]) -> None:
    """Call ``work`` on a thread that ends with it, and wait for it nowhere, not even at exit."""
    Thread(target=work, name="streamserve-background", daemon=True).start()
