"""A runner with a draft model beside it, whose guesses the next step tries.

    target      [ step 1 ]                    [ step 2: 1 token and 3 drafts ]
    draft                 [feed][ 2 ][ 3 ]                                    [feed][ 2 ][ 3 ]
    event loop                            └─ ids, drafts → plan 2                             └─ …

The draft model is a runner of its own, with caches of its own whose blocks have the target's ids:
so what is shared, copied or kept of a prefix is so for both. Behind each step of the target it is
fed the tokens that are known then; where guesses are wanted (``SchedulerOutput.num_drafts``) the
token that was just sampled is among them, whose successor is the first guess, and each further
guess is a step of one token. It runs while the target waits: a CPU's cores are busy with either
anyhow. A wrong guess leaves keys and values behind that the next feed overwrites.

While no guesses pay, tokens are only remembered, and fed some at a time when they are wanted again.
A prefix that was computed meanwhile is cached without the draft model's keys and values: what it
guesses behind that may be wrong.

A draft model that fails costs its guesses, never an answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from streamserve.core.clock import Clock, monotonic
from streamserve.core.plan import (
    PENDING_TOKEN,
    ModelRunner,
    ModelRunnerOutput,
    NewRequest,
    ScheduledRequest,
    SchedulerOutput,
)
from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import DeviceDeadError

logger = logging.getLogger(__name__)

_LIKELIEST = SamplingParams(temperature=0.0)
_MOST_LATE = 64  # tokens of a request, of before its step, that are fed together


@dataclass(slots=True)
class _Drafted:
    """A live request, as the draft model has it."""

    num_prompt_tokens: int
    num_fed: int = -1  # leading positions whose keys and values it has; negative: not yet seen
    unfed: list[int] = field(default_factory=list)  # the known tokens behind these
    num_blocks: int = 0  # that the target has told of
    new_block_ids: list[int] = field(default_factory=list)  # of these, not yet told the draft model
    last_token_id: int = PENDING_TOKEN  # what the target sampled last


class DraftingRunner:
    """``core.plan.ModelRunner`` of a ``target``, with guesses by ``draft``.

    Both caches have as many blocks, of ``block_size`` tokens; ids below ``vocab_size`` are known to
    both models; ``max_num_batched_tokens`` are the draft model's. A step's result comes when it has
    been fed and has guessed, and so does the target's next forward; ``clock`` measures how long.
    """

    def __init__(
        self,
        target: ModelRunner,
        draft: ModelRunner,
        *,
        block_size: int,
        vocab_size: int,
        max_num_batched_tokens: int,
        clock: Clock = monotonic,
    ) -> None:
        self._target = target
        self._draft = draft
        self._has_failed = False
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._max_num_tokens = max_num_batched_tokens
        self._clock = clock
        self._plans: dict[int, SchedulerOutput] = {}
        self._requests: dict[str, _Drafted] = {}
        # Who came and went, until a step of the draft model says so.
        self._new: dict[str, NewRequest] = {}
        self._released_ids: list[str] = []
        self._keeps_up = True
        self._next_step_id = 0

    @property
    def num_compilations(self) -> int:
        """See ``core.plan.ModelRunner``."""
        return self._target.num_compilations

    def on_death(self, hear: Callable[[DeviceDeadError], None]) -> None:
        """See ``core.plan.ModelRunner``. The draft model's death is none."""
        self._target.on_death(hear)

    def launch(self, plan: SchedulerOutput) -> None:
        """See ``core.plan.ModelRunner``."""
        self._target.launch(plan)
        self._plans[plan.step_id] = plan

    def sample(
        self, step_id: int, masks: Mapping[str, bytes] | None = None
    ) -> Future[ModelRunnerOutput]:
        """See ``core.plan.ModelRunner``."""
        sampled = self._target.sample(step_id, masks)
        plan = self._plans.pop(step_id)
        result: Future[ModelRunnerOutput] = Future()
        # Called where the target works, which so waits for the draft model.
        sampled.add_done_callback(lambda done: self._resolve(plan, done, result))
        return result

    def close(self) -> None:
        """See ``core.plan.ModelRunner``."""
        self._target.close()
        self._draft.close()

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
                logger.exception("the draft model has failed: nothing is drafted any more")
                self._has_failed = True
        if is_awaited and output is not None:
            result.set_result(output)
        elif is_awaited:
            result.set_exception(error)

    def _follow(
        self, plan: SchedulerOutput, output: ModelRunnerOutput | None
    ) -> ModelRunnerOutput | None:
        """Has the draft model do what the target did, and guess. No ``output``: that failed."""
        began = self._clock()
        self._book(plan)
        if output is None:
            return None
        wanted = plan.num_drafts
        if wanted:
            self._keeps_up = any(wanted.values())
        feed = SchedulerOutput(self._new_step_id())
        feed.block_copies.extend(plan.block_copies)
        num_left = self._max_num_tokens
        for scheduled, sampled in zip(plan.scheduled, output.sampled_token_ids, strict=True):
            self._remember(scheduled, sampled)
            if self._keeps_up:
                is_asked = wanted.get(scheduled.request_id, 0) > 0 and bool(sampled)
                num_left -= self._feed(feed, scheduled, is_asked, num_left)
        guesses = self._run(feed)
        fed = self._clock()
        if output.duration_s is not None:
            output = replace(output, duration_s=output.duration_s + fed - began)
        if not any(wanted.values()):
            return output
        drafts = {request_id: [guess] for request_id, guess in guesses.items()}
        while guesses:
            step = SchedulerOutput(self._new_step_id())
            for request_id, guess in guesses.items():
                if len(drafts[request_id]) < wanted[request_id]:
                    start = self._requests[request_id].num_fed
                    self._add(step, request_id, start, [guess], is_asked=True)
            guesses = self._run(step)
            for request_id, guess in guesses.items():
                drafts[request_id].append(guess)
        return replace(output, drafts=drafts, drafting_s=self._clock() - fed)

    def _book(self, plan: SchedulerOutput) -> None:
        """Takes over what the plan says about requests."""
        requests = self._requests
        for request_id in plan.released_ids:
            del requests[request_id]
            if self._new.pop(request_id, None) is None:
                self._released_ids.append(request_id)
        for new in plan.new_requests:
            requests[new.request_id] = _Drafted(new.num_prompt_tokens)
            self._new[new.request_id] = _greedy(new)
        for scheduled in plan.scheduled:
            request = requests[scheduled.request_id]
            request.num_blocks += len(scheduled.new_block_ids)
            request.new_block_ids.extend(scheduled.new_block_ids)
            if request.num_fed < 0:
                request.num_fed = scheduled.start  # what the cache had

    def _remember(self, scheduled: ScheduledRequest, sampled: list[int]) -> None:
        """Takes note of a request's tokens that the step has computed, but for wrong drafts."""
        request = self._requests[scheduled.request_id]
        start, token_ids = scheduled.start, scheduled.token_ids
        if token_ids[0] == PENDING_TOKEN:
            token_ids = [request.last_token_id]
        num_wrong = scheduled.sample - len(sampled) if scheduled.sample > 1 else 0
        known = token_ids[: len(token_ids) - num_wrong]
        if sampled:
            request.last_token_id = sampled[-1]
        request.num_fed = min(request.num_fed, start + len(known))
        num_before = start - request.num_fed  # tokens of before this step that were not fed
        if num_before > 0:
            request.unfed[num_before:] = known
        else:
            request.unfed = known[-num_before:]

    def _feed(
        self, feed: SchedulerOutput, scheduled: ScheduledRequest, is_asked: bool, num_left: int
    ) -> int:
        """Adds what the draft model has not seen of a request, or of much that is late some.

        At most ``num_left`` tokens; returns how many.
        """
        request = self._requests[scheduled.request_id]
        new = request.unfed[: min(len(scheduled.token_ids) + _MOST_LATE, num_left)]
        del request.unfed[: len(new)]
        end = request.num_fed + len(new)
        is_asked = is_asked and not request.unfed and len(new) < num_left
        if is_asked and end < request.num_blocks * self._block_size:
            new.append(request.last_token_id)
        else:
            is_asked = False
        if new:
            new = [token_id if token_id < self._vocab_size else 0 for token_id in new]
            self._add(feed, scheduled.request_id, request.num_fed, new, is_asked=is_asked)
        return len(new)

    def _add(
        self,
        step: SchedulerOutput,
        request_id: str,
        start: int,
        token_ids: list[int],
        *,
        is_asked: bool,
    ) -> None:
        """Adds a request's tokens to a plan of the draft model, if its blocks have room."""
        request = self._requests[request_id]
        end = start + len(token_ids)
        if end > request.num_blocks * self._block_size:
            return
        step.scheduled.append(
            ScheduledRequest(
                request_id,
                start,
                token_ids,
                request.new_block_ids,
                int(is_asked),
                max(end - request.num_prompt_tokens, 0),
            )
        )
        request.new_block_ids = []
        request.num_fed = end

    def _run(self, plan: SchedulerOutput) -> dict[str, int]:
        """The likeliest token behind each request of a plan that asks for it."""
        if not plan.scheduled and not plan.block_copies:
            return {}
        plan.released_ids.extend(self._released_ids)
        plan.new_requests.extend(self._new.values())
        self._released_ids.clear()
        self._new.clear()
        self._draft.launch(plan)
        output = self._draft.sample(plan.step_id).result()
        return {
            scheduled.request_id: sampled[0]
            for scheduled, sampled in zip(plan.scheduled, output.sampled_token_ids, strict=True)
            if sampled and sampled[0] < self._vocab_size
        }

    def _new_step_id(self) -> int:
        self._next_step_id += 1
        return self._next_step_id - 1


def _greedy(new: NewRequest) -> NewRequest:
    """The request as the draft model has it: neither penalties nor masks nor adapters."""
    return replace(new, sampling_params=_LIKELIEST, eos_token_ids=frozenset(), adapter=None)
