"""What requests ask of time: who has missed it, each once, however many have ended since."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from streamserve.core.request import RequestStatus
from streamserve.core.time_limits import TimeLimits
from streamserve.engine.deadlines import Deadlines

WAITING, PREEMPTED, RUNNING = (
    RequestStatus.WAITING,
    RequestStatus.PREEMPTED,
    RequestStatus.RUNNING,
)


class Stream:
    """Counts how often it is asked whether it has ended."""

    num_asked = 0

    def __init__(self, first_token):
        self.timings = SimpleNamespace(first_token=first_token)
        self.is_at_its_end = False

    @property
    def has_ended(self):
        Stream.num_asked += 1
        return self.is_at_its_end


class Asked:
    """A live request that came at ``arrival_time``, as far as deadlines look at it."""

    def __init__(self, limits, arrival_time=0.0, status=WAITING, first_token=None):
        self.request = SimpleNamespace(time_limits=limits, arrival_time=arrival_time, status=status)
        self.stream = Stream(first_token)


@pytest.mark.parametrize(
    ("limits", "status", "first_token", "is_missed"),
    [
        (TimeLimits(queue_s=1.0), WAITING, None, True),
        (TimeLimits(queue_s=1.0), RUNNING, None, False),
        (TimeLimits(queue_s=1.0), PREEMPTED, None, False),
        (TimeLimits(first_token_s=1.0), RUNNING, None, True),
        (TimeLimits(first_token_s=1.0), RUNNING, 0.5, False),
        (TimeLimits(total_s=1.0), RUNNING, 0.5, True),
    ],
)
def test_what_is_missed(limits, status, first_token, is_missed):
    deadlines, asked = Deadlines(), Asked(limits, 10.0, status, first_token)
    deadlines.add(asked)
    assert deadlines.seconds_left(10.5) == 0.5
    assert deadlines.missed(10.5) == []
    assert [live for live, _ in deadlines.missed(11.5)] == [asked] * is_missed
    assert not deadlines


def test_the_first_of_several_is_told_and_those_that_ended_are_not():
    deadlines = Deadlines()
    asked, ended = (Asked(TimeLimits(queue_s=2.0, total_s=1.0)) for _ in range(2))
    for live in (asked, ended):
        deadlines.add(live)
    ended.stream.is_at_its_end = True
    [(live, error)] = deadlines.missed(5.0)
    assert (live, str(error)) == (asked, "deadline_ms of 1000 has passed")


def test_of_those_that_ended_no_more_are_kept_than_of_the_others():
    deadlines = Deadlines()
    lives = [Asked(TimeLimits(total_s=float(1000 - n))) for n in range(300)]
    for live in lives[:100]:
        deadlines.add(live)
    for live in lives[100:]:
        deadlines.add(live)
        live.stream.is_at_its_end = True
    assert len(deadlines._due) < 300
    assert [live for live, _ in deadlines.missed(950.0)] == lives[50:100][::-1]
    others = [Asked(TimeLimits(total_s=5000.0)) for _ in range(1000)]
    num_asked = Stream.num_asked
    for live in others:
        deadlines.add(live)
    assert len(deadlines._due) >= 1000, "none of them has ended"
    assert Stream.num_asked - num_asked < 3000, "nor is each looked at again and again"
    assert [live for live, _ in deadlines.missed(6000.0)] == [*lives[:50][::-1], *others]
