"""What a refused request is told about when to come back."""

import pytest

from streamserve.core.backlog import GUESS_S, Backlog


class Queue(Backlog):
    """On a clock of its own."""

    def __init__(self):
        self.now = 0.0
        super().__init__(lambda: self.now)

    def admit(self, count, interval_s):
        for _ in range(count):
            self.admitted()
            self.now += interval_s


def test_the_time_to_retry_follows_the_admissions():
    queue = Queue()
    assert queue.seconds_until(3) == 3 * GUESS_S
    queue.admit(100, 0.25)
    assert queue.seconds_until(1) == pytest.approx(0.25, rel=0.01)
    assert queue.seconds_until(7) == pytest.approx(1.75, rel=0.01)


def test_idle_time_does_not_count():
    queue = Queue()
    queue.admit(1, 3600.0)
    queue.queued(0)
    queue.admit(1, 0.5)
    assert queue.seconds_until(1) == GUESS_S
    queue.admit(1, 3600.0)  # who waits leaves
    queue.queued(0)
    assert queue.seconds_until(1) == pytest.approx(0.95)
    queue.admit(1, 0.0)
    assert queue.seconds_until(1) == pytest.approx(0.95)


def test_a_wait_is_told_by_the_place_once_it_is_measured_and_by_no_guess():
    queue = Queue()
    assert queue.wait_s(50) == 0.0, "nobody knows"
    queue.admit(2, 0.25)
    for _ in range(2):
        assert queue.wait_s(0) == pytest.approx(0.25)
        assert queue.wait_s(3) == pytest.approx(1.0)
        queue.admit(100, 0.25)


@pytest.mark.parametrize("num_measured", [0, 100])
def test_a_queue_that_stands_still_is_no_faster_for_what_it_was(num_measured):
    queue = Queue()
    queue.queued(0)
    queue.admit(num_measured, 0.25)
    before = queue.seconds_until(1)
    queue.now += 60.0
    assert queue.seconds_until(1) == pytest.approx(0.9 * before + 6.0, rel=0.02)
    assert (queue.wait_s(0) > 6.0) is (num_measured > 0)


def test_the_time_until_tokens_leave_is_that_of_their_share_of_the_queue():
    queue = Queue()
    assert queue.seconds_for(num_waiting=10, num_tokens=1000, num_leaving=500) == 5 * GUESS_S
    assert queue.seconds_for(num_waiting=10, num_tokens=1000, num_leaving=5000) == 10 * GUESS_S
    assert queue.seconds_for(num_waiting=10, num_tokens=1000, num_leaving=1) == GUESS_S
