"""An event loop on a thread of its own, for callers that have none, or one that they block."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from streamserve.llm.outputs import cut_off

_T = TypeVar("_T")


class _End:
    """The last thing in a queue: the work has ended, and how."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class LoopThread:
    """Runs coroutines for other threads. The thread ends with ``close``, or with the process.

    A fork of the process has no such thread: see ``is_here``.
    """

    def __init__(self, name: str) -> None:
        self.process_id = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on this very thread."""
        return threading.current_thread() is self._thread

    @property
    def is_here(self) -> bool:
        """Whether the thread is one of this process."""
        return os.getpid() == self.process_id

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Its result, waited for. An interrupt of the caller leaves it running."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def iterate(
        self, work: Callable[[Callable[[_T], None]], Coroutine[Any, Any, None]]
    ) -> Generator[_T]:
        """Yield what ``work(put)`` puts, as it comes; raise what it raises.

        Closing the iterator, and an interrupt of the thread that waits in it, cancel the work and
        wait until it has let go of what it holds. Raises ``EngineError`` if the loop is closed
        meanwhile.
        """
        queue: SimpleQueue[_T | _End] = SimpleQueue()
        task: asyncio.Task[None] | None = None

        def begin() -> None:
            nonlocal task
            task = self._loop.create_task(work(queue.put))
            task.add_done_callback(
                lambda t: queue.put(_End(cut_off() if t.cancelled() else t.exception()))
            )

        def cancel() -> None:
            if task is not None:
                task.cancel()

        self._loop.call_soon_threadsafe(begin)
        has_ended = False
        try:
            while True:
                item = queue.get()
                if isinstance(item, _End):
                    has_ended = True
                    if item.error is not None:
                        raise item.error
                    return
                yield item
        finally:
            if not has_ended:
                with suppress(RuntimeError):  # the loop is closed, and the work has ended with it
                    self._loop.call_soon_threadsafe(cancel)
                while not isinstance(queue.get(), _End):
                    pass

    def close(self) -> None:
        """Ends the loop, what still runs on it, and the thread. Idempotent.

        Not from the thread itself.
        """
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
