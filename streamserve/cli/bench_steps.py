"""What a bench sees of the steps: a runner that writes down when each began and ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from streamserve.core.clock import Clock, monotonic
from streamserve.core.plan import (
    Masks,
    ModelRunner,
    ModelRunnerOutput,
    SchedulerOutput,
)
from streamserve.errors import DeviceDeadError


@dataclass(slots=True)
class StepRecord:
    """One step. ``num_keys`` is how many tokens of KV its requests have, each request's own.

    ``done_at`` is when its ids were on the host, None if they never were; ``duration_s`` what the
    runner says the device took.
    """

    step_id: int
    num_requests: int
    num_tokens: int
    num_samples: int
    num_keys: int
    launched_at: float
    done_at: float | None = None
    duration_s: float | None = None

    def is_decode_of(self, batch_size: int) -> bool:
        """Whether it gave each of so many requests one token, and did nothing else."""
        return self.num_requests == self.num_tokens == self.num_samples == batch_size


class StepProbe:
    """A ``ModelRunner`` around another one. ``steps`` are in the order of their launch."""

    def __init__(self, runner: ModelRunner, clock: Clock = monotonic) -> None:
        self.steps: list[StepRecord] = []
        self.runner = runner
        self._clock = clock
        self._unsampled: dict[int, StepRecord] = {}

    @property
    def num_compilations(self) -> int:
        """As of ``ModelRunner``."""
        return self.runner.num_compilations

    def launch(self, plan: SchedulerOutput) -> None:
        """As of ``ModelRunner``."""
        record = StepRecord(
            step_id=plan.step_id,
            num_requests=len(plan.scheduled),
            num_tokens=plan.num_tokens,
            num_samples=sum(scheduled.sample for scheduled in plan.scheduled),
            num_keys=sum(s.start + len(s.token_ids) for s in plan.scheduled),
            launched_at=self._clock(),
        )
        self.runner.launch(plan)
        self.steps.append(record)
        self._unsampled[plan.step_id] = record

    def sample(self, step_id: int, masks: Masks | None = None) -> Future[ModelRunnerOutput]:
        """As of ``ModelRunner``."""
        future = self.runner.sample(step_id, masks)
        future.add_done_callback(partial(self._done, self._unsampled.pop(step_id)))
        return future

    def on_death(self, hear: Callable[[DeviceDeadError], None]) -> None:
        """As of ``ModelRunner``."""
        self.runner.on_death(hear)

    def close(self) -> None:
        """As of ``ModelRunner``."""
        self.runner.close()

    def _done(self, record: StepRecord, future: Future[ModelRunnerOutput]) -> None:
        if not future.cancelled() and future.exception() is None:
            record.done_at = self._clock()
            record.duration_s = future.result().duration_s


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some times in seconds."""

    median: float
    p99: float
    mean: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread | None:
        """None of none. The 99th percentile is the nearest time that is no less."""
        if not times:
            return None
        rising = sorted(times)
        rank = -(-99 * len(rising) // 100) - 1
        middle = (rising[(len(rising) - 1) // 2] + rising[len(rising) // 2]) / 2
        return cls(middle, rising[rank], sum(rising) / len(rising))


@dataclass(frozen=True, slots=True)
class DecodeSteps:
    """Of the steps in which a whole batch decodes, one right behind the other.

    ``wall`` is from the end of the step before to the end of this one, ``device`` what the device
    took for it; ``host_gap`` is the difference, the time in which the device had nothing to do.
    """

    num_steps: int
    mean_keys: float
    wall: Spread | None
    device: Spread | None
    host_gap: Spread | None


def decode_steps(steps: Sequence[StepRecord], batch_size: int) -> DecodeSteps:
    """Looks at pairs of neighbours that both decode the whole batch."""
    wall: list[float] = []
    device: list[float] = []
    gaps: list[float] = []
    keys: list[int] = []
    for before, step in pairwise(steps):
        if before.done_at is None or step.done_at is None:
            continue
        if not (before.is_decode_of(batch_size) and step.is_decode_of(batch_size)):
            continue
        wall.append(step.done_at - before.done_at)
        keys.append(step.num_keys)
        if step.duration_s is not None:
            device.append(step.duration_s)
            gaps.append(wall[-1] - step.duration_s)
    mean_keys = sum(keys) / len(keys) if keys else 0.0
    return DecodeSteps(len(wall), mean_keys, Spread.of(wall), Spread.of(device), Spread.of(gaps))
