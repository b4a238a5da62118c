"""A device on virtual time that goes wrong on plan: the simulated one of the scheduler's tests.

What it holds against a plan is not a failing step, so it is kept in ``broken`` and ends the world.
"""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from streamserve.config import CacheConfig, SchedulerConfig
from streamserve.core.death import Death
from streamserve.core.plan import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from streamserve.errors import DeviceDeadError, OutOfMemoryError
from tests.unit.simulated import VOCAB_SIZE, SimulatedRunner

_MOST_STEPS = 1000  # in a world that ends there are some dozens


class BrokenWorldError(BaseException):
    """Leaves the engine by a way on which nothing is caught."""


class StepError(Exception):
    """A step has failed."""


@dataclass(frozen=True)
class Faults:
    """What goes wrong. ``rate`` of the steps fail, those with a request in ``culprits`` always."""

    rate: float = 0.0
    launch_share: float = 0.0  # of the failing ones: already when they are launched
    contagious: bool = False  # a step that is in flight behind a failed one fails, too
    culprits: frozenset[str] = frozenset()
    max_tokens: int | None = None  # there is no memory for more
    dies_at: int | None = None  # step


@dataclass
class _Queued:
    plan: SchedulerOutput
    future: Future[ModelRunnerOutput]
    error: Exception | None


class Salts(dict[str, str]):
    """By request id; an answer's is that of the request that it belongs to."""

    def __missing__(self, request_id: str) -> str:
        base, slash, _ = request_id.rpartition("/")
        return self[base] if slash else "probe"


def base_of(request_id: str) -> str:
    """The id that a request was made with, of one of its answers'."""
    return request_id.partition("/")[0]


def likely(context: int, count: int) -> tuple[tuple[int, float], ...]:
    """What may follow where ``context`` is the hash of all before: the likeliest tokens."""
    first = context % VOCAB_SIZE
    order = sorted(range(VOCAB_SIZE), key=lambda t: (t != first, hash((context, t))))
    return tuple((token, -0.25 - 0.5 * place) for place, token in enumerate(order[:count]))


@dataclass
class SimulatedDevice:
    """A ``ModelRunner``. Steps end one after the other, each after a time of its own."""

    cache: CacheConfig
    config: SchedulerConfig
    faults: Faults
    rng: random.Random
    max_step_s: float
    num_compilations: int = 0
    broken: BaseException | None = None
    is_closed: bool = False
    num_ended: int = 0
    num_failed: int = 0
    deserted: set[str] = field(default_factory=set)  # base ids that nobody reads any more
    failed_alone: set[str] = field(default_factory=set)  # base ids; "probe" for the engine's own

    def __post_init__(self) -> None:
        self.runner = SimulatedRunner(self.cache, self.config)
        self.runner.salts = Salts()
        self._num_logprobs: dict[str, int] = {}
        self._logprobs: dict[int, list[list[TokenLogprobs]]] = {}
        self._plan: SchedulerOutput | None = None
        self._queue: list[_Queued] = []
        self._error: Exception | None = None  # of the newest step
        self._death = Death()
        self.on_death = self._death.on_death

    @property
    def is_dead(self) -> bool:
        return self._death.cause is not None

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def die(self) -> None:
        """Between two steps, or in one, which may be the last that ends well."""
        cause = DeviceDeadError("the device has died")
        for queued in self._queue[self.rng.randint(0, 1) :]:
            queued.error = cause
        self._death.tell(cause)

    def launch(self, plan: SchedulerOutput) -> None:
        try:
            assert plan.step_id < _MOST_STEPS, "it goes round in circles"
            for s in plan.scheduled:
                assert base_of(s.request_id) not in self.deserted, "computed for nobody"
            self.runner.launch(plan)
            self._find_logprobs(plan)
        except BaseException as error:
            self._break(error)
        self._plan = plan
        error = self._error_of(plan)
        if error and (self.is_dead or self.rng.random() < self.faults.launch_share):
            self._fail(plan, len(self.runner.in_flight) - 1)
            raise error
        self._error = error

    def sample(self, step_id, masks=None) -> Future[ModelRunnerOutput]:
        plan = self._plan
        assert plan is not None
        assert plan.step_id == step_id
        queued = _Queued(plan, Future(), self._error)
        self._queue.append(queued)
        if len(self._queue) == 1:
            self._start()
        return queued.future

    def close(self) -> None:
        self.is_closed = True

    def _start(self) -> None:
        """The oldest step begins; some are done before anybody can wait for them."""
        if self.rng.random() < 0.3:
            self._end()
        else:
            seconds = self.rng.random() * self.max_step_s
            asyncio.get_running_loop().call_later(seconds, self._end)

    def _end(self) -> None:
        queued = self._queue.pop(0)
        if queued.error is None:
            try:
                output = self.runner.retire()
            except BaseException as error:
                self._break(error)
            assert output.step_id == queued.plan.step_id
            self.num_ended += 1
            queued.future.set_result(replace(output, logprobs=self._logprobs.pop(output.step_id)))
        else:
            self._fail(queued.plan, 0)
            if self.faults.contagious:
                for later in self._queue:
                    later.error = later.error or StepError("behind a step that failed")
            queued.future.set_exception(queued.error)
        if self._queue:
            self._start()

    def _break(self, error: BaseException) -> None:
        self.broken = self.broken or error
        raise BrokenWorldError from error

    def _error_of(self, plan: SchedulerOutput) -> Exception | None:
        faults = self.faults
        if self.is_dead:
            return self._death.cause
        if faults.dies_at is not None and plan.step_id >= faults.dies_at:
            return DeviceDeadError("the device has died")
        if any(base_of(s.request_id) in faults.culprits for s in plan.scheduled):
            return StepError("no step can have this request")
        if faults.max_tokens is not None and plan.num_tokens > faults.max_tokens:
            return OutOfMemoryError(f"no memory for more than {faults.max_tokens}")
        if self.rng.random() < faults.rate:
            return StepError("for no reason")
        return None

    def _fail(self, plan: SchedulerOutput, index: int) -> None:
        self.num_ended += 1
        self.num_failed += 1
        assert self.runner.fail(index) == plan.step_id
        self._logprobs.pop(plan.step_id)
        if len(plan.scheduled) == 1:
            request_id = plan.scheduled[0].request_id
            is_probe = request_id.startswith("probe")
            self.failed_alone.add("probe" if is_probe else base_of(request_id))

    def _find_logprobs(self, plan: SchedulerOutput) -> None:
        for new in plan.new_requests:
            self._num_logprobs[new.request_id] = new.sampling_params.logprobs or 0
        found: list[list[TokenLogprobs]] = []
        for s in plan.scheduled:
            count = self._num_logprobs[s.request_id]
            if not count or not s.sample:
                found.append([])
                continue
            request = self.runner.requests[s.request_id]
            top = likely(self.runner._context(request, s.start + len(s.token_ids)), count)
            found.append([TokenLogprobs(*top[0], top)])
        self._logprobs[plan.step_id] = found
