"""Where parallel work is done that is not a step: on a thread that ends with it."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread
from typing import TypeVar

from streamserve.core.interruptible import Interruptible

_T = TypeVar("_T")


def on_passing_thread(work: Callable[[], _T]) -> _T:
    """Call ``work`` on a thread that ends before this returns; raises what it raises.

    libgomp keeps a pool of workers for each thread that has opened a parallel region. When all
    pools together have more threads than there are cores, every barrier sleeps instead of spinning,
    which doubles a decode step of a small model. Only the device thread may keep one, and a thread
    that ends takes its pool with it. An interrupt does not wait for the thread: what it does
    ends at its next bytecode, so that the end of the process need not wait for all of it either.
    """
    running = Interruptible(work)
    executor = ThreadPoolExecutor(1, thread_name_prefix="streamserve-passing")
    try:
        result = executor.submit(running).result()
    except BaseException:
        running.interrupt()
        executor.shutdown(wait=False)
        raise
    executor.shutdown()
    return result


def in_background(work: Callable[[Callable[[], bool]], object]) -> None:
    """Call ``work(is_exiting)`` on a thread that ends with it. Only the end of the process waits.

    By then ``is_exiting()`` is true and ``work`` had better return soon. A thread that is in C++ or
    Rust while the interpreter is taken down would be unwound through it, which aborts the process.
    """

    def run() -> None:
        try:
            work(_exiting.is_set)
        finally:
            _in_background.discard(thread)

    thread = Thread(target=run, name="streamserve-background", daemon=True)
    _in_background.add(thread)
    thread.start()


_exiting = Event()
_in_background: set[Thread] = set()


@atexit.register
def _wait_for_background() -> None:
    _exiting.set()
    for thread in list(_in_background):
        thread.join()
