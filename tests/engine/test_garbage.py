"""What the garbage collector may look at, and when."""

import gc
import weakref

import pytest

from streamserve.engine.garbage import freeze_gc
from tests.engine.fakes import FakeRunner, serving, turns


@pytest.fixture
def thresholds():
    saved = gc.get_threshold()
    yield
    gc.set_threshold(*saved)


class Cycle:
    def __init__(self):
        self.me = self


@pytest.mark.usefixtures("thresholds")
def test_freezing_leaves_nothing_to_look_at():
    lists = [[] for _ in range(20_000)]
    garbage = weakref.ref(Cycle())  # last: so many lists have it collected
    freeze_gc()
    assert gc.get_freeze_count() > len(lists)
    assert len(gc.get_objects()) < 10_000
    assert garbage() is None, "what is frozen stays for ever"
    assert gc.get_threshold()[2] > 1_000, "the oldest are left to idle moments"


@pytest.mark.usefixtures("thresholds")
async def test_an_idle_engine_collects():
    async with serving(FakeRunner()) as h:
        freeze_gc()
        cycle = weakref.ref(Cycle())
        await h.answer()
        while cycle() is not None:
            await turns()
