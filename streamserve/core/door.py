"""Who is let into the queue: there is room, and what the request asks of time can be kept."""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter

from streamserve.config import SchedulerConfig
from streamserve.core.backlog import Backlog
from streamserve.core.clock import Clock
from streamserve.core.fairness import FairShare
from streamserve.core.request import Request
from streamserve.core.seats import Seats
from streamserve.core.step_time import StepTimeModel
from streamserve.errors import DeadlineUnreachableError, QueueFullError

_by_key = attrgetter("sort_key")


class Door:
    """Refuses what can be known to be in vain, before anything is computed."""

    def __init__(
        self,
        config: SchedulerConfig,
        seats: Seats,
        backlog: Backlog,
        clock: Clock,
        step_time: StepTimeModel | None,
        shares: FairShare | None = None,
    ) -> None:
        """With ``shares`` no tenant may have more of the queue than what it leaves free."""
        self._config = config
        self._seats = seats
        self._backlog = backlog
        self._clock = clock
        self._step_time = step_time
        self._shares = shares

    def check_room(self, request: Request) -> None:
        """Raise ``QueueFullError`` past the bounds of the queue; an empty one takes anyone.

        Where shares are kept, a tenant's own bound is what is free: there is always room for who
        has little there (dynamic thresholds, Choudhury and Hahne 1998, α = 1).
        """
        waiting = self._seats.waiting
        num_waiting = len(waiting)
        limit = self._config.max_num_waiting
        if num_waiting >= limit:
            raise QueueFullError(
                f"at most {limit} requests may wait, {num_waiting} do already",
                retry_after_s=self._backlog.seconds_until(num_waiting - limit + 1),
            )
        mine = None if self._shares is None else self._shares.account_of(request.tenant)
        if mine is not None and mine.num_waiting >= limit - num_waiting:
            raise QueueFullError(
                f"{mine.num_waiting} requests of this key or user wait already, and of {limit}"
                f" places {limit - num_waiting} are left for others",
                retry_after_s=self._backlog.seconds_until(1),
            )
        max_tokens = self._config.max_num_waiting_tokens
        if max_tokens is None or not num_waiting:
            return
        num_tokens = self._seats.num_waiting_tokens
        num_mine = 0 if mine is None else mine.num_waiting_tokens
        if num_mine and num_mine + request.num_prompt_tokens > max_tokens - num_tokens:
            raise QueueFullError(
                f"{num_mine} tokens of prompts of this key or user wait already, and of"
                f" {max_tokens} {max(max_tokens - num_tokens, 0)} are left for others",
                retry_after_s=self._backlog.seconds_until(1),
            )
        excess = num_tokens + request.num_prompt_tokens - max_tokens
        if excess > 0:
            raise QueueFullError(
                f"at most {max_tokens} tokens of prompts may wait, {num_tokens} do already and this"
                f" one has {request.num_prompt_tokens}",
                retry_after_s=self._backlog.seconds_for(num_waiting, num_tokens, excess),
            )

    def check_time(self, request: Request) -> None:
        """Raise ``DeadlineUnreachableError`` unless the request's limits of time can be kept.

        By what is measured: without a measurement nobody is refused. The key must be known.
        """
        limits = request.time_limits
        if limits is None:
            return
        spent_s = self._clock() - request.arrival_time
        wait_s = self._wait_s(request)
        prompt_s = 0.0
        if self._step_time is not None:
            num_cached = request.num_prompt_tokens - request.num_uncached_tokens
            prompt_s = self._step_time.prompt_seconds(num_cached, request.num_uncached_tokens)
        for name, limit_s, work_s in (
            ("max_queue_ms", limits.queue_s, 0.0),
            ("ttft_ms", limits.first_token_s, prompt_s),
            ("deadline_ms", limits.total_s, prompt_s),
        ):
            needed_s = spent_s + wait_s + work_s
            if limit_s is not None and needed_s > limit_s:
                # Later the queue may be shorter; the work stays what it is.
                helps = work_s < limit_s
                raise DeadlineUnreachableError(
                    f"{name} is {limit_s * 1e3:g}, and about {needed_s * 1e3:.0f} are needed:"
                    f" {wait_s * 1e3:.0f} to wait and {work_s * 1e3:.0f} to compute the prompt",
                    param=name,
                    retry_after_s=max(needed_s - limit_s, 0.001) if helps else None,
                )

    def _wait_s(self, request: Request) -> float:
        """How long until it has a seat, at the rate at which seats were given lately."""
        waiting = self._seats.waiting
        account = request.account
        if not waiting or (account is not None and not account.num_waiting):
            return 0.0  # where shares are kept, the first of a tenant gets one at once
        place = bisect_left(waiting, request.sort_key, key=_by_key)
        return self._backlog.wait_s(place)
