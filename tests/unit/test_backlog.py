"""What a refused request is told about when to come back."""

import pytest

from streamserve.core.backlog import Backlog


def test_the_time_to_retry_follows_the_admissions():
    backlog = Backlog()
    for i in range(100):
        backlog.admitted(0.25 * i, num_waiting=5)
    assert backlog.seconds_per_admission == pytest.approx(0.25, rel=0.01)


def test_idle_time_does_not_count():
    backlog = Backlog(seconds_per_admission=2.0)
    backlog.admitted(0.0, num_waiting=0)
    backlog.admitted(3600.0, num_waiting=1)
    assert backlog.seconds_per_admission == 2.0
    backlog.admitted(3601.0, num_waiting=1)
    assert backlog.seconds_per_admission == pytest.approx(1.9)


def test_a_wait_is_told_by_the_place_once_it_is_measured():
    backlog = Backlog()
    assert backlog.wait_s(50) == 0.0, "nobody knows"
    for i in range(100):
        backlog.admitted(0.25 * i, num_waiting=5)
    assert backlog.wait_s(0) == pytest.approx(0.25, rel=0.01)
    assert backlog.wait_s(3) == pytest.approx(1.0, rel=0.01)


def test_the_time_until_tokens_leave_is_that_of_their_share_of_the_queue():
    backlog = Backlog(2.0)
    assert backlog.seconds_for(num_waiting=10, num_tokens=1000, num_leaving=500) == 10.0
    assert backlog.seconds_for(num_waiting=10, num_tokens=1000, num_leaving=5000) == 20.0
    assert backlog.seconds_for(num_waiting=10, num_tokens=1000, num_leaving=1) == 2.0
