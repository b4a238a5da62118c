"""A runner with a drafter beside it, whose guesses the next step tries.

    target      [ step 1 ]                    [ step 2: 1 token and 3 drafts ]
    drafter              [feed][ 2 ][ 3 ]                                     [feed][ 2 ][ 3 ]
    event loop                            └─ ids, drafts → plan 2                             └─ …

A drafter is a draft model (`model_drafter`) or a head of the target's hidden states
(`head_drafter`). It has KV caches of its own whose blocks have the target's ids: so what is shared,
copied or kept of a prefix is so for both. Behind each step of the target it is fed what is known
then; where guesses are wanted (``SchedulerOutput.num_drafts``) that yields the first, and each
further guess is a step of one token. It runs while the target waits: a CPU's cores are busy with
either anyhow. A wrong guess leaves keys and values behind that the next feed overwrites.

While no guesses pay, what would be fed is only remembered, and fed some at a time when they are
wanted again. A prefix that was computed meanwhile is cached without the drafter's keys and values:
what it guesses behind that may be wrong.

A drafter that fails costs its guesses, never an answer.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from streamserve.core.clock import Clock, monotonic
from streamserve.core.plan import (
    Masks,
    ModelRunner,
    ModelRunnerOutput,
    NewRequest,
    SchedulerOutput,
)
from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import DeviceDeadError

logger = logging.getLogger(__name__)

_LIKELIEST = SamplingParams(temperature=0.0)

Guesses = dict[str, int]
"""The likeliest token behind each request that was asked for one, by request id."""


@dataclass(slots=True, kw_only=True)
class Followed:
    """A live request, as a drafter has it."""

    num_fed: int = -1  # leading positions whose keys and values it has; negative: not yet seen
    num_blocks: int = 0  # that the target has told of
    new_block_ids: list[int] = field(default_factory=list)  # of these, not yet in a drafter's plan


RequestT = TypeVar("RequestT", bound=Followed)


class Drafter(ABC, Generic[RequestT]):
    """What guesses behind a target's steps. Its methods are for the target's device thread."""

    most_late: ClassVar[int] = 64
    """Tokens of a request, of before its step, that are fed together."""

    def __init__(self) -> None:
        self._requests: dict[str, RequestT] = {}
        # Who came and went, until a step of the drafter says so.
        self._new: dict[str, NewRequest] = {}
        self._released_ids: list[str] = []
        self._next_step_id = 0

    def book(self, plan: SchedulerOutput) -> None:
        """Takes over what a plan says about requests, whatever became of its step."""
        requests = self._requests
        for request_id in plan.released_ids:
            self._forget(requests.pop(request_id))
            self._left(request_id)
        for new in plan.new_requests:
            requests[new.request_id] = self._follow(new)
            self._came(new)
        for scheduled in plan.scheduled:
            request = requests[scheduled.request_id]
            request.num_blocks += len(scheduled.new_block_ids)
            request.new_block_ids.extend(scheduled.new_block_ids)
            if request.num_fed < 0:
                request.num_fed = scheduled.start  # what the cache had

    @abstractmethod
    def feed(self, plan: SchedulerOutput, sampled: list[list[int]], *, keeps_up: bool) -> Guesses:
        """Behind a step that went well, and ``sampled`` so: the first guesses that it wants.

        Without ``keeps_up`` nothing is computed but the copies of blocks.
        """

    @abstractmethod
    def guess_on(self, guesses: Guesses) -> Guesses:
        """The next guess of each, behind its last. Who has no room for it is left out."""

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""

    @abstractmethod
    def _follow(self, new: NewRequest) -> RequestT:
        """What is known of a request that comes."""

    def _forget(self, request: RequestT) -> None:
        """A request has left."""

    def _came(self, new: NewRequest) -> None:
        """As the drafter has it: neither penalties nor masks, nor adapters, nor states."""
        self._new[new.request_id] = replace(
            new,
            sampling_params=_LIKELIEST,
            eos_token_ids=frozenset(),
            adapter=None,
            state_slot=None,
        )

    def _left(self, request_id: str) -> None:
        if self._new.pop(request_id, None) is None:
            self._released_ids.append(request_id)

    def _new_plan(self) -> SchedulerOutput:
        self._next_step_id += 1
        return SchedulerOutput(self._next_step_id - 1)

    def _tell(self, plan: SchedulerOutput) -> None:
        """Has a plan say who came and went since the last one."""
        plan.released_ids.extend(self._released_ids)
        plan.new_requests.extend(self._new.values())
        self._released_ids.clear()
        self._new.clear()


class Target(ModelRunner, Protocol):
    """A runner whose steps a drafter follows."""

    def sample(
        self,
        step_id: int,
        masks: Masks | None = None,
        *,
        hear: Callable[[Future[ModelRunnerOutput]], None] | None = None,
    ) -> Future[ModelRunnerOutput]:
        """``hear`` is called where the step resolves, before anything else happens there.

        (A callback that is added to the future comes too late for that if the step is over by then:
        it is called by whoever adds it.)
        """


class DraftingRunner:
    """``core.plan.ModelRunner`` of a ``target``, with the guesses of a ``drafter``.

    A step's result comes when it has been fed and has guessed, and so does the target's next
    forward; ``clock`` measures how long.
    """

    def __init__(self, target: Target, drafter: Drafter[Any], *, clock: Clock = monotonic) -> None:
        self._target = target
        self._drafter = drafter
        self._has_failed = False
        self._clock = clock
        self._plans: dict[int, SchedulerOutput] = {}
        self._keeps_up = True

    @property
    def num_compilations(self) -> int:
        """See ``core.plan.ModelRunner``."""
        return self._target.num_compilations

    def on_death(self, hear: Callable[[DeviceDeadError], None]) -> None:
        """See ``core.plan.ModelRunner``. The drafter's death is none."""
        self._target.on_death(hear)

    def launch(self, plan: SchedulerOutput) -> None:
        """See ``core.plan.ModelRunner``."""
        self._target.launch(plan)
        self._plans[plan.step_id] = plan

    def sample(self, step_id: int, masks: Masks | None = None) -> Future[ModelRunnerOutput]:
        """See ``core.plan.ModelRunner``."""
        plan = self._plans.pop(step_id)
        result: Future[ModelRunnerOutput] = Future()
        # Called where the target works, which so waits for the drafter.
        self._target.sample(step_id, masks, hear=lambda done: self._resolve(plan, done, result))
        return result

    def close(self) -> None:
        """See ``core.plan.ModelRunner``."""
        self._target.close()
        self._drafter.close()

    def _resolve(
        self,
        plan: SchedulerOutput,
        done: Future[ModelRunnerOutput],
        result: Future[ModelRunnerOutput],
    ) -> None:
        is_awaited = result.set_running_or_notify_cancel()
        error = done.exception()
        output = None if error is not None else done.result()
        if not self._has_failed:
            try:
                output = self._follow(plan, output)
            except Exception:
                logger.exception("the drafter has failed: nothing is drafted any more")
                self._has_failed = True
        if is_awaited and output is not None:
            result.set_result(output)
        elif is_awaited:
            result.set_exception(error)

    def _follow(
        self, plan: SchedulerOutput, output: ModelRunnerOutput | None
    ) -> ModelRunnerOutput | None:
        """Has the drafter do what the target did, and guess. No ``output``: that failed."""
        began = self._clock()
        drafter = self._drafter
        drafter.book(plan)
        if output is None:
            return None
        wanted = plan.num_drafts
        if wanted:
            self._keeps_up = any(wanted.values())
        guesses = drafter.feed(plan, output.sampled_token_ids, keeps_up=self._keeps_up)
        fed = self._clock()
        if output.duration_s is not None:
            output = replace(output, duration_s=output.duration_s + fed - began)
        if not any(wanted.values()):
            return output
        drafts = {request_id: [guess] for request_id, guess in guesses.items()}
        while guesses:
            guesses = drafter.guess_on(
                {
                    request_id: guess
                    for request_id, guess in guesses.items()
                    if len(drafts[request_id]) < wanted[request_id]
                }
            )
            for request_id, guess in guesses.items():
                drafts[request_id].append(guess)
        return replace(output, drafts=drafts, drafting_s=self._clock() - fed)
