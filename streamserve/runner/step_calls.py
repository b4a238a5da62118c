"""What every runner's two methods do: plans and sample calls go into queues, strictly in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from streamserve.core.death import Death
from streamserve.core.plan import (
    Masks,
    ModelRunnerOutput,
    SchedulerOutput,
    TokenLogprobs,
)
from streamserve.errors import DeviceDeadError

_Work = TypeVar("_Work")


@dataclass(frozen=True, slots=True)
class SampleCall:
    """One call of ``sample``, for the device thread to answer."""

    masks: Masks | None
    future: Future[ModelRunnerOutput]

    def fail(self, error: BaseException) -> None:
        """The device thread dies of ``error``."""
        if not self.future.done():
            self.future.set_exception(_dead(error))


def _dead(error: BaseException) -> DeviceDeadError:
    if isinstance(error, DeviceDeadError):
        return error
    return DeviceDeadError(f"the device thread has died: {error!r}")


class StepCalls(Generic[_Work]):
    """The queues between the event loop, which calls the methods, and the device thread.

    ``None`` in either means that no more comes. ``plans`` may carry work of another kind too.
    """

    def __init__(self) -> None:
        self.plans: SimpleQueue[SchedulerOutput | _Work | None] = SimpleQueue()
        self.sample_calls: SimpleQueue[SampleCall | None] = SimpleQueue()
        self._unsampled: deque[int] = deque()
        self._closed = False
        self._death = Death()

    @property
    def unsampled(self) -> list[int]:
        """Steps that were launched and not sampled, oldest first."""
        return list(self._unsampled)

    def check_open(self) -> None:
        """Raises RuntimeError once closed, DeviceDeadError once the device thread has died."""
        if self._closed:
            raise RuntimeError("the model runner is closed")
        if self._death.cause is not None:
            raise self._death.cause

    def launch(self, plan: SchedulerOutput) -> None:
        """See ``core.plan.ModelRunner``. Raises RuntimeError once closed."""
        self.check_open()
        self._unsampled.append(plan.step_id)
        self.plans.put(plan)

    def sample(
        self,
        step_id: int,
        masks: Masks | None = None,
        hear: Callable[[Future[ModelRunnerOutput]], None] | None = None,
    ) -> Future[ModelRunnerOutput]:
        """See ``runner.drafting.Target``. Raises RuntimeError when closed, or out of order."""
        self.check_open()
        if not self._unsampled or self._unsampled[0] != step_id:
            raise RuntimeError(
                f"step {step_id} cannot be sampled: launched and unsampled are "
                f"{self.unsampled}, oldest first"
            )
        self._unsampled.popleft()
        future: Future[ModelRunnerOutput] = Future()
        if hear is not None:
            future.add_done_callback(hear)
        self.sample_calls.put(SampleCall(masks, future))
        if self._death.cause is not None:  # it died between the check and now
            self._fail_waiting(self._death.cause)
        return future

    def on_death(self, hear: Callable[[DeviceDeadError], None]) -> None:
        """See ``core.plan.ModelRunner``."""
        self._death.on_death(hear)

    def fail(self, error: BaseException) -> None:
        """The device thread dies of ``error``: no call may wait for it for ever."""
        self._death.tell(_dead(error))
        self._fail_waiting(error)

    def _fail_waiting(self, error: BaseException) -> None:
        while True:
            try:
                call = self.sample_calls.get_nowait()
            except Empty:
                return
            if call is not None:
                call.fail(error)

    def close(self) -> None:
        """Lets the device thread end behind what was asked for. Idempotent."""
        if not self._closed:
            self._closed = True
            self.plans.put(None)
            self.sample_calls.put(None)


def step_output(
    plan: SchedulerOutput,
    places: Sequence[int] = (),
    token_ids: Sequence[int] = (),
    row_logprobs: Sequence[list[TokenLogprobs]] | None = None,
    duration_s: float | None = None,
) -> ModelRunnerOutput:
    """What the rows at ``places`` of a plan drew, spread over all of the plan's requests."""
    sampled: list[list[int]] = [[] for _ in plan.scheduled]
    for place, token_id in zip(places, token_ids, strict=True):
        sampled[place].append(token_id)
    if row_logprobs is None:
        return ModelRunnerOutput(plan.step_id, sampled, duration_s=duration_s)
    logprobs: list[list[TokenLogprobs]] = [[] for _ in plan.scheduled]
    for place, found in zip(places, row_logprobs, strict=True):
        logprobs[place].extend(found)
    return ModelRunnerOutput(plan.step_id, sampled, logprobs, duration_s)
