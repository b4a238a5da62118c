"""Work on a thread that can be stopped while it runs Python code: a template that spins, say."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class InterruptedWorkError(BaseException):
    """Raised in the middle of the work. No ``Exception``, so that nobody there catches it."""


class Interruptible(Generic[_T]):
    """Calls ``work`` once, on whichever thread; any other thread may interrupt it."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._thread_id: int | None = None
        self._is_interrupted = False

    def __call__(self) -> _T:
        with self._lock:
            if self._is_interrupted:
                raise InterruptedWorkError
            self._thread_id = threading.get_ident()
        try:
            return self._work()
        finally:
            with self._lock:
                self._thread_id = None

    def interrupt(self) -> None:
        """End the work at its next bytecode; nothing if it has ended. Idempotent."""
        with self._lock:
            if self._thread_id is not None and not self._is_interrupted:
                thread_id = ctypes.c_ulong(self._thread_id)
                error = ctypes.py_object(InterruptedWorkError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, error)
            self._is_interrupted = True
