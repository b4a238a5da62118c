"""What a refused request is told about when to come back."""

import pytest

from streamserve.core.backlog import Backlog


def test_the_time_to_retry_follows_the_admissions():
    backlog = Backlog()
    for i in range(100):
        backlog.admitted(0.25 * i, num_waiting=5)
    assert backlog.retry_after_s == pytest.approx(0.25, rel=0.01)


def test_idle_time_does_not_count():
    backlog = Backlog(retry_after_s=2.0)
    backlog.admitted(0.0, num_waiting=0)
    backlog.admitted(3600.0, num_waiting=1)
    assert backlog.retry_after_s == 2.0
    backlog.admitted(3601.0, num_waiting=1)
    assert backlog.retry_after_s == pytest.approx(1.9)
