"""Drafts by a small model: how many are made behind a step, and which of them the next one tries.

A draft model guesses right behind the step whose tokens it goes on from, and that step's result
comes when it has done so. So what is decided when a step is made is how many guesses are to be
there for the next one (`ModelDrafts.ask`); then there is no step to overlap with. Where they do not
pay, which is so with many streams and where they were mostly wrong, none are asked for, and steps
overlap as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import log

from streamserve.config import SchedulerConfig, SpeculativeConfig
from streamserve.core.forced import learned
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.plan import ModelRunnerOutput, SchedulerOutput
from streamserve.core.request import Request
from streamserve.core.speculation import CAUTION, MIN_GAIN, Speculator, gains_of, with_draft
from streamserve.core.step_time import StepShape, StepTimeModel

_FIRST_RATE = 0.7  # of guesses that are right, before any was tried
_RATE_OF_LEARNING = 0.1  # from each step of a request
_HOPE = 0.002  # in a step that asks for none: a text may become easier to guess
_FIRST_SHARE = 0.15  # of a step, for one guess of each request, before any was measured
_SECONDS_RATE = 0.1


class ModelDrafts(Speculator):
    """Decides about a draft model's guesses. Without a step-time model, as many as there may be."""

    def __init__(
        self, config: SchedulerConfig, speculative: SpeculativeConfig, model: StepTimeModel | None
    ) -> None:
        super().__init__(config, speculative, model, _take)
        self._rate = _FIRST_RATE  # of requests that nothing is known of
        self._seconds: dict[int, float] = {}  # for one guess more, by the bits of the requests
        self._is_asked = self._has_failed = False

    def should_wait(self, running: Sequence[Request], num_slots: int = sys.maxsize) -> bool:
        """Whether guesses come with the step in flight."""
        if self._is_asked:
            return True
        return self._num_with_forced > 0 and super().should_wait(running, num_slots)

    def _prospects_of(self, request: Request) -> tuple[float, float]:
        return 0.0, 0.0  # none is asked for

    def ask(
        self,
        requests: Sequence[Request],
        plan: SchedulerOutput,
        kv_cache: KVCacheManager,
        num_running: int,
    ) -> None:
        """Have guesses made behind a whole step, as many as gain most, and room for them.

        They take blocks that ``num_running`` requests are not about to need. A request's first
        token waits for none.
        """
        self._is_asked = False
        if self._has_failed:
            return
        asked: list[tuple[Request, list[int], int]] = []
        num_sampled = context = 0
        for request, scheduled in zip(requests, plan.scheduled, strict=True):
            if not scheduled.sample:
                continue
            num_sampled += 1
            num_tokens = request.num_computed_tokens + 1
            context += num_tokens
            most = self._num_allowed(request, num_tokens)
            if most and scheduled.output_position and not request.chooses_on_host:
                asked.append((request, scheduled.new_block_ids, most))
        if not asked:
            return
        requests = [request for request, _, _ in asked]
        room = self._room_in(kv_cache.num_spare_states)
        count = self._best_count(requests, room, num_sampled, context)
        if not count:
            for request, _, _ in asked:
                rate = self._rate_of(request)
                request.draft_rate = rate + _HOPE * (1.0 - rate)
                plan.num_drafts[request.request_id] = 0
            return
        self._is_asked = True
        num_drafts = plan.num_drafts
        for request, new_block_ids, most in asked:
            num_drafts[request.request_id] = wanted = min(count, most)
            room = len(request.block_table) * kv_cache.block_size - request.num_computed_tokens
            num_missing = -(-(wanted - room) // kv_cache.block_size)
            if 0 < num_missing <= kv_cache.num_free_blocks - num_running:
                found = kv_cache.allocate_slots(request, wanted)
                assert found is not None
                new_block_ids.extend(found)

    def drafted(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Learn what guesses took, or that none are made any more."""
        if not any(plan.num_drafts.values()):
            return
        if output.drafts is None:
            self._has_failed = True
            return
        num_steps = max(map(len, output.drafts.values()), default=0) - 1
        if output.drafting_s is not None and num_steps > 0:
            size = len(plan.num_drafts).bit_length()
            seconds = output.drafting_s / num_steps
            known = self._seconds.setdefault(size, seconds)
            self._seconds[size] = known + _SECONDS_RATE * (seconds - known)

    def _learn(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        rate = learned(self._rate_of(request), num_drafted, num_accepted)
        request.draft_rate = rate
        self._rate += _RATE_OF_LEARNING * (rate - self._rate)

    def _gains_of(self, request: Request, num_drafts: int) -> list[float]:
        rate = self._rate_of(request)
        return gains_of(rate, rate, num_drafts)

    def _rate_of(self, request: Request) -> float:
        if request.draft_rate < 0.0:
            request.draft_rate = self._rate
        return request.draft_rate

    def _best_count(
        self, requests: list[Request], room: int, num_sampled: int, context: int
    ) -> int:
        """How many guesses for each of ``requests`` make the product of all speeds largest.

        All together at most ``room``.
        """
        most = min(
            self._most,
            room // len(requests),
            (self._max_num_sampled - num_sampled) // len(requests),
            (self._max_num_tokens - num_sampled) // len(requests),
        )
        model = self._model
        if model is None:
            return max(most, 0)
        shape = StepShape(num_sampled, num_sampled, context)
        before_s = model.predict(shape)
        size = len(requests).bit_length()
        guess_s = self._seconds.get(size, _FIRST_SHARE * before_s)
        host_s = self.host_time.seconds(num_sampled, overlaps=False)
        before_s += self.host_time.seconds(num_sampled, overlaps=True)
        all_gains = [self._gains_of(request, most) for request in requests]
        best, best_total, gain = 0, MIN_GAIN, 0.0
        for count in range(1, most + 1):
            gain += sum([gains[count - 1] for gains in all_gains])
            for request in requests:
                shape = with_draft(shape, request.num_computed_tokens, count - 1)
            seconds = model.predict(shape) + host_s + count * guess_s
            total = gain - CAUTION * num_sampled * log(seconds / before_s)
            if total > best_total and seconds <= self._max_step_s:
                best, best_total = count, total
        return best


def _take(request: Request, num_tokens: int) -> list[int]:
    drafts, request.drafts = request.drafts[:num_tokens], []
    return drafts
