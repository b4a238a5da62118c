"""Faults on demand: a runner around another whose next steps go wrong in a way that is asked for.

What fails is the step's result. The runner inside has booked and computed the step, as a real one
has whose device reports an error late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum

from streamserve.core.death import Death
from streamserve.core.plan import (
    Masks,
    ModelRunner,
    ModelRunnerOutput,
    SchedulerOutput,
)
from streamserve.errors import DeviceDeadError, OutOfMemoryError


class FaultKind(StrEnum):
    """What can go wrong with a step."""

    STEP_EXCEPTION = "step_exception"
    OUT_OF_MEMORY = "out_of_memory"
    DEVICE_DEAD = "device_dead"
    REQUEST_EXCEPTION = "request_exception"  # every step with one request in it, for ever
    SLOW_STEP = "slow_step"


class InjectedError(RuntimeError):
    """A step failed because somebody asked for it."""


_ERRORS: dict[FaultKind, Callable[[str], Exception]] = {
    FaultKind.STEP_EXCEPTION: InjectedError,
    FaultKind.OUT_OF_MEMORY: OutOfMemoryError,
    FaultKind.DEVICE_DEAD: DeviceDeadError,
    FaultKind.REQUEST_EXCEPTION: InjectedError,
}


@dataclass(slots=True)
class _Fault:
    kind: FaultKind
    num_steps: int
    request_id: str | None
    delay_s: float


class FaultInjectingRunner:
    """A ``ModelRunner`` that runs another one's steps, and lets those fail that were asked for.

    Event-loop thread only, as every runner.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._faults: list[_Fault] = []
        self._plans: dict[int, SchedulerOutput] = {}  # launched, not sampled
        self._death = Death()
        runner.on_death(self._death.tell)

    def inject(
        self,
        kind: FaultKind,
        *,
        num_steps: int = 1,
        request_id: str | None = None,
        delay_s: float = 1.0,
    ) -> None:
        """Let the next ``num_steps`` steps go wrong; of those with ``request_id`` in it, if given.

        ``DEVICE_DEAD``, but of one request, is heard of at once, as a device's that dies while
        nobody asks for anything. ``SLOW_STEP``: the steps' results come ``delay_s`` late.
        ``REQUEST_EXCEPTION`` needs a ``request_id`` (that of a choice or of a beam belongs to its
        request) and ends with ``clear`` only. Raises ValueError for what cannot be.
        """
        if kind is FaultKind.REQUEST_EXCEPTION and request_id is None:
            raise ValueError(f"request_id must be given for {kind}")
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if not 0.0 <= delay_s <= 60.0:
            raise ValueError(f"delay_s must be between 0 and 60, got {delay_s}")
        self._faults.append(_Fault(kind, num_steps, request_id, delay_s))
        if kind is FaultKind.DEVICE_DEAD and request_id is None:
            self._death.tell(DeviceDeadError(f"{kind} was injected"))

    def clear(self) -> None:
        """Forget what was asked for and has not happened. Who is dead stays dead."""
        self._faults.clear()

    @property
    def num_compilations(self) -> int:
        """See ``core.plan.ModelRunner``."""
        return self._runner.num_compilations

    def launch(self, plan: SchedulerOutput) -> None:
        """See ``core.plan.ModelRunner``."""
        self._runner.launch(plan)
        if self._faults:
            self._plans[plan.step_id] = plan

    def sample(self, step_id: int, masks: Masks | None = None) -> Future[ModelRunnerOutput]:
        """See ``core.plan.ModelRunner``."""
        plan = self._plans.pop(step_id, None)
        future = self._runner.sample(step_id, masks)
        fault = None if plan is None else self._due(plan)
        if fault is None:
            return future
        if fault.kind is FaultKind.SLOW_STEP:
            return _delayed(future, fault.delay_s)
        return _failed(future, _ERRORS[fault.kind](f"{fault.kind} was injected"))

    def on_death(self, hear: Callable[[DeviceDeadError], None]) -> None:
        """See ``core.plan.ModelRunner``."""
        self._death.on_death(hear)

    def close(self) -> None:
        """See ``core.plan.ModelRunner``."""
        self._runner.close()

    def _due(self, plan: SchedulerOutput) -> _Fault | None:
        """The first fault that concerns a step, which is then used up once."""
        for fault in self._faults:
            if fault.request_id is None or _holds(plan, fault.request_id):
                if fault.kind is not FaultKind.REQUEST_EXCEPTION:
                    fault.num_steps -= 1
                    if not fault.num_steps:
                        self._faults.remove(fault)
                return fault
        return None


def _holds(plan: SchedulerOutput, request_id: str) -> bool:
    return any(
        s.request_id == request_id or s.request_id.startswith(f"{request_id}/")
        for s in plan.scheduled
    )


def _failed(inner: Future[ModelRunnerOutput], error: Exception) -> Future[ModelRunnerOutput]:
    """A future that fails when the step inside is done."""
    outer: Future[ModelRunnerOutput] = Future()
    inner.add_done_callback(lambda _: outer.set_exception(error))
    return outer


def _delayed(inner: Future[ModelRunnerOutput], delay_s: float) -> Future[ModelRunnerOutput]:
    """A future that says what the step inside does, some time later."""
    outer: Future[ModelRunnerOutput] = Future()
    loop = asyncio.get_running_loop()

    def copy() -> None:
        error = inner.exception()
        if error is None:
            outer.set_result(inner.result())
        else:
            outer.set_exception(error)

    inner.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.call_later, delay_s, copy))
    return outer
