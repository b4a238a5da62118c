"""The engine on virtual time, in worlds made of seeds: see `tests.simulation.world`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.simulation.world import play

NUM_SEEDS = 1000
CHUNK = 100
EXHAUSTIVE = (58, 118, 161, 175)  # each has most of what there is, and some 100 await points


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of failed steps need no traceback each."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, CHUNK))
def test_every_stream_ends_once_as_it_should_and_nothing_is_left(first):
    happened: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        happened.update(play(seed).happened())
    missing = [name for name, count in happened.items() if not count]
    assert not missing, "the worlds are too quiet to prove anything"


@pytest.mark.parametrize("seed", EXHAUSTIVE)
def test_a_client_may_be_cut_off_at_every_await_point(seed):
    num_points = play(seed).points.num_seen
    num_cut = 0
    for cut_at in range(1, num_points + 1):
        num_cut += play(seed, cut_at).happened()["readers who left"]
    assert num_cut >= num_points / 2


def test_a_seed_is_always_the_same_world():
    for seed in range(20):
        first, second = play(seed), play(seed)
        assert first.happened() == second.happened()
        assert first.loop.time() == second.loop.time()
