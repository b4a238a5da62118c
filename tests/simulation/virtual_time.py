"""An event loop whose time is a number, and tasks whose awaits can be counted and cut.

Nothing here waits: when nobody is ready, time jumps to when somebody is. When nobody ever will be,
`StandstillError` is raised, so a reader who is forgotten is found at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any


class StandstillError(Exception):
    """Everybody waits for somebody else."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without sockets, threads or signals. ``time`` starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._selector = self

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """What ``BaseEventLoop`` asks before each round: how long it may sleep."""
        if timeout is None:
            raise StandstillError("everybody waits for somebody else")
        self._now += timeout
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """There is no other thread that this one would have to be woken for."""


class AwaitPoints:
    """Counts every suspension of every task; at the ``cut_at``-th calls ``cut`` with the task."""

    def __init__(self, cut: Callable[[asyncio.Task[Any]], None], cut_at: int | None = None) -> None:
        self.num_seen = 0
        self._cut = cut
        self._cut_at = cut_at

    def task_factory(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **kwargs: Any
    ) -> asyncio.Task[Any]:
        """For ``loop.set_task_factory``."""
        return asyncio.Task(_awaited(_Driven(coro, self)), loop=loop, **kwargs)

    def reached(self) -> None:
        """A task is about to be suspended."""
        self.num_seen += 1
        if self.num_seen == self._cut_at:
            task = asyncio.current_task()
            assert task is not None
            self._cut(task)


class _Driven:
    """A coroutine that says so each time that it is suspended."""

    def __init__(self, coro: Coroutine[Any, Any, Any], points: AwaitPoints) -> None:
        self._coro = coro
        self._points = points

    def __await__(self) -> Generator[Any, Any, Any]:
        coro = self._coro
        try:
            waits_for = coro.send(None)
            while True:
                self._points.reached()
                try:
                    yield waits_for
                except GeneratorExit:  # nobody waits for it any more
                    coro.close()
                    raise
                except BaseException as error:
                    waits_for = coro.throw(error)
                else:
                    waits_for = coro.send(None)
        except StopIteration as end:
            return end.value


async def _awaited(driven: _Driven) -> Any:
    return await driven
