"""Beam search by hand: what goes on, what has finished, and when it is over."""

from __future__ import annotations

import pytest

from streamserve.core.plan import TokenLogprobs
from streamserve.core.sampling_params import BeamSearchParams
from streamserve.engine.beam_search import BeamSearch, Continuation

END = 9


def search(width, *, max_tokens=10, min_tokens=0, length_penalty=0.0, early_stopping=False):
    params = BeamSearchParams(
        beam_width=width, length_penalty=length_penalty, early_stopping=early_stopping
    )
    return BeamSearch(
        params, ending_ids=frozenset({END}), max_tokens=max_tokens, min_tokens=min_tokens
    )


def row(**logprobs):
    """What may follow a sequence: ``t3=-0.5`` is token 3."""
    return TokenLogprobs(0, 0.0, tuple((int(name[1:]), value) for name, value in logprobs.items()))


def test_the_worst_of_those_that_finished_is_what_a_running_one_must_beat():
    beams = search(2)
    assert beams.advance([row(t1=-0.1, t9=-0.5, t2=-1.0)]) == [
        Continuation(0, 1),
        Continuation(0, 2),
    ]
    assert beams.advance([row(t3=-0.1, t9=-0.3, t4=-2.0), row(t5=-5.0)]) == [
        Continuation(0, 3),
        Continuation(0, 4),
    ], "-0.2 is above -0.5"
    assert beams.advance([row(t9=-0.22, t5=-0.25, t6=-3.0), row(t5=-5.0)]) == [], "and not -0.42"
    assert [found.token_ids for found in beams.best(2)] == [[1, 9], [1, 3, 9]]
    assert BeamSearch.num_candidates(BeamSearchParams(beam_width=2), frozenset({END, 8})) == 4


def test_of_equals_the_first_running_one_goes_on_first():
    beams = search(2)
    beams.advance([row(t1=-1.0, t2=-1.0)])
    tops = [row(t5=-1.0, t6=-2.0), row(t3=-1.0, t4=-2.0)]
    assert beams.advance(tops) == [Continuation(0, 5), Continuation(1, 3)]


@pytest.mark.parametrize(("min_tokens", "num_finished"), [(0, 1), (1, 0)])
def test_no_sequence_ends_before_its_least_length(min_tokens, num_finished):
    beams = search(2, min_tokens=min_tokens)
    beams.advance([row(t9=-0.1, t1=-1.0, t2=-2.0)])
    assert len(beams.best(2)) == num_finished


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "goes_on"),
    [
        (True, 1.0, False),
        (False, 1.0, False),
        ("never", 1.0, True),  # ten tokens of -1.5 together are better
        ("never", -1.0, False),  # ten of them are worse than one
        (False, -1.0, False),
    ],
)
def test_when_it_is_over(early_stopping, length_penalty, goes_on):
    beams = search(1, early_stopping=early_stopping, length_penalty=length_penalty)
    assert bool(beams.advance([row(t9=-1.0, t1=-1.5)])) is goes_on


def test_what_is_worse_the_longer_it_gets_is_judged_as_it_is():
    beams = search(2, early_stopping="never", length_penalty=-1.0)
    beams.advance([row(t1=-0.1, t9=-0.5, t2=-3.0)])
    # Finished: -0.5 and -0.4 · 2; running: -0.2 · 2, and at ten tokens -0.2 · 10.
    assert beams.advance([row(t3=-0.1, t9=-0.3, t4=-2.0), row(t5=-5.0)])


def test_at_the_longest_all_that_run_have_finished():
    beams = search(2, max_tokens=1)
    assert beams.advance([row(t1=-0.1, t2=-1.0, t9=-2.0)]) == []
    assert [(found.token_ids, found.has_ended) for found in beams.best(2)] == [
        ([1], False),
        ([2], False),
    ]
