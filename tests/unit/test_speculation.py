"""When drafts are made, how many, and what becomes of them; which tokens come is another test's."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import pytest

from streamserve.config import SchedulerConfig, SpeculativeConfig
from streamserve.core.plan import ModelRunnerOutput, SchedulerOutput
from streamserve.core.request import FinishReason, Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.speculation import HostTime, Speculator
from streamserve.core.step_time import StepTimeModel, shape_of
from tests.unit.machines import Machine, TimedHarness, linear, plateau
from tests.unit.simulated import Harness, drafting, guesses, naive_output

RIGHT, WRONG = 3, 0


def harness(accuracy: int, num_drafts: int = 4, **config) -> Harness:
    return Harness(speculative=drafting(num_drafts), propose=guesses(accuracy), **config)


def num_sampled(plans) -> list[list[int]]:
    return [[s.sample for s in plan.scheduled] for plan in plans]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("accuracy", "sampled"),
    [(RIGHT, [[1], [5], [5]]), (WRONG, [[1], *([[5]] * 6), [4], [3], [2], [1]])],
)
def test_a_step_yields_what_was_right_and_one_more(accuracy, sampled, depth):
    some = harness(accuracy, max_steps_in_flight=depth)
    request = some.add([1, 2, 3], max_tokens=11)
    plans = some.run()
    assert num_sampled(plans) == sampled
    assert request.output_token_ids == naive_output(request, 11)
    assert request.finish_reason is FinishReason.LENGTH
    stats = some.scheduler.speculation_stats
    assert stats.num_draft_tokens == sum(max(n - 1, 0) for step in sampled for n in step)
    assert stats.num_accepted_tokens == (8 if accuracy == RIGHT else 0)
    assert stats.num_drafts == sum(n > 1 for step in sampled for n in step)


def test_no_draft_goes_past_the_end():
    some = harness(RIGHT, num_drafts=8)
    request = some.add([1, 2, 3], max_tokens=5)
    assert num_sampled(some.run()) == [[1], [4]]
    assert request.num_output_tokens == 5


def test_nor_past_the_context():
    some = harness(RIGHT, num_drafts=8, max_model_len=10)
    request = some.add([1, 2, 3], max_tokens=7)
    assert num_sampled(some.run()) == [[1], [6]]
    assert request.num_tokens == 10


def test_who_may_not_draft_does_not():
    some = harness(RIGHT, max_steps_in_flight=2)
    free, held = some.request([1, 2], max_tokens=9), some.request([3, 4], max_tokens=9)
    held.may_draft = False
    for request in (free, held):
        some.scheduler.add(request)
    plans = some.run()
    drafted = {s.request_id for plan in plans for s in plan.scheduled if s.sample > 1}
    assert drafted == {free.request_id}
    assert held.output_token_ids == naive_output(held, 9)


def test_drafts_take_no_seat_and_no_token_from_others():
    some = harness(RIGHT, max_num_seqs=2, max_num_batched_tokens=8)
    for i in range(4):
        some.add([i] * 6, max_tokens=10)
    for plan in some.run():
        assert plan.num_tokens <= 8
        assert sum(s.sample for s in plan.scheduled) <= some.config.max_num_sampled


def test_nobody_is_preempted_for_a_draft():
    """Two requests fill the memory at their ends, and only then."""
    plans = []
    for speculative in (None, drafting(5)):
        some = Harness(num_blocks=6, block_size=4, speculative=speculative, propose=guesses(WRONG))
        both = [some.add([i, i + 1, 5], max_tokens=9) for i in range(2)]
        plans.append(some.run())
        assert [r.num_preemptions for r in both] == [0, 0]
    assert any(s.sample > 1 for plan in plans[1] for s in plan.scheduled)


def test_what_was_wrong_is_not_cached():
    some = harness(WRONG)
    first = some.add([1, 2, 3, 4, 5], max_tokens=12)
    some.run()
    again = some.add(first.token_ids[:-1], max_tokens=1)  # every cached block is checked, too
    some.run()
    assert again.num_cached_tokens == first.num_tokens - 2
    assert again.output_token_ids == first.output_token_ids[-1:]


@pytest.mark.parametrize("depth", [1, 2])
def test_an_abort_while_drafts_are_in_flight(depth):
    some = harness(RIGHT, max_steps_in_flight=depth)
    request = some.add([1, 2, 3], max_tokens=30)
    some.step()
    if depth == 2:
        some.retire()
    assert [s.sample for s in some.launch().scheduled] == [5]
    some.scheduler.finish(request, FinishReason.ABORT)
    some.check_integrity()
    assert some.retire() == []
    some.check_integrity()
    assert some.kv.num_free_blocks == some.kv.num_blocks


def test_with_drafts_nothing_overlaps_and_without_everything_does():
    for accuracy, speculative in ((RIGHT, drafting(3)), (RIGHT, None)):
        some = Harness(max_steps_in_flight=2, speculative=speculative, propose=guesses(accuracy))
        some.add([1, 2, 3], max_tokens=20)
        some.launch()
        assert (some.launch() is None) == (speculative is not None)


def test_rows_of_the_sampler():
    def rows(seats: int, drafts: int) -> int:
        return SchedulerConfig(
            max_model_len=64, max_num_seqs=seats, speculative=drafting(drafts)
        ).max_num_sampled

    assert [rows(1, 20), rows(2, 5), rows(16, 5), rows(64, 5), rows(200, 5)] == [
        21,
        34,
        64,
        64,
        200,
    ]
    forced_only = [SchedulerConfig(max_model_len=64, max_num_seqs=n) for n in (1, 2, 7, 200)]
    assert [config.max_num_sampled for config in forced_only] == [17, 34, 64, 200]


def speculator(machine: Machine, **config) -> Speculator:
    speculative = SpeculativeConfig(
        num_speculative_tokens=5, prompt_lookup_min=2, prompt_lookup_max=4
    )
    whole = SchedulerConfig(max_model_len=4096, speculative=speculative, **config)
    return Speculator(whole, speculative, StepTimeModel(machine.profile()))


def decoding(count: int, repeats: bool, first: int = 0) -> list[Request]:
    """Requests whose last token is known, with a text that repeats, or does not at all."""
    requests = []
    for i in range(first, first + count):
        rng = random.Random(i)
        text = [rng.randrange(10**6) for _ in range(20)] * 6
        if not repeats:
            text = [rng.randrange(10**6) for _ in range(120)]
        params = SamplingParams(temperature=0.0, max_tokens=200)
        request = Request(f"r{i}", text, params, arrival_time=0.0, seed=0)
        request.num_computed_tokens = request.num_tokens - 1
        request.max_num_tokens = 1000
        requests.append(request)
    return requests


def waiting(requests: list[Request]) -> list[Request]:
    for request in requests:
        request.num_computed_tokens += 1
        request.num_pending_tokens = 1
    return requests


def test_rows_that_cost_nothing_are_used():
    drafts = speculator(Machine(plateau)).plan(decoding(4, repeats=True), 4)
    assert drafts.num_tokens == 20
    assert {len(ids) for ids in drafts.token_ids.values()} == {5}


def test_rows_that_cost_what_they_yield_are_not():
    """Behind four rows, each further one costs as much as a whole stream's token is worth."""
    assert speculator(Machine(linear)).plan(decoding(32, repeats=True), 32).num_tokens == 0
    alone = speculator(Machine(linear)).plan(decoding(1, repeats=True), 1)
    assert alone.num_tokens >= 3


def test_one_that_repeats_itself_does_not_slow_down_many_that_do_not():
    requests = [*decoding(1, repeats=True), *decoding(30, repeats=False, first=1)]
    assert speculator(Machine(linear)).plan(requests, 31).num_tokens == 0
    assert speculator(Machine(plateau)).plan(requests, 31).num_tokens == 5


def test_waiting_is_for_text_that_repeats():
    assert speculator(Machine(plateau)).should_wait(waiting(decoding(4, repeats=True)))
    assert not speculator(Machine(plateau)).should_wait(waiting(decoding(4, repeats=False)))
    assert not speculator(Machine(linear)).should_wait(waiting(decoding(32, repeats=True)))
    assert not speculator(Machine(linear)).should_wait([])


@pytest.mark.parametrize(("step_s", "num_thoughts"), [(0.002, 5), (0.2, 25)])
def test_whether_to_wait_is_thought_over_less_often_the_more_it_costs(
    step_s, num_thoughts, monkeypatch
):
    """64 requests cost 0.64 ms at most: 1% of what some 20 short steps are predicted to take."""
    thoughts = []
    one = speculator(Machine(lambda rows: step_s, sampled_s=0.0))
    monkeypatch.setattr(one, "_is_worth_waiting", lambda running, room: thoughts.append(0))
    requests = waiting(decoding(64, repeats=False))
    for _ in range(100):
        assert not one.should_wait(requests)
    assert len(thoughts) == num_thoughts


def test_a_slow_host_is_not_waited_for():
    one = speculator(Machine(lambda rows: 0.001 + 0.00002 * rows))
    requests = waiting(decoding(2, repeats=True))
    assert one.should_wait(requests)
    now = 0.0
    for _ in range(200):
        now += 0.0052
        one.host_time.observe(now, 2, 0.001, overlaps=False)
    assert not one.should_wait(requests)


def test_a_longer_step_stays_within_the_target():
    requests = decoding(1, repeats=True)
    within = speculator(Machine(linear), itl_target_ms=17.0).plan(requests, 1)
    assert within.num_tokens <= 4
    assert speculator(Machine(linear), itl_target_ms=1.0).plan(requests, 1).num_tokens == 0


def test_the_shape_is_the_plans():
    some = harness(RIGHT, num_drafts=3, max_num_seqs=4)
    for i in range(3):
        some.add([i, 2, 3, 4], max_tokens=20)
    some.step()
    running = list(some.scheduler._seats.running)
    drafts = some.scheduler._speculator.plan(running, 3)
    assert shape_of(some.launch()) == drafts.shape
    some.retire()


def test_the_host_time_passes_over_pauses():
    host = HostTime()
    before = host.seconds(1, overlaps=False)
    host.observe(100.0, 1, 0.01, overlaps=False)
    assert host.seconds(1, overlaps=False) == before
    host.observe(100.011, 1, 0.01, overlaps=False)
    assert host.seconds(1, overlaps=False) != before
    assert host.seconds(10, overlaps=True) == 0.0


def seconds_on_a_gpu(
    num_streams: int, answer: Callable[[str, int], int], host_s: float, **config: object
) -> float:
    """Virtual seconds of streams of 200 tokens where the next step is queued behind the last one,
    and where it is not, the device waits ``host_s`` for it. Reading the weights takes 4 ms.
    """
    rows = Machine(lambda n: 0.004 + 0.00001 * n + 0.00002 * max(n - 64, 0))
    machine = replace(rows, decode_context_s=3e-8, pair_s=1e-10, key_s=3e-8, sampled_s=2e-6)
    some = TimedHarness(
        machine, max_num_batched_tokens=8192, max_num_seqs=256, max_steps_in_flight=2, **config
    )
    for i in range(num_streams):
        rng = random.Random(i)
        some.add([rng.randrange(10**6) for _ in range(64)], max_tokens=200)
    in_flight: deque[tuple[SchedulerOutput, float, float]] = deque()
    started = free_at = some.now
    while some.scheduler.has_unfinished or in_flight:
        plan = some.scheduler.schedule()
        if plan is not None:
            some.now += host_s
            seconds = machine.seconds(shape_of(plan))
            free_at = max(free_at, some.now) + seconds
            in_flight.append((plan, free_at, seconds))
        if plan is None or len(in_flight) == 2:
            plan, ended, seconds = in_flight.popleft()
            some.now = max(some.now, ended)
            sampled = []
            for s in plan.scheduled:
                drawn = [answer(s.request_id, s.output_position + i) for i in range(s.sample)]
                sampled.append(drawn[: s.num_kept(drawn)])
            some.scheduler.update(ModelRunnerOutput(plan.step_id, sampled, duration_s=seconds))
    return some.now - started


@pytest.mark.parametrize("host_s", [0.0001, 0.0003])
@pytest.mark.parametrize(("num_streams", "gain"), [(1, 3.0), (8, 3.0), (64, 1.2)])
def test_a_fast_device_waits_for_the_host_only_where_that_pays(num_streams, gain, host_s):
    def repeated(name: str, position: int) -> int:
        return position % 9

    def new(name: str, position: int) -> int:
        return random.Random(f"{name} {position}").randrange(10**6)

    speculative = SpeculativeConfig(
        num_speculative_tokens=5, prompt_lookup_min=2, prompt_lookup_max=4
    )
    for answer, least in ((repeated, gain), (new, 1.0)):
        without = seconds_on_a_gpu(num_streams, answer, host_s)
        drafting = seconds_on_a_gpu(num_streams, answer, host_s, speculative=speculative)
        assert without / drafting >= least


def test_pacing_is_right_beside_drafts():
    """A stream that repeats itself and a long prompt: what is predicted is what steps take."""
    some = TimedHarness(
        Machine(plateau),
        speculative=SpeculativeConfig(
            num_speculative_tokens=5, prompt_lookup_min=1, prompt_lookup_max=2
        ),
    )
    stream = some.add_now(32, max_tokens=400)
    for _ in range(30):
        some.timed_step()
    assert stream.num_output_tokens > 60  # the machine says 1, again and again
    some.add_now(2000, max_tokens=1)
    steps = []
    while some.scheduler.num_running + some.scheduler.num_waiting > 1:
        steps.append(some.timed_step())
    beside = [step for step in steps if step.chunks and step.shape.num_sampled > 1]
    assert len(beside) > 3
    for step in beside[1:]:
        assert step.undisturbed <= 1.2 * step.target_s
    assert some.scheduler.pacer.stats.error <= 0.25
