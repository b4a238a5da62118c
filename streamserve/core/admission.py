"""Who gets a free seat, and whose seat is taken for a waiting request that outranks its holder."""

from __future__ import annotations

from collections.abc import Sized
from enum import Enum, auto

from streamserve.core.backlog import Backlog
from streamserve.core.clock import Clock
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.policy import Policy
from streamserve.core.prefix_cache import num_common_tokens
from streamserve.core.request import Request, RequestStatus
from streamserve.core.seats import Seats
from streamserve.core.step import Step

MAX_NUM_HASHED = 256
"""Blocks of one waiting prompt in one step, well under a millisecond."""

_MOST_COMPARED = 32
"""Requests that one is compared with, token by token, for what they have in common."""


class _Answer(Enum):
    ADMITTED = auto()
    AWAITS_PREFIX = auto()  # another computes what this one needs, or the look-up goes on
    NO_ROOM = auto()


class Admission:
    """Seats waiting requests in policy order and schedules their first tokens."""

    def __init__(
        self, seats: Seats, kv_cache: KVCacheManager, policy: Policy, clock: Clock, in_flight: Sized
    ) -> None:
        """``in_flight`` are the steps that were scheduled and not retired."""
        self.backlog = Backlog(clock)
        self._seats = seats
        self._kv_cache = kv_cache
        self._policy = policy
        self._in_flight = in_flight

    def admit_waiting(self, step: Step) -> None:
        """Seat waiting requests in policy order, until something runs out."""
        waiting = self._seats.waiting
        index = 0
        while index < len(waiting):
            answer = self._admit(waiting[index], step)
            if answer is _Answer.NO_ROOM:
                return
            if answer is _Answer.AWAITS_PREFIX:
                index += 1

    def admit_before(self, request: Request, step: Step) -> int:
        """Seat the waiting requests that overtake ``request``; others yield to who outranks them.

        Returns by how many places ``request`` moved. It may be among those that lost their seat.
        """
        num_admitted = 0
        index = 0
        overtakes = self._policy.overtakes
        waiting = self._seats.waiting
        while index < len(waiting) and overtakes(waiting[index], request):
            candidate = waiting[index]
            answer = self._admit(candidate, step)
            if answer is _Answer.ADMITTED:
                num_admitted += 1
            elif answer is _Answer.AWAITS_PREFIX:
                index += 1
            elif not self._yield_to(candidate, request, step):
                break
        return num_admitted

    def _yield_to(self, candidate: Request, turn: Request, step: Step) -> bool:
        """Take seats for a waiting request that outranks their holders; ``False`` if not now.

        Not from those before ``turn``, which had theirs in this step.
        """
        seats = self._seats
        if step.is_blocked or not seats.running or seats.awaits_blocks:
            return False
        if step.refused is candidate:
            return False  # it is asked for at each place that it would overtake
        victims = list(self._policy.victims(candidate, seats.running))
        if not victims or victims[0].sort_key < turn.sort_key:
            step.refused = candidate
            return False
        has_seat = len(seats.running) < seats.num_seats
        if has_seat and step.prefill.is_spent:
            return False  # more urgent prompts have all the tokens of this step
        # What yields is gained, and so is what was reserved for it.
        num_spare = self._kv_cache.num_free_blocks - len(seats.running)
        gains = [len(request.block_table) + 1 for request in victims]
        block_size = self._kv_cache.block_size
        if (num_spare + sum(gains)) * block_size < candidate.num_tokens:
            step.refused = candidate
            return False  # it would not help
        num_cached = candidate.num_prompt_tokens - candidate.num_uncached_tokens
        num_needed = candidate.num_tokens - num_cached
        for victim, gain in zip(victims, gains, strict=True):
            if seats.take(victim, step):
                return True
            num_spare += gain
            if num_spare * block_size >= num_needed:
                break
        return False  # a step has them: they all leave when it retires

    def _admit(self, request: Request, step: Step) -> _Answer:
        """Seat a waiting request and schedule its first tokens, if everything it needs is there."""
        if request.num_pending_tokens:
            return _Answer.AWAITS_PREFIX  # preempted while its next token was being chosen
        if request.fork_source is not None:
            answer = self._admit_fork(request, request.fork_source, step)
            if answer is not None:
                return answer
        return self.admit_alone(request, step)

    def admit_alone(self, request: Request, step: Step) -> _Answer:
        """Seat a waiting request that shares nothing with another one, if there is room.

        A step that is made for it alone waits for nobody who computes the same prefix.
        """
        claims, running = self._seats.claims, self._seats.running
        awaited_hash = None if step.is_alone else request.awaited_hash
        if awaited_hash is not None and claims.must_wait(request, awaited_hash):
            return _Answer.AWAITS_PREFIX
        request.awaited_hash = None
        has_seat = len(running) < self._seats.num_seats and self._kv_cache.has_state_slot
        if step.is_blocked or not has_seat or step.prefill.is_spent:
            return _Answer.NO_ROOM
        # One block for each running request, or it would soon take them by preempting this one.
        num_reserved = len(running)
        num_spare = self._kv_cache.num_free_blocks - num_reserved
        if num_spare <= request.num_free_when_refused:
            return _Answer.NO_ROOM  # nothing came back: a long prompt is not looked up again
        max_num_hashed = MAX_NUM_HASHED if step.requests or self._in_flight else None
        match = self._kv_cache.find_prefix(request, max_num_hashed, num_reserved)
        if match is None:
            return _Answer.AWAITS_PREFIX
        missing_hash = None if step.is_alone else match.missing_hash
        if missing_hash is not None and claims.must_wait(request, missing_hash):
            request.awaited_hash = missing_hash
            return _Answer.AWAITS_PREFIX
        num_left = request.num_tokens - match.num_tokens
        num_new = step.prefill.grant(match.num_tokens, num_left)
        if not num_new:
            return _Answer.NO_ROOM  # behind what is cached, a token costs more than is left
        allocate_slots = self._kv_cache.allocate_slots
        block_ids = allocate_slots(request, num_new, match, num_reserved_blocks=num_reserved)
        if block_ids is None and match.partial is not None:
            # The copy needs a block more than the request alone: compute its tokens instead.
            match = match.without_partial()
            num_left = request.num_tokens - match.num_tokens
            num_new = step.prefill.grant(match.num_tokens, num_left)
            block_ids = allocate_slots(request, num_new, match, num_reserved_blocks=num_reserved)
        if block_ids is None:
            request.num_free_when_refused = num_spare
            return _Answer.NO_ROOM
        request.num_free_when_refused = -1
        if request.last_step_id < 0:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self.backlog.admitted()
        self._seats.admit(request)
        if self._kv_cache.keeps_states:
            for other in self._seats.waiting[:_MOST_COMPARED]:
                self._want_state(request, other)
        step.prefill.take(match.num_tokens, num_new, samples=num_new == num_left)
        step.add(request, num_new, block_ids)
        return _Answer.ADMITTED

    def queued(self, request: Request) -> None:
        """A request waits from now on: whoever computes what it begins with keeps the state."""
        if self._kv_cache.keeps_states:
            for other in self._seats.running[:_MOST_COMPARED]:
                if other.num_computed_tokens < other.num_prompt_tokens:
                    self._want_state(other, request)

    def _want_state(self, request: Request, other: Request) -> None:
        """Have the state of ``request`` kept where ``other`` will go on without it."""
        if request.cache_salt == other.cache_salt:
            num_common = num_common_tokens(request.token_ids, other.token_ids)
            self._kv_cache.want_state(request, min(num_common, other.num_tokens - 1))

    def _admit_fork(self, request: Request, source: Request, step: Step) -> _Answer | None:
        """Seat a request that shares the prompt of another; ``None``: it must go its own way."""
        if source.is_finished or source.is_paused:
            request.fork_source = None
            return None
        num_left = 1  # of the prompt: what it samples is its own
        num_shared = request.num_tokens - num_left
        is_computed = source.status is RequestStatus.RUNNING
        if not is_computed or source.num_written_tokens < num_shared:
            return _Answer.AWAITS_PREFIX
        if self._kv_cache.keeps_states:
            request.fork_source = None  # its state has gone on; one is kept near the prompt's end
            return None
        num_running = len(self._seats.running)
        has_seat = num_running < self._seats.num_seats
        if step.is_blocked or not has_seat or step.prefill.is_spent:
            return _Answer.NO_ROOM
        has_block = self._kv_cache.num_free_blocks > num_running  # as all that are admitted
        if not has_block or not step.prefill.grant(num_shared, num_left):
            return _Answer.NO_ROOM
        self._kv_cache.fork(source, request)
        block_ids = self._kv_cache.allocate_slots(request, num_left)
        assert block_ids is not None
        request.fork_source = None
        request.num_cached_tokens = num_shared
        self.backlog.admitted()
        self._seats.admit(request)
        step.prefill.take(num_shared, num_left, samples=True)
        step.add(request, num_left, block_ids)
        return _Answer.ADMITTED
