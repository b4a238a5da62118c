"""Whether and how far to draft: as many guesses as make the streams faster, none at others' cost.

A request with drafts is computed further than its text is known, and the sampler says how far that
was right (`streamserve.core.plan.ScheduledRequest`). Which tokens come out does not depend on the
drafts, only when. They cost rows, and they cost the overlap of two steps: what to draft behind a
token is known only when the token is. So there are two questions, both put to the step-time model:

    `should_wait`   a step is in flight: is the next one worth more when its tokens are known?
    `plan`          no token is missing: which drafts, and how many of each request?

What is made largest is the product of the streams' speeds, that is

    Σ log (tokens that a request may expect of the step) - requests · log (seconds of the step)

The sum of the speeds would have one stream that repeats itself slow down all that do not.

Where layers keep states, each draft takes a slot for the one before it, which else keeps that of a
prefix (``num_slots``: as many as nobody runs in). Drafts get half of them, so that a crowd's do not
cost all its prefixes; or as many as one request can use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import log, log1p

from streamserve.config import MAX_FORCED_TOKENS, SchedulerConfig, SpeculativeConfig
from streamserve.core.forced import (
    FIRST_FORCED_RATE,
    FIRST_FORCED_SHARE,
    FindForced,
    ForcedTokens,
    learned,
)
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.ngram import NgramIndex
from streamserve.core.plan import ModelRunnerOutput, SchedulerOutput
from streamserve.core.request import Request
from streamserve.core.step_time import StepShape, StepTimeModel

Propose = Callable[[Request, int], list[int]]
"""Guesses at what follows a request's known tokens, at most so many."""

MIN_GAIN = 0.03  # in that sum: a prediction is not better than that
CAUTION = 1.25  # that a step takes longer counts so much more than what it yields
_MIN_CHANCE = 0.1  # of the first draft: below it nothing is looked at any further
_MAX_NUM_INDEXED = 2048  # tokens in one step, well under a millisecond: a long text takes several
_COUNTS = frozenset((1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48))  # of drafts, looked at beside "all"
_FIRST_ALONE_S = 0.0003  # before any was measured
_PATIENCE = 4  # steps
_THOUGHT_S = 0.00001  # at most, for a request
_THOUGHT_SHARE = 0.01  # of a step
_HOST_RATE = 0.05
_HOST_BASE = 4  # requests' worth of what the host does for each step, however few there are
_MAX_HOST_S = 0.005  # above it the engine had nothing to do


@dataclass(slots=True)
class SpeculationStats:
    """Counters since the start, as vLLM has them. A draft is one request's, in one step."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_forced_tokens: int = 0  # of those that were accepted: a grammar left no choice


@dataclass(slots=True)
class Drafts:
    """The drafts of a step, by request id, and what its decodes are with them."""

    token_ids: dict[str, list[int]] = field(default_factory=dict)
    num_tokens: int = 0
    shape: StepShape = field(default_factory=StepShape)


class _Candidate:
    """A request that may draft, where it stands, and what each further draft is worth to it."""

    __slots__ = ("drafts", "gains", "num_taken", "request", "start")

    def __init__(self, request: Request, start: int, drafts: list[int], gains: list[float]) -> None:
        self.request = request
        self.start = start
        self.drafts = drafts
        self.gains = gains
        self.num_taken = 0


class HostTime:
    """What steps take beyond the device's time: between their ids and the next one's, less that.

    A step that is launched while another is in flight overlaps with the host's work, and this is
    next to nothing; one that is launched alone waits for it. It grows with the requests.
    """

    def __init__(self) -> None:
        self._per_request = [_FIRST_ALONE_S / (1 + _HOST_BASE), 0.0]  # alone, overlapped
        self._last_retired = 0.0

    def seconds(self, num_requests: int, *, overlaps: bool) -> float:
        """For a step of so many requests."""
        return self._per_request[overlaps] * (num_requests + _HOST_BASE)

    def observe(self, now: float, num_requests: int, device_s: float, *, overlaps: bool) -> None:
        """A step has retired."""
        host_s = max(now - self._last_retired - device_s, 0.0)
        self._last_retired = now
        if host_s < _MAX_HOST_S:
            error = host_s / (num_requests + _HOST_BASE) - self._per_request[overlaps]
            self._per_request[overlaps] += _HOST_RATE * error


class Speculator:
    """Decides about the drafts of each step. Without a step-time model, all are taken."""

    def __init__(
        self,
        config: SchedulerConfig,
        speculative: SpeculativeConfig | None,
        model: StepTimeModel | None,
        propose: Propose | None = None,
    ) -> None:
        """``propose`` in place of the prompt lookup; how good it is, is not known.

        Without ``speculative`` there are forced tokens only.
        """
        self.stats = SpeculationStats()
        self.host_time = HostTime()
        self._config = speculative
        self._most = 0 if speculative is None else speculative.num_speculative_tokens
        self._forced_rate = FIRST_FORCED_RATE  # of requests that nothing is known of
        self._num_with_forced = 0
        self._max_num_sampled = config.max_num_sampled
        self._max_num_tokens = config.max_num_batched_tokens
        self._max_step_s = (
            float("inf") if config.itl_target_ms is None else config.itl_target_ms / 1000
        )
        self._model = model
        self._propose = self._look_up if propose is None else propose
        self._num_to_index = 0
        self._num_refusals_left = 0

    @property
    def is_needed(self) -> bool:
        """Whether there may be drafts at all."""
        return self._config is not None or self._num_with_forced > 0

    def guide(self, request: Request, find: FindForced) -> None:
        """Draft what must follow a request's tokens, until `leave`."""
        if request.may_draft:
            share = 0.0 if request.sampling_params.thinking else FIRST_FORCED_SHARE
            request.forced = ForcedTokens(find, self._forced_rate, share)
            self._num_with_forced += 1

    def leave(self, request: Request) -> None:
        """Draft nothing that must follow: the request has ended."""
        if request.forced is not None:
            request.forced = None
            self._num_with_forced -= 1

    def should_wait(self, running: Sequence[Request], num_slots: int = sys.maxsize) -> bool:
        """Whether a step in flight should retire before the next is made, to draft in that one.

        While the answer is no, it is thought over again after a few steps only, the more there are
        to ask, and the shorter the steps, the later: it costs some microseconds for each.
        """
        if self._num_refusals_left:
            self._num_refusals_left -= 1
            return False
        room = self._room_in(num_slots)
        if room > 0 and self._is_worth_waiting(running, room):
            return True
        if self._model is not None and running:
            step_s = self._model.predict(StepShape(len(running), len(running)))
            period = int(len(running) * _THOUGHT_S / (_THOUGHT_SHARE * step_s))
            least = 1 if self._num_with_forced else _PATIENCE  # what is forced comes at once
            self._num_refusals_left = max(period, least) - 1
        return False

    def _room_in(self, num_slots: int) -> int:
        """How many drafts a step may have, of as many slots for states that nobody runs in."""
        return max(min(num_slots, self._most or MAX_FORCED_TOKENS), num_slots // 2)

    def _is_worth_waiting(self, running: Iterable[Request], room: int) -> bool:
        self._num_to_index = _MAX_NUM_INDEXED
        num_decodes = num_unknown = decode_context = 0
        candidates: list[_Candidate] = []
        for request in running:
            num_tokens = len(request.token_ids) + request.num_pending_tokens
            if not request.num_pending_tokens or num_tokens >= request.max_num_tokens:
                continue
            num_decodes += 1
            num_unknown += request.num_draft_tokens > 0
            decode_context += num_tokens
            num_drafts = self._num_allowed(request, num_tokens)
            if self._model is None and (num_drafts or request.forced is not None):
                return True
            first, then = self._prospects_of(request) if num_drafts else (0.0, 0.0)
            if request.forced is not None:
                forced, behind, most = request.forced.prospects(request)
                if forced >= first:
                    num_left = request.max_num_tokens - num_tokens - 1
                    first, then, num_drafts = forced, behind, min(most, num_left)
            if first > _MIN_CHANCE and num_drafts:
                gains = gains_of(first, then, num_drafts)
                candidates.append(_Candidate(request, num_tokens - 1, [], gains))
        if not candidates or self._model is None:
            return False
        shape = StepShape(num_decodes, num_decodes, decode_context)
        room = min(room, self._max_num_sampled - num_decodes)
        # What has drafts in flight would sit out a step that is made now: half as many tokens.
        least = MIN_GAIN - num_unknown * log(2.0)
        return self._choose(self._model, candidates, shape, room, least, overlaps=True)[0] > 0

    def plan(
        self, running: Iterable[Request], max_num_requests: int, num_slots: int = sys.maxsize
    ) -> Drafts:
        """The drafts of the step that is made next, with ``max_num_requests`` in it at most.

        Those that do not decode are prompts, and get half of what the decodes leave of the step.
        """
        self._num_to_index = _MAX_NUM_INDEXED
        num_decodes = decode_context = 0
        candidates: list[_Candidate] = []
        for request in running:
            num_tokens = len(request.token_ids) + request.num_pending_tokens
            if num_tokens - request.num_computed_tokens != 1:
                continue
            num_decodes += 1
            decode_context += num_tokens
            if request.num_pending_tokens:
                continue
            if request.forced is not None and (forced := self._forced(request, request.forced)):
                candidates.append(forced)
                continue
            if not (num_allowed := self._num_allowed(request, num_tokens)):
                continue
            drafts = self._propose(request, num_allowed)
            if request.forced is not None:
                request.forced.are_drafted = False
            if drafts:
                gains = self._gains_of(request, len(drafts))
                candidates.append(_Candidate(request, num_tokens - 1, drafts, gains))
        shape = StepShape(num_decodes, num_decodes, decode_context)
        room = self._max_num_tokens - num_decodes
        if max_num_requests > num_decodes:
            room //= 2
        room = min(room, self._max_num_sampled - max_num_requests, self._room_in(num_slots))
        if not candidates or room <= 0:
            return Drafts(shape=shape)
        if self._model is None:
            return _take_all(candidates, shape, room)
        num_taken, with_drafts = self._choose(
            self._model, candidates, shape, room, MIN_GAIN, overlaps=False
        )
        if not num_taken:
            return Drafts(shape=shape)
        return Drafts(_taken(candidates), num_taken, with_drafts)

    def ask(
        self,
        requests: Sequence[Request],
        plan: SchedulerOutput,
        kv_cache: KVCacheManager,
        num_running: int,
    ) -> None:
        """Have drafts made behind a whole step, where they are made behind steps."""

    def drafted(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Learn what drafts took that were asked for."""

    def verified(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """Count a request's drafts that a step has gone through, and learn from them."""
        self.stats.num_drafts += 1
        self.stats.num_draft_tokens += num_drafted
        self.stats.num_accepted_tokens += num_accepted
        if request.forced is None or not request.forced.are_drafted:
            self._learn(request, num_drafted, num_accepted)
            return
        self.stats.num_forced_tokens += num_accepted
        self._forced_rate = learned(self._forced_rate, num_drafted, num_accepted)
        request.forced.rate = learned(request.forced.rate, num_drafted, num_accepted)

    def _learn(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """Learn from guesses. The prompt lookup does where it looks up."""

    def _forced(self, request: Request, forced: ForcedTokens) -> _Candidate | None:
        """What must follow a request's known tokens, before any guesses."""
        num_tokens = len(request.token_ids)
        drafts = forced.behind(request)[: max(request.max_num_tokens - num_tokens - 1, 0)]
        if not drafts:
            return None
        forced.are_drafted, request.drafts = True, []
        return _Candidate(
            request, num_tokens - 1, drafts, gains_of(forced.rate, forced.rate, len(drafts))
        )

    def _prospects_of(self, request: Request) -> tuple[float, float]:
        """How likely a guess behind a token that is not known yet is right, and each behind it."""
        index = self._index_of(request)
        return (0.0, 0.0) if index is None else (index.hit_rate, index.continue_rate)

    def _num_allowed(self, request: Request, num_tokens: int) -> int:
        """How many drafts may stand behind ``num_tokens``: the step yields one token more."""
        if not request.may_draft:
            return 0
        return max(min(self._most, request.max_num_tokens - num_tokens - 1), 0)

    def _index_of(self, request: Request) -> NgramIndex | None:
        """The request's index once it holds all the known tokens: a long text takes some steps."""
        index = request.ngram_index
        if index is None:
            config = self._config
            assert config is not None
            index = NgramIndex(config.prompt_lookup_min, config.prompt_lookup_max)
            request.ngram_index = index
        token_ids = request.token_ids
        num_new = len(token_ids) - index.num_indexed
        if num_new:
            num_taken = min(num_new, self._num_to_index)
            self._num_to_index -= num_taken
            index.extend(token_ids, index.num_indexed + num_taken)
            if num_taken < num_new:
                return None
        return index

    def _look_up(self, request: Request, num_tokens: int) -> list[int]:
        index = self._index_of(request)
        return [] if index is None else index.draft(request.token_ids, num_tokens)

    def _gains_of(self, request: Request, num_drafts: int) -> list[float]:
        index = request.ngram_index
        if index is None:
            return gains_of(1.0, 1.0, num_drafts)
        return gains_of(index.hit_rate_when_found, index.continue_rate, num_drafts)

    def _choose(
        self,
        model: StepTimeModel,
        candidates: Sequence[_Candidate],
        shape: StepShape,
        room: int,
        least: float,
        *,
        overlaps: bool,
    ) -> tuple[int, StepShape]:
        """Take the drafts that are worth most, as many as gain most.

        Returns how many that are, 0 unless they gain more than ``least`` over a step without them,
        which ``overlaps`` or not; and the shape with them. Sets the candidates' ``num_taken``.
        """
        num_requests = shape.num_sampled
        host_s = self.host_time.seconds(num_requests, overlaps=False)
        before_s = model.predict(shape) + self.host_time.seconds(num_requests, overlaps=overlaps)
        order = sorted(
            (-gain, place, i)
            for i, candidate in enumerate(candidates)
            for place, gain in enumerate(candidate.gains)
        )
        num_best, best_shape = 0, shape
        num_possible = min(len(order), room)
        gain = 0.0
        for count, (minus_gain, place, i) in enumerate(order[:room], 1):
            gain -= minus_gain
            shape = with_draft(shape, candidates[i].start, place)
            if count not in _COUNTS and count != num_possible:
                continue
            seconds = model.predict(shape) + host_s
            total = gain - CAUTION * num_requests * log(seconds / before_s)
            if total > least and seconds <= self._max_step_s:
                num_best, best_shape, least = count, shape, total
        for _, _, i in order[:num_best]:
            candidates[i].num_taken += 1
        return num_best, best_shape


def gains_of(first: float, then: float, count: int) -> list[float]:
    """What each draft adds to the log of the tokens to expect, if they are right so often."""
    gains: list[float] = []
    num_tokens, chance = 1.0, first
    for _ in range(count):
        gains.append(log1p(chance / num_tokens))
        num_tokens += chance
        chance *= then
    return gains


def with_draft(shape: StepShape, start: int, place: int) -> StepShape:
    """The shape with one draft more, of a request at ``start`` that has ``place`` of them."""
    num_tokens, num_sampled, decode_context, pairs, keys = shape
    if not place:  # what was a decode is now a chunk
        decode_context -= start + 1
        pairs += start + 0.5
        keys += start + 1
    return StepShape(
        num_tokens + 1, num_sampled + 1, decode_context, pairs + start + place + 1.5, keys + 1
    )


def _take_all(candidates: Sequence[_Candidate], shape: StepShape, room: int) -> Drafts:
    num_tokens = 0
    for candidate in candidates:
        candidate.num_taken = min(len(candidate.drafts), room - num_tokens)
        num_tokens += candidate.num_taken
        for place in range(candidate.num_taken):
            shape = with_draft(shape, candidate.start, place)
    return Drafts(_taken(candidates), num_tokens, shape)


def _taken(candidates: Sequence[_Candidate]) -> dict[str, list[int]]:
    return {c.request.request_id: c.drafts[: c.num_taken] for c in candidates if c.num_taken}
