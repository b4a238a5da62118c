"""Work on a loop in another thread: its end is always told."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from streamserve.errors import EngineError
from streamserve.llm.llm import _close
from streamserve.llm.loop_thread import LoopThread


def test_closing_ends_what_runs_and_tells_who_waits():
    loop = LoopThread("test")
    has_let_go = []

    async def work(put):
        put(1)
        try:
            await asyncio.Event().wait()
        finally:
            has_let_go.append(True)

    reader, other = loop.iterate(work), loop.iterate(work)
    assert next(reader) == next(other) == 1
    loop.close()
    assert has_let_go == [True, True]
    with pytest.raises(EngineError, match="cut off"):
        next(reader)
    other.close()


def test_who_leaves_early_waits_until_the_work_has_let_go():
    loop = LoopThread("test")
    has_let_go = []

    async def work(put):
        put(1)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            has_let_go.append(True)

    reader = loop.iterate(work)
    assert next(reader) == 1
    reader.close()
    assert has_let_go == [True]
    loop.close()


def test_what_is_found_to_be_garbage_on_its_own_thread_is_closed_from_another():
    loop, closed = LoopThread("test"), []

    async def stop() -> None:
        closed.append("engine")

    async def lose() -> None:
        answers = SimpleNamespace(close=lambda: closed.append("answers"))
        _close(SimpleNamespace(engine=SimpleNamespace(stop=stop)), answers, loop)

    asyncio.run_coroutine_threadsafe(lose(), loop._loop).result(60)
    loop._thread.join(60)
    assert not loop._thread.is_alive()
    assert closed == ["engine", "answers"]
