"""Faults on demand: each kind goes wrong where and as often as was asked for, and then no more."""

import asyncio

import pytest

from streamserve.core.plan import NewRequest, ScheduledRequest, SchedulerOutput
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.fault_injection import FaultInjectingRunner, FaultKind, InjectedError
from streamserve.engine.null_runner import NullRunner
from streamserve.errors import DeviceDeadError, OutOfMemoryError
from tests.engine.fakes import FakeRunner


class Steps:
    """Plans with one request each, run one after the other."""

    def __init__(self) -> None:
        self.runner = FaultInjectingRunner(NullRunner([7]))
        self.num_steps = 0

    def run(self, request_id="r"):
        plan = SchedulerOutput(self.num_steps)
        self.num_steps += 1
        plan.new_requests.append(NewRequest(request_id, [1], 1, SamplingParams(), 0, 0))
        plan.scheduled.append(ScheduledRequest(request_id, 0, [1], [0], 1, 0))
        self.runner.launch(plan)
        return self.runner.sample(plan.step_id)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("step_exception", InjectedError),
        ("out_of_memory", OutOfMemoryError),
        ("device_dead", DeviceDeadError),
    ],
)
def test_the_next_steps_fail_and_no_others(kind, error):
    steps = Steps()
    assert steps.run().result().sampled_token_ids == [[7]]
    steps.runner.inject(FaultKind(kind), num_steps=2)
    for _ in range(2):
        with pytest.raises(error, match=f"{kind} was injected"):
            steps.run().result()
    assert steps.run().result().sampled_token_ids == [[7]]


def test_a_fault_of_one_request_is_in_every_step_that_has_it():
    steps = Steps()
    steps.runner.inject(FaultKind.REQUEST_EXCEPTION, request_id="bad")
    for _ in range(3):
        assert steps.run("good").exception() is None
        assert isinstance(steps.run("bad/1").exception(), InjectedError)
    steps.runner.clear()
    assert steps.run("bad").exception() is None


def test_a_runner_that_has_died_is_heard_of_behind_its_faults():
    runner, heard = FakeRunner(), []
    FaultInjectingRunner(runner).on_death(heard.append)
    runner.death.tell(DeviceDeadError("gone"))
    assert heard == [runner.death.cause]


def test_an_injected_death_is_heard_of_once_and_that_of_one_request_only_by_its_step():
    steps, heard = Steps(), []
    steps.runner.on_death(heard.append)
    steps.runner.inject(FaultKind.DEVICE_DEAD, request_id="bad")
    assert isinstance(steps.run("bad").exception(), DeviceDeadError)
    assert heard == []
    for _ in range(2):
        steps.runner.inject(FaultKind.DEVICE_DEAD)
    assert [str(cause) for cause in heard] == ["device_dead was injected"]


async def test_a_slow_step_says_the_same_later():
    steps = Steps()
    steps.runner.inject(FaultKind.SLOW_STEP, delay_s=0.0)
    future = steps.run()
    assert not future.done()
    assert (await asyncio.wrap_future(future)).sampled_token_ids == [[7]]


@pytest.mark.parametrize(
    ("kind", "settings", "names"),
    [
        ("request_exception", {}, "request_id"),
        ("step_exception", {"num_steps": 0}, "num_steps"),
        ("slow_step", {"delay_s": float("nan")}, "delay_s"),
    ],
)
def test_what_cannot_be_injected(kind, settings, names):
    with pytest.raises(ValueError, match=names):
        Steps().runner.inject(FaultKind(kind), **settings)
