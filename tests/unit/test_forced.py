"""Tokens that must come: they are drafts without any configuration, and end with their request."""

from collections import deque
from functools import partial

import pytest

from streamserve.config import MAX_FORCED_TOKENS, SchedulerConfig
from streamserve.core.plan import ModelRunnerOutput
from streamserve.core.request import FinishReason, Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.speculation import Speculator
from streamserve.core.step_time import StepTimeModel, shape_of
from tests.unit.machines import Machine, TimedHarness, linear, plateau
from tests.unit.simulated import Harness, drafting, guesses, naive_output

RIGHT, WRONG = 3, 0


def guided(some: Harness, accuracy: int, max_tokens: int = 30, most: int = 4) -> Request:
    """A request of which ``most`` tokens are always forced, so many in three of them rightly."""
    request = some.add([1, 2, 3], max_tokens=max_tokens)
    find = guesses(accuracy)
    some.scheduler.guide(request, lambda limit: find(request, min(most, limit)))
    return request


def num_sampled(plans) -> list[list[int]]:
    return [[s.sample for s in plan.scheduled] for plan in plans]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("speculative", [None, drafting(2)])
def test_forced_tokens_come_in_one_step_with_or_without_a_drafter(speculative, depth):
    some = Harness(speculative=speculative, propose=guesses(WRONG), max_steps_in_flight=depth)
    request = guided(some, RIGHT, max_tokens=11)
    assert num_sampled(some.run()) == [[1], [5], [5]]
    assert request.output_token_ids == naive_output(request, 11)
    stats = some.scheduler.speculation_stats
    assert (stats.num_draft_tokens, stats.num_accepted_tokens) == (8, 8)
    assert stats.num_forced_tokens == 8


def test_a_step_has_so_many_at_most():
    some = Harness()
    guided(some, RIGHT, max_tokens=40, most=100)
    assert num_sampled(some.run()) == [[1], [1 + MAX_FORCED_TOKENS], [1 + MAX_FORCED_TOKENS], [5]]


def test_wrong_ones_are_drafts_that_were_wrong():
    some = Harness(max_steps_in_flight=2)
    request = guided(some, WRONG, max_tokens=8)
    assert num_sampled(some.run()) == [[1], [5], [5], [5], [4], [3], [2], [1]]
    assert request.output_token_ids == naive_output(request, 8)
    assert some.scheduler.speculation_stats.num_forced_tokens == 0


def test_where_nothing_is_forced_the_drafter_guesses():
    some = Harness(speculative=drafting(3), propose=guesses(RIGHT))
    request = some.add([1, 2, 3], max_tokens=9)
    some.scheduler.guide(request, lambda limit: [])
    assert num_sampled(some.run()) == [[1], [4], [4]]
    assert some.scheduler.speculation_stats.num_forced_tokens == 0


def test_others_neither_draft_nor_wait_and_nobody_does_once_it_has_ended():
    some = Harness(max_steps_in_flight=2)
    free = some.add([4, 5], max_tokens=40)
    assert some.launch()
    assert some.launch()  # in flight together
    some.retire()
    some.retire()
    request = guided(some, RIGHT, max_tokens=6)
    while not request.is_finished:
        plan = some.launch()
        if plan is None or len(some.scheduler._in_flight) == 2:
            some.retire()
        for s in () if plan is None else plan.scheduled:
            assert s.request_id == request.request_id or s.sample <= 1
    assert request.forced is None
    while some.scheduler._in_flight:
        some.retire()
    assert some.launch()
    assert some.launch()
    some.run()
    assert free.output_token_ids == naive_output(free, 40)


def test_who_may_not_draft_is_not_guided():
    some = Harness()
    request = some.add([1, 2, 3], max_tokens=6)
    request.may_draft = False
    some.scheduler.guide(request, guesses(RIGHT).__call__)
    assert num_sampled(some.run()) == [[1]] * 6


@pytest.mark.parametrize("depth", [1, 2])
def test_an_abort_while_they_are_in_flight(depth):
    some = Harness(max_steps_in_flight=depth)
    request = guided(some, RIGHT)
    some.step()
    if depth == 2:
        some.retire()
    assert [s.sample for s in some.launch().scheduled] == [5]
    some.scheduler.finish(request, FinishReason.ABORT)
    assert some.retire() == []
    some.check_integrity()
    assert some.kv.num_free_blocks == some.kv.num_blocks


def test_a_preempted_one_goes_on_with_them():
    some = Harness(num_blocks=7, block_size=4)
    requests = [guided(some, RIGHT, max_tokens=14) for _ in range(2)]
    some.run()
    assert sum(request.num_preemptions for request in requests) > 0
    for request in requests:
        assert request.output_token_ids == naive_output(request, 14)
    assert some.scheduler.speculation_stats.num_forced_tokens > 0


@pytest.mark.parametrize("accuracy", [WRONG, 2, RIGHT])
@pytest.mark.parametrize("num_state_slots", [2, 5, 12])
def test_models_that_keep_states_go_on_from_the_one_that_counts(num_state_slots, accuracy):
    some = Harness(num_state_slots=num_state_slots, max_num_seqs=2, max_steps_in_flight=2)
    requests = [guided(some, accuracy, max_tokens=20) for _ in range(2)]
    plans = some.run()
    for request in requests:
        assert request.output_token_ids == naive_output(request, 20)
    for plan in plans:
        num_drafts = sum(max(s.sample - 1, 0) for s in plan.scheduled)
        assert num_drafts <= num_state_slots - len(plan.scheduled)
    has_drafted = some.scheduler.speculation_stats.num_draft_tokens > 0
    assert has_drafted == (num_state_slots > 2)
    assert (some.scheduler.speculation_stats.num_forced_tokens > 0) == (
        has_drafted and accuracy > 0
    )


@pytest.mark.parametrize("depth", [1, 2])
def test_each_answer_to_a_prompt_has_its_own(depth):
    some = Harness(max_steps_in_flight=depth)
    first = some.request([1, 2, 3, 4, 5], max_tokens=12)
    others = [some.request([1, 2, 3, 4, 5], max_tokens=12) for _ in range(2)]
    some.scheduler.add(first)
    some.scheduler.add_choices(first, others)
    for request, accuracy in zip([first, *others], (RIGHT, WRONG, 2), strict=True):
        find = partial(guesses(accuracy), request)
        some.scheduler.guide(request, find)
    some.run()
    for request in (first, *others):
        assert request.output_token_ids == naive_output(request, 12)
    assert some.scheduler.speculation_stats.num_forced_tokens > 10


def speculator(machine: Machine) -> Speculator:
    config = SchedulerConfig(max_model_len=4096)
    return Speculator(config, None, StepTimeModel(machine.profile()))


def decoding(one: Speculator, count: int, forced: list[int]) -> list[Request]:
    """Requests whose last token is known, and what follows it."""
    requests = []
    for i in range(count):
        params = SamplingParams(temperature=0.0, max_tokens=200)
        request = Request(f"r{i}", list(range(100)), params, arrival_time=0.0, seed=0)
        request.num_computed_tokens = request.num_tokens - 1
        request.max_num_tokens = 1000
        one.guide(request, partial(lambda forced, limit: forced[:limit], forced))
        requests.append(request)
    return requests


def test_rows_decide_how_many_are_tried():
    for machine, count, num_tokens in ((plateau, 4, 24), (linear, 32, 0)):
        one = speculator(Machine(machine))
        drafts = one.plan(decoding(one, count, [1, 2, 3, 4, 5, 6]), count)
        assert drafts.num_tokens == num_tokens


def test_those_that_were_wrong_again_and_again_are_tried_less():
    one = speculator(Machine(lambda rows: 0.01 + 0.001 * rows))
    [request] = decoding(one, 1, [1, 2, 3, 4, 5, 6])
    before = one.plan([request], 1).num_tokens
    assert before >= 4
    for _ in range(30):
        one.verified(request, before, 0)
    assert one.plan([request], 1).num_tokens == 0
    [later] = decoding(one, 1, [1, 2])
    assert later.forced.rate < 0.1


def test_a_step_is_waited_for_where_something_is_forced_behind_its_token():
    for forced, expected in (([1, 2, 3, 4], True), ([], False)):
        one = speculator(Machine(lambda rows: 0.004 + 0.00001 * rows))
        for _ in range(200):  # the host takes a twentieth of a step
            one.host_time.observe(one.host_time._last_retired + 0.0042, 1, 0.004, overlaps=False)
        [request] = decoding(one, 1, forced)
        for _ in range(60):  # it learns how often there is something
            request.forced.behind(request)
            request.token_ids.append(0)
        request.num_computed_tokens = request.num_tokens + 1
        request.num_pending_tokens = 1
        assert one.should_wait([request]) is expected


def seconds(num_streams: int, *, guides: bool) -> float:
    """Virtual seconds on a device of 4 ms: of 12 tokens, 8 follow from the first 4."""
    machine = Machine(lambda n: 0.004 + 0.00001 * n, decode_context_s=3e-8, pair_s=1e-10)
    some = TimedHarness(machine, max_num_seqs=64, max_steps_in_flight=2)
    answer = [position % 7 if position % 12 < 8 else position for position in range(400)]
    for i in range(num_streams):
        request = some.add([i + 1] * 20, max_tokens=240)

        def find(limit: int, request: Request = request) -> list[int]:
            start = request.num_output_tokens
            forced = [
                p
                for p in range(start, start + limit)
                if start % 12 < 8 and p // 12 == start // 12 and p % 12 < 8
            ]
            return [answer[p] for p in forced]

        if guides:
            some.scheduler.guide(request, find)
    in_flight: deque = deque()
    started = free_at = some.now
    while some.scheduler.has_unfinished or in_flight:
        plan = some.scheduler.schedule()
        if plan is not None:
            some.now += 0.0002
            took = machine.seconds(shape_of(plan))
            free_at = max(free_at, some.now) + took
            in_flight.append((plan, free_at, took))
        if plan is None or len(in_flight) == 2:
            plan, ended, took = in_flight.popleft()
            some.now = max(some.now, ended)
            sampled = []
            for s in plan.scheduled:
                drawn = [answer[s.output_position + i] for i in range(s.sample)]
                sampled.append(drawn[: s.num_kept(drawn)])
            some.scheduler.update(ModelRunnerOutput(plan.step_id, sampled, duration_s=took))
    return some.now - started


@pytest.mark.parametrize(("num_streams", "gain"), [(1, 2.0), (4, 1.8)])
def test_a_device_waits_for_the_host_where_that_pays(num_streams, gain):
    assert seconds(num_streams, guides=False) / seconds(num_streams, guides=True) > gain
