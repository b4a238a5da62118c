"""What a bench makes of the steps it has seen."""

from concurrent.futures import Future

import pytest

from streamserve.cli.bench_load import Answer, gaps_between
from streamserve.cli.bench_steps import Spread, StepProbe, StepRecord, decode_steps
from streamserve.core.plan import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from streamserve.errors import DeviceDeadError


class ScriptedRunner:
    """Futures that the test resolves."""

    def __init__(self):
        self.futures = {}
        self.is_closed = False

    def launch(self, plan):
        if not plan.scheduled:
            raise RuntimeError("nothing to run")
        self.futures[plan.step_id] = Future()

    def sample(self, step_id, masks=None):
        return self.futures[step_id]

    def on_death(self, hear):
        hear(DeviceDeadError("gone"))

    def close(self):
        self.is_closed = True


def plan(step_id, *requests):
    scheduled = [
        ScheduledRequest(str(i), start, [7] * count, [], sample, 0)
        for i, (start, count, sample) in enumerate(requests)
    ]
    return SchedulerOutput(step_id, scheduled=scheduled)


def test_a_probe_writes_down_what_was_launched_and_when_it_was_done():
    moments = iter([1.0, 2.0, 3.0, 4.0])
    runner = ScriptedRunner()
    probe = StepProbe(runner, clock=lambda: next(moments))
    probe.launch(plan(0, (0, 5, True), (9, 1, False)))
    probe.launch(plan(1, (5, 1, True)))
    assert probe.sample(0) is runner.futures[0]
    probe.sample(1)
    runner.futures[0].set_result(ModelRunnerOutput(0, [[1], []], duration_s=0.25))
    runner.futures[1].set_exception(RuntimeError("device"))
    first, second = probe.steps
    assert first == StepRecord(0, 2, 6, 1, 15, 1.0, done_at=3.0, duration_s=0.25)
    assert (second.num_keys, second.launched_at, second.done_at) == (6, 2.0, None)
    probe.close()
    assert runner.is_closed


def test_a_probe_passes_on_that_the_runner_has_died():
    heard = []
    StepProbe(ScriptedRunner()).on_death(heard.append)
    assert [str(error) for error in heard] == ["gone"]


def test_a_plan_that_could_not_be_launched_is_no_step():
    probe = StepProbe(ScriptedRunner())
    with pytest.raises(RuntimeError, match="nothing to run"):
        probe.launch(plan(0))
    assert probe.steps == []


def decode(step_id, done_at, batch=2, keys=100, duration=0.5):
    return StepRecord(step_id, batch, batch, batch, keys, 0.0, done_at, duration)


def test_only_neighbours_that_decode_the_whole_batch_count():
    steps = [
        decode(0, 1.0, batch=1),
        decode(1, 2.0),  # behind a smaller step
        decode(2, 2.75, keys=102),
        decode(3, 3.5, keys=104),
        decode(4, None, keys=106),  # failed
        decode(5, 9.0),
        StepRecord(6, 2, 34, 2, 140, 0.0, 10.0, 1.0),  # a prompt in it
        decode(7, 11.0),
    ]
    found = decode_steps(steps, 2)
    assert (found.num_steps, found.mean_keys) == (2, 103.0)
    assert found.wall == Spread(0.75, 0.75, 0.75)
    assert found.device == Spread(0.5, 0.5, 0.5)
    assert found.host_gap == Spread(0.25, 0.25, 0.25)


def test_steps_that_were_not_timed_by_the_device_have_no_gap():
    steps = [decode(0, 1.0, duration=None), decode(1, 2.0, duration=None)]
    found = decode_steps(steps, 2)
    assert (found.num_steps, found.device, found.host_gap) == (1, None, None)
    assert decode_steps([], 2).wall is None


def test_a_spread_of_times():
    times = [float(n) for n in range(100, 0, -1)]
    assert Spread.of(times) == Spread(median=50.5, p99=99.0, mean=50.5)
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 3.0, 2.0)
    assert Spread.of([]) is None


def test_gaps_count_while_every_stream_goes_on():
    early = Answer(0.0, [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)])
    late = Answer(0.0, [(2.0, 1), (3.5, 2), (4.5, 1)])
    gaps = gaps_between([early, late])
    assert gaps.times == [1.0, 1.0, 1.5]
    assert gaps.num_merged == 1
    assert (early.num_tokens, late.num_tokens, late.first_token_s) == (4, 4, 2.0)
