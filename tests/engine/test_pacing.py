"""What steps took reaches the model that sizes the chunks, is counted, and is logged."""

import dataclasses
import logging
from concurrent.futures import Future

import pytest

from streamserve.core.scheduler import Scheduler
from streamserve.core.step_time import StepProfile, StepShape, StepTimeModel
from tests.engine.fakes import FakeRunner, serving

PROFILE = StepProfile(((StepShape(1, 1, 1), 0.010), (StepShape().with_chunk(0, 64, 1), 0.020)))


class TimedRunner(FakeRunner):
    """Every step takes 15 ms, it says."""

    def sample(self, step_id, masks=None):
        output = super().sample(step_id, masks).result()
        future = Future()
        future.set_result(dataclasses.replace(output, duration_s=0.015))
        return future


def paced(config, kv_cache, clock):
    return Scheduler(config, kv_cache, clock, StepTimeModel(PROFILE))


async def test_measured_steps_are_learnt_counted_and_logged(caplog):
    caplog.set_level(logging.DEBUG, "streamserve.engine.async_engine")
    async with serving(TimedRunner(), scheduler_class=paced) as h:
        await h.answer(max_tokens=5)
        pacing = h.engine.stats().pacing
    assert pacing.step_time.count == pacing.step_time_ratio.count == 5
    assert pacing.step_time.total == pytest.approx(5 * 0.015)
    assert pacing.chunk_tokens.count == 1
    reports = [r.getMessage() for r in caplog.records if "StepReport" in r.getMessage()]
    assert len(reports) == 5
    assert all("predicted_s" in r and "actual_s=0.015" in r for r in reports)


async def test_a_runner_that_does_not_measure_is_served_all_the_same():
    async with serving(FakeRunner(), scheduler_class=paced) as h:
        await h.answer(max_tokens=5)
        assert h.engine.stats().pacing.step_time.count == 0
