"""What runs in the next step. One budget of tokens, one order, two counters per request.

A request is ``num_tokens`` and ``num_computed_tokens``; every step lets the second chase the
first. A new prompt, a chunk of a long one, a decode, and a resume after preemption are the same
path. Everything here is plain integers and lives on the event loop's thread.

A step is *in flight* from ``schedule`` until ``update`` or ``fail_step`` retires it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

from streamserve.config import SchedulerConfig
from streamserve.core.admission import MAX_NUM_HASHED, Admission
from streamserve.core.clock import Clock
from streamserve.core.continuation import Continuation
from streamserve.core.door import Door
from streamserve.core.fairness import FairShare
from streamserve.core.forced import FindForced
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.limits import ContextLimits
from streamserve.core.model_drafts import ModelDrafts
from streamserve.core.plan import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from streamserve.core.policy import POLICIES
from streamserve.core.prefill import PrefillPacer, chunk_tokens_of
from streamserve.core.prefix_groups import PrefixGrouping, check_groups
from streamserve.core.recovery import Recovery
from streamserve.core.request import FinishReason, Request, RequestStatus, take_found
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.seats import Seats
from streamserve.core.speculation import Propose, SpeculationStats, Speculator
from streamserve.core.step import Step
from streamserve.core.step_time import StepTimeModel
from streamserve.core.stopping import append_tokens
from streamserve.errors import DeadlineUnreachableError


class RequestUpdate(NamedTuple):
    """What a retired step means for one request. A tuple: one is made per request and step.

    ``logprobs`` is as long as ``new_token_ids`` when the request asked for them, else empty.
    ``finish_reason`` is set when the request ended with the last of these tokens.
    """

    request: Request
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None


class Scheduler:
    """Continuous batching over a paged KV cache. Not thread-safe: one thread owns it.

    ``plan = schedule()``, launch and sample it, ``update(output)`` (or ``fail_step``), in the
    order of the plans; with ``max_steps_in_flight`` of 2, ``schedule`` may be called once more
    before the first plan's result is there.

    ``kv_cache`` belongs to this scheduler alone from here on.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv_cache: KVCacheManager,
        clock: Clock,
        step_time: StepTimeModel | None = None,
        propose: Propose | None = None,
    ) -> None:
        """Without ``step_time``, chunks are sized by the token budget alone, and every draft is
        tried. ``propose``: drafts from elsewhere, where ``config.speculative`` asks for some.
        """
        self.config = config
        self.pacer = PrefillPacer(config, step_time)
        self.kv_cache = kv_cache
        self.prefix_grouping = PrefixGrouping(config, kv_cache.block_size)
        self._clock = clock
        self._policy = POLICIES[config.policy]
        self._shares = FairShare(clock) if self._policy.keeps_shares else None
        num_kv_tokens = kv_cache.num_blocks * kv_cache.block_size
        self._limits = ContextLimits(config.max_model_len, num_kv_tokens)
        self._in_flight: deque[Step] = deque()
        # A seat is worth at least one token per step, so that no decode ever waits for budget.
        num_seats = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._seats = Seats(num_seats, kv_cache, self._policy)
        self._backoffs = self.pacer.chunk_backoff, self._seats.backoff
        self.recovery = Recovery(self._seats)
        self._continuation = Continuation(self._seats, kv_cache)
        self._admission = Admission(self._seats, kv_cache, self._policy, clock, self._in_flight)
        backlog = self._admission.backlog
        self._door = Door(config, self._seats, backlog, clock, step_time, self._shares)
        speculative = config.speculative
        self._speculator = (
            Speculator(config, speculative, step_time, propose)
            if speculative is None or speculative.method == "ngram"
            else ModelDrafts(config, speculative, step_time)
        )
        self._may_draft = self._speculator.is_needed
        self._next_step_id = 0
        self._arrivals = count()

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._seats.requests)

    @property
    def num_running(self) -> int:
        """Requests with a seat."""
        return len(self._seats.running)

    def count_waiting_tokens(self) -> int:
        """Tokens to be computed for those who wait. Looks at each of them."""
        return sum(r.num_tokens for r in self._seats.waiting)

    @property
    def num_waiting(self) -> int:
        """Requests without a seat, preempted ones among them."""
        return len(self._seats.waiting)

    @property
    def seconds_to_seat(self) -> float:
        """When a request that came now would have its seat, behind all that wait."""
        return self._admission.backlog.seconds_until(self.num_waiting + 1)

    @property
    def num_paused(self) -> int:
        """Requests that ask for no seat: their readers take nothing."""
        return len(self._seats.paused)

    @property
    def num_pauses(self) -> int:
        """Times that a request was paused, since the start."""
        return self._seats.num_pauses

    @property
    def speculation_stats(self) -> SpeculationStats:
        """What was drafted, and how much of it was right."""
        return self._speculator.stats

    @property
    def num_steps_in_flight(self) -> int:
        """Steps that were scheduled and not retired."""
        return len(self._in_flight)

    @property
    def max_model_len(self) -> int:
        """Prompt and answer together: ``SchedulerConfig``'s limit or what the KV cache holds."""
        return self._limits.max_num_tokens

    def get(self, request_id: str) -> Request | None:
        """The request that waits or runs under this id."""
        return self._seats.requests.get(request_id)

    def is_taken(self, request_id: str) -> bool:
        """Whether ``add`` would refuse this id."""
        return self._seats.is_taken(request_id)

    def uses_adapter(self, slot: int) -> bool:
        """Whether a request has it, or had it in a step in flight. Looks at each of them."""
        return any(request.adapter == slot for request in self._seats.everyone())

    def check_fits(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        """Raise ``ContextLengthError`` unless the request, alone, could run to its full length."""
        self._limits.check(num_prompt_tokens, params)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises ``ContextLengthError`` if it can never fit, ``QueueFullError`` if too many wait,
        ``DeadlineUnreachableError`` if its limits of time cannot be kept,
        ``ValueError`` if its id is in use (a finished request's id is, until its last step has
        retired).
        """
        self.check_fits(request.num_prompt_tokens, request.sampling_params)
        self._door.check_room(request)
        self._enter(request)
        try:
            self._door.check_time(request)
        except DeadlineUnreachableError:
            del self._seats.requests[request.request_id]
            raise
        self._admission.backlog.queued(len(self._seats.waiting))
        self._admission.queued(request)
        self._seats.queue(request)

    def add_probe(self, request: Request) -> None:
        """Queue a request that runs alone before all others: whether a step can run at all.

        ``max_num_waiting`` does not apply. Raises as ``add`` does otherwise.
        """
        self.check_fits(request.num_prompt_tokens, request.sampling_params)
        self._enter(request)
        self._seats.queue(request)
        self.recovery.suspect_first(request)

    def add_choices(self, source: Request, others: Sequence[Request]) -> None:
        """Queue more requests with the prompt of ``source``, which was added just now.

        They wait until it has computed the prompt, share what it wrote, and sample their own; if it
        ends before, each goes its own way. ``max_num_waiting`` does not apply: the first was let
        in.
        Raises ``ValueError`` as ``add`` does, and has then queued none.
        """
        entered: list[Request] = []
        try:
            for request in others:
                request.block_hashes = list(source.block_hashes)
                self._enter(request)
                entered.append(request)
        except ValueError:
            for request in entered:
                del self._seats.requests[request.request_id]
            raise
        for request in others:
            request.fork_source = source
            self._seats.queue(request)

    def guide(self, request: Request, find_forced: FindForced) -> None:
        """Draft what must follow the tokens of a request that was added and has not ended."""
        self._speculator.guide(request, find_forced)
        self._may_draft = self._speculator.is_needed

    def pause(self, request: Request) -> None:
        """Generate nothing more for a request that has not ended, until ``resume``.

        Its seat goes to others at once, or when the step in flight retires; what it has computed
        stays cached while there is room. Idempotent.
        """
        if not request.is_finished:
            self._seats.pause(request)

    def resume(self, request: Request) -> None:
        """Go on with a paused request: it waits for a seat at its old place. Idempotent."""
        if not request.is_finished:
            if request.is_paused and self._shares is not None and request.account is not None:
                self._shares.begin_waiting(request.account)
            self._seats.resume(request)

    def choose(self, request: Request, token_id: int) -> None:
        """Go on with the token that was chosen for a request which ``chooses_on_host``."""
        assert request.num_pending_tokens == 1
        assert not request.num_steps_in_flight
        request.num_pending_tokens = 0
        request.token_ids.append(token_id)

    def fork(self, parent: Request, child: Request) -> None:
        """Add ``child``, which shares with ``parent`` the written tokens they have in common.

        The child takes a seat at once and shares by reference count; where there is no seat, or
        the parent does not run, it waits like any other and shares what is cached by then.
        ``max_num_waiting`` does not apply: the parent was let in. Raises as ``add`` does otherwise.
        """
        self.check_fits(child.num_prompt_tokens, child.sampling_params)
        self._enter(child)
        seats = self._seats
        if parent.status is not RequestStatus.RUNNING or len(seats.running) >= seats.num_seats:
            seats.queue(child)
            return
        num_shared = self.kv_cache.fork(parent, child)
        child.num_charged_outputs = parent.num_charged_outputs
        child.num_cached_tokens = min(num_shared, child.num_prompt_tokens)
        seats.seat(child)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        num_output_tokens: int | None = None,
        stop_reason: int | str | None = None,
    ) -> bool:
        """End a request: the one way out, taken exactly once. A second call returns ``False``.

        ``num_output_tokens`` discards the output tokens behind it, from the request's ids and
        from the prefix cache: a stop string was found late. (Blocks that others share, or that a
        preempted request gave back before, stay cached: they hold what was really computed.)
        A step in flight that has the request goes on; its result is ignored, and the blocks
        return when it retires.
        """
        if request.status is RequestStatus.FINISHED:
            return False
        was_running = request.status is RequestStatus.RUNNING
        self._seats.finish(request)
        if self.recovery.is_active:
            self.recovery.forget(request)
        if request.forced is not None:
            self._speculator.leave(request)
            self._may_draft = self._speculator.is_needed
        request.finish_reason = reason
        request.stop_reason = stop_reason
        if num_output_tokens is not None:
            assert 0 <= num_output_tokens <= request.num_output_tokens
            del request.token_ids[request.num_prompt_tokens + num_output_tokens :]
            del request.block_hashes[request.num_tokens // self.kv_cache.block_size :]
        if was_running:
            self._seats.release(request)
        return True

    def _enter(self, request: Request) -> None:
        assert request.status is RequestStatus.WAITING
        request.max_num_tokens = self._limits.num_tokens_at_end(
            request.num_prompt_tokens, request.sampling_params
        )
        if request.num_tokens >= request.max_num_tokens:
            raise ValueError(
                f"token_ids must leave room for one more of {request.max_num_tokens},"
                f" got {request.num_tokens}"
            )
        self._seats.enter(request)
        self.kv_cache.recognise(request)
        if self._shares is not None:
            self._shares.enter(request)
        if self._policy.looks_up_prefix or request.time_limits is not None:
            num_cached = self.kv_cache.estimate_cached(request, MAX_NUM_HASHED)
            request.num_uncached_tokens = request.num_tokens - num_cached
        request.sort_key = self._policy.key(request, next(self._arrivals))

    def schedule(self) -> SchedulerOutput | None:
        """The next plan, or ``None``: nothing to launch before something else happens.

        Running requests come first, in policy order. Each that needs one token has it set aside
        for it; longer ones and then waiting ones share the rest. Since requests are visited in
        policy order and the victims of preemption are the last in it, none is in the plan yet.
        """
        if len(self._in_flight) >= self.config.max_steps_in_flight or not self._seats.requests:
            return None
        if self.recovery.is_active:
            return self._schedule_alone()
        seats, overtakes = self._seats, self._policy.overtakes
        continue_request = self._continuation.put
        if self._shares is not None and self._shares.reorder(seats.requests.values()):
            seats.sort()
        running, waiting = seats.running, seats.waiting
        num_free = max(seats.num_seats - len(running), 0)
        drafts = None
        if self._may_draft:
            num_coming = min(len(waiting), num_free)
            num_slots = self.kv_cache.num_spare_states - num_coming
            if not self._in_flight:
                drafts = self._speculator.plan(running, len(running) + num_coming, num_slots)
            elif self._speculator.should_wait(running, num_slots):
                return None
        prefill = self.pacer.open(running, waiting, num_free, self._clock, drafts)
        step = Step(self._next_step_id, prefill, None if drafts is None else drafts.token_ids)
        contested = waiting and running and overtakes(waiting[0], running[-1])
        index = 0
        while index < len(running):
            request = running[index]
            if contested and waiting and overtakes(waiting[0], request):
                index += self._admission.admit_before(request, step)
                if index >= len(running) or running[index] is not request:
                    continue
            continue_request(request, step)
            if index < len(running) and running[index] is request:
                index += 1
        if not (step.is_blocked or step.preempted) or not step.requests:
            self._admission.admit_waiting(step)
        return self._launch(step)

    def _schedule_alone(self) -> SchedulerOutput | None:
        """A step of one request that was in one which failed, at any cost to the others."""
        if self._in_flight:
            return None
        request, running = self.recovery.suspect, self._seats.running
        self._seats.resume(request)  # its reader pauses it again by what this step gives it
        step = Step(self._next_step_id, self.pacer.open_alone(), is_alone=True)
        while True:
            if request.status is RequestStatus.RUNNING:
                self._continuation.put(request, step)
            else:
                self._admission.admit_alone(request, step)
            if step.requests or self.kv_cache.has_loads:
                return self._launch(step)
            victim = next((r for r in reversed(running) if r is not request), None)
            assert victim is not None, f"{request}: no room for it alone"
            self._seats.preempt(victim)

    def _launch(self, step: Step) -> SchedulerOutput | None:
        plan = step.plan
        if not step.requests and not self.kv_cache.has_loads:
            requests = self._seats.requests.values()
            if self._in_flight or all(r.is_paused or r.num_pending_tokens for r in requests):
                return None
            # What waits for its token to be chosen holds what others need.
            assert self._seats.take_idle(), "live requests, none of which can run"
            return self.schedule()
        plan.released_ids.extend(self._seats.released_ids)
        self._seats.released_ids.clear()
        self.kv_cache.complete(plan, step.requests)
        plan.prefix_groups.extend(self.prefix_grouping.update(step))
        if self._may_draft:
            self._speculator.ask(step.requests, plan, self.kv_cache, self.num_running)
        self._next_step_id += 1
        if self._shares is not None:
            self._shares.charge(step)
        step.overlaps = bool(self._in_flight)
        self._in_flight.append(step)
        return plan

    def update(self, output: ModelRunnerOutput) -> list[RequestUpdate]:
        """Retire the oldest step: append its ids, end what has ended, index what is full.

        Returns one update for each request that got tokens, in the plan's order. Requests that
        ended while the step was in flight are passed over.
        """
        step = self._retire_step(output)
        updates: list[RequestUpdate] = []
        seats, block_size, recovery = self._seats, self.kv_cache.block_size, self.recovery
        recovers = recovery.is_active
        step_id, logprobs, new_tuple = output.step_id, output.logprobs, tuple.__new__
        drafts = output.drafts
        rows = zip(step.requests, step.plan.scheduled, output.sampled_token_ids, strict=True)
        for i, (request, (_, start, token_ids, _, sample, _), sampled_ids) in enumerate(rows):
            request.num_steps_in_flight -= 1
            if step_id > request.failed_step_id:
                recovery.step_retired(request)
                continue
            end = start + len(token_ids)
            if sample > 1:
                end -= self._settle_drafts(request, sample, len(sampled_ids))
            request.num_written_tokens = end
            if request.status is RequestStatus.FINISHED:
                seats.release(request)
                continue
            if sample and request.chooses_on_host:
                updates.append(RequestUpdate(request, [], logprobs[i] if logprobs else [], None))
            elif sample:
                request.num_pending_tokens -= 1
                new_token_ids, reason, stop_id = append_tokens(request, sampled_ids)
                new_logprobs = [] if logprobs is None else logprobs[i][: len(new_token_ids)]
                updates.append(
                    new_tuple(RequestUpdate, (request, new_token_ids, new_logprobs, reason))
                )
                if reason is not None:
                    self.finish(request, reason, stop_reason=stop_id)
                    continue
                if sample > 1:
                    self.kv_cache.settle_drafts(request)
                if drafts is not None:
                    request.drafts = drafts.get(request.request_id, [])
            if end // block_size > start // block_size:
                self.kv_cache.cache_blocks(request)
            if request.computing_hash is not None:
                seats.claims.update(request)
            if seats.yielding:
                seats.step_retired(request)
            if recovers:
                recovery.went_well(request)
        return updates

    def _retire_step(self, output: ModelRunnerOutput) -> Step:
        """Take the oldest step out of flight, and learn from how it went."""
        if not self._in_flight or self._in_flight[0].plan.step_id != output.step_id:
            raise ValueError(f"step {output.step_id} is not the oldest step in flight")
        step = self._in_flight.popleft()
        self.kv_cache.retire(step.plan)
        self.pacer.observe(step.plan, output)
        if self._may_draft:
            self._speculator.drafted(step.plan, output)
            if output.duration_s is not None:
                self._speculator.host_time.observe(
                    self._clock(),
                    len(step.requests),
                    output.duration_s + (output.drafting_s or 0.0),
                    overlaps=step.overlaps,
                )
        if output.prompt_logprobs or output.pooled:
            take_found(self._seats.requests, output)
        for backoff in self._backoffs:
            if backoff.is_reduced:
                backoff.went_well()
        return step

    def _settle_drafts(self, request: Request, num_sampled: int, num_right: int) -> int:
        """Go back behind the drafts that were right; returns how many were not."""
        num_wrong = num_sampled - num_right
        request.num_computed_tokens -= num_wrong
        request.num_draft_tokens = 0
        self._speculator.verified(request, num_sampled - 1, num_right - 1)
        return num_wrong

    def fail_step(self, step_id: int, *, out_of_memory: bool = False) -> list[Request]:
        """Retire a step that raised; returns the requests that it ended with ``ERROR``.

        Its requests are rolled back to what was written before it, and then run alone, once: a
        step made for one request alone ends it. Where it was ``out_of_memory`` and had a chunk to
        halve, they just try again with half of it.

        Any step in flight may fail. Nothing that it wrote, and nothing that a later step wrote on
        top for the same requests, counts or enters the prefix cache.
        """
        step = next((s for s in self._in_flight if s.plan.step_id == step_id), None)
        if step is None:
            raise ValueError(f"step {step_id} is not in flight")
        self._in_flight.remove(step)
        self.kv_cache.retire(step.plan, failed=True)
        is_smaller = out_of_memory and (
            self.pacer.chunk_backoff.halve(chunk_tokens_of(step.plan))
            or self._seats.backoff.halve(len(step.requests))
        )
        failed: list[Request] = []
        for request, scheduled in zip(step.requests, step.plan.scheduled, strict=True):
            request.num_steps_in_flight -= 1
            if request.status is RequestStatus.FINISHED:
                request.failed_step_id = min(request.failed_step_id, step_id)
                self._seats.release(request)
            elif step.is_alone and not is_smaller:
                self.finish(request, FinishReason.ERROR)
                failed.append(request)
            else:
                num_drafts = max(scheduled.sample - 1, 0)
                end = scheduled.start + len(scheduled.token_ids) - num_drafts
                self.recovery.undo(request, step_id, None if is_smaller else end)
        return failed

    def check_integrity(self) -> None:
        """Assert every invariant of the scheduler and its KV cache. O(blocks + requests)."""
        self.kv_cache.check_integrity()
        self._seats.check_integrity()
        for step in self._in_flight:
            check_groups(step, self.kv_cache.block_size)
