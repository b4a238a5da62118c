"""Who is refused before anything is computed: no room, or no time."""

import pytest

from streamserve.core.time_limits import TimeLimits
from streamserve.errors import DeadlineUnreachableError, QueueFullError
from tests.unit.machines import Machine, TimedHarness
from tests.unit.simulated import Harness


def test_promise_refusal_the_queue_is_bounded_in_tokens():
    harness = Harness(max_num_waiting_tokens=20)
    long = harness.add([1] * 50)
    assert harness.scheduler._seats.num_waiting_tokens == 50, "an empty queue takes anyone"
    with pytest.raises(QueueFullError, match=r"at most 20 tokens .* 50 do already .* has 1"):
        harness.add([1])
    harness.step()
    first = harness.add([2] * 15)
    with pytest.raises(QueueFullError) as refused:
        harness.add([3] * 6)
    assert refused.value.retry_after_s > 0
    harness.add([3] * 5)
    harness.run()
    assert long.is_finished
    assert first.is_finished
    assert harness.scheduler._seats.num_waiting_tokens == 0


def test_promise_refusal_says_when_to_come_back_by_the_backlog_and_its_rate():
    harness = Harness(max_num_seqs=1, max_num_waiting=3, max_num_waiting_tokens=200)
    harness.add([1], max_tokens=50)
    harness.step()
    harness.now += 1000.0  # in which nobody waits
    source = harness.add([2] * 50)
    harness.add([3] * 50)
    harness.now = source.arrival_time + 60.0
    assert harness.scheduler.seconds_to_seat == pytest.approx(3 * 6.9)  # nobody came in
    too_long, another = [harness.request([4] * num_tokens) for num_tokens in (150, 1)]
    harness.now = source.arrival_time + 60.0
    with pytest.raises(QueueFullError, match="tokens of prompts") as refused:
        harness.scheduler.add(too_long)
    assert refused.value.retry_after_s == pytest.approx(6.9)  # half of the tokens, one of two
    choices = [harness.request([2] * 50) for _ in range(3)]
    harness.scheduler.add_choices(source, choices)  # five wait
    assert harness.scheduler._seats.num_waiting_tokens == 50 + 50 + 3, "what they will compute"
    harness.now = source.arrival_time + 60.0
    with pytest.raises(QueueFullError, match="at most 3 requests may wait, 5 do") as refused:
        harness.scheduler.add(another)
    assert refused.value.retry_after_s == pytest.approx(3 * 6.9)


def busy(harness, num_waiting):
    """Seats are full, and it is measured how fast they become free."""
    for _ in range(4 + num_waiting + 20):
        harness.add_now(20, max_tokens=20)
    while harness.scheduler.num_waiting > num_waiting:
        harness.timed_step()


def ask(harness, num_tokens, limits, spent_s=0.0, **options):
    before = harness.now
    request = harness.request([999] * num_tokens, max_tokens=5, **options)
    harness.now = before
    request.arrival_time = before - spent_s
    request.time_limits = limits
    harness.scheduler.add(request)
    return request


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (TimeLimits(queue_s=0.3), "max_queue_ms"),
        (TimeLimits(first_token_s=0.5), "ttft_ms"),
        (TimeLimits(total_s=0.5), "deadline_ms"),
    ],
)
def test_promise_refusal_a_hopeless_request_is_refused_before_prefill(limits, field):
    """Behind a queue that is known to last: later it may be taken."""
    harness = TimedHarness(Machine(), max_num_seqs=4)
    busy(harness, num_waiting=15)
    with pytest.raises(DeadlineUnreachableError, match=field) as refused:
        ask(harness, 100, limits)
    assert refused.value.status == 503
    assert refused.value.param == field
    waits_s = harness.scheduler._admission.backlog.wait_s(15)
    assert 0.0 < waits_s < harness.now
    prompt_s = harness.scheduler._door._step_time.prompt_seconds(0, 100)
    [limit_s] = [limit_s for _, limit_s in limits.by_field() if limit_s is not None]
    needed_s = waits_s + (0.0 if field == "max_queue_ms" else prompt_s)
    assert refused.value.retry_after_s == pytest.approx(needed_s - limit_s)
    assert harness.scheduler.num_waiting == 15
    while harness.scheduler.has_unfinished:
        harness.timed_step()
    harness.scheduler.check_integrity()
    assert not ask(harness, 100, limits).is_finished, "the queue is empty: welcome"


def test_promise_refusal_the_first_of_a_tenant_need_not_wait_for_the_others():
    """Where shares are kept: it gets its seat at once."""
    harness = TimedHarness(Machine(), max_num_seqs=4, policy="fair")
    busy(harness, num_waiting=15)
    hurried = TimeLimits(queue_s=0.3)
    ask(harness, 100, hurried, tenant="another")
    for tenant in ("", "another"):
        with pytest.raises(DeadlineUnreachableError, match="max_queue_ms"):
            ask(harness, 100, hurried, tenant=tenant)


def test_promise_refusal_the_wait_is_that_of_its_own_place():
    harness = TimedHarness(Machine(), max_num_seqs=4, policy="priority")
    busy(harness, num_waiting=15)
    hurried = TimeLimits(queue_s=0.3)
    with pytest.raises(DeadlineUnreachableError, match="max_queue_ms"):
        ask(harness, 100, hurried)
    ask(harness, 100, hurried, priority=-1)


def test_promise_refusal_what_takes_too_long_alone_is_never_taken():
    harness = TimedHarness(Machine())
    with pytest.raises(DeadlineUnreachableError, match="ttft_ms is 200") as refused:
        ask(harness, 2000, TimeLimits(first_token_s=0.2))  # 0.7 ms a row
    assert (refused.value.status, refused.value.retry_after_s) == (400, None)
    assert harness.scheduler.schedule() is None
    ask(harness, 2000, TimeLimits(first_token_s=20.0))


def test_what_was_spent_before_the_queue_counts():
    harness = TimedHarness(Machine())
    ask(harness, 10, TimeLimits(total_s=1.0), spent_s=0.5)
    with pytest.raises(DeadlineUnreachableError):
        ask(harness, 10, TimeLimits(total_s=1.0), spent_s=1.0)


@pytest.mark.parametrize("policy", ["fcfs", "sjf"])
def test_what_is_cached_takes_no_time(policy, monkeypatch):
    harness = TimedHarness(Machine(), policy=policy)
    limits = TimeLimits(first_token_s=0.2)
    with pytest.raises(DeadlineUnreachableError, match="ttft_ms"):
        ask(harness, 2000, limits)
    harness.add([999] * 2000, max_tokens=1)
    while harness.scheduler.has_unfinished:
        harness.timed_step()
    parts = []
    step_time = harness.scheduler._door._step_time
    monkeypatch.setattr(step_time, "prompt_seconds", lambda *part: parts.append(part) or 0.0)
    ask(harness, 2000, limits)
    [(num_cached, num_uncached)] = parts
    assert num_cached + num_uncached == 2000
    assert num_uncached < 100


def test_without_a_measurement_nobody_is_refused():
    harness = Harness(max_num_seqs=1)
    harness.add([1], max_tokens=50)
    harness.step()
    for i in range(5):
        request = harness.request([2, i])
        request.time_limits = TimeLimits(queue_s=2.0)
        harness.scheduler.add(request)
    assert harness.scheduler.num_waiting == 5
