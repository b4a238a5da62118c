"""Work on a loop in another thread: its end is always told."""

from __future__ import annotations

import asyncio

import pytest

from streamserve.errors import EngineError
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
