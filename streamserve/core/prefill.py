"""How many prompt tokens a step may carry besides the decodes: the chunk is sized by the clock.

While streams are decoding, a step may take as long as the inter-token target says, and a chunk is
the largest that is predicted to fit. When nobody is decoding there is nobody to keep waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from streamserve.config import SchedulerConfig
from streamserve.core.clock import Clock
from streamserve.core.memory_backoff import MemoryBackoff
from streamserve.core.pacing_stats import PacingStats
from streamserve.core.plan import ModelRunnerOutput, SchedulerOutput
from streamserve.core.request import Request
from streamserve.core.speculation import Drafts
from streamserve.core.step_time import StepShape, StepTimeModel, shape_of

_by_key = attrgetter("sort_key")

MIN_CHUNK_TOKENS = 8
"""The first prompt of a step gets as many, come what may: prompts end, however slow the decodes."""
MIN_SHARE = 0.25
"""Of the decodes' own time: what prompts may add where the target leaves less."""
MIN_ALLOWANCE_S, MAX_ALLOWANCE_S = 0.005, 0.25
"""Without a target prompts may add the decodes' own time, within these bounds: nobody sees 5 ms,
and everybody sees a quarter of a second."""
MAX_STRETCH = 4.0
"""Without a target the allowance grows when prompts would otherwise be late: up to fourfold, or by
the number of prompts for each stream that decodes, if that is more, since whoever waits for a first
token counts as much as whoever waits for the next. A machine that is asked for more than fits
beside the decodes settles where prompts are served as fast as they come."""
FIRST_TOKEN_BASE_S, FIRST_TOKEN_BASE_STEPS, FIRST_TOKEN_FACTOR = 0.4, 30, 1.3
"""When a prompt is late: so long after its arrival, or so many steps of one row where these take
longer, and so many times what it takes alone. A slow model's prompts may wait as it answers."""
MAX_PROMPTS_COUNTED = 32


@dataclass(frozen=True, slots=True)
class StepReport:
    """A step that was measured. ``chunk_tokens`` are those of prompts, without drafts."""

    step_id: int
    num_tokens: int
    chunk_tokens: int
    draft_tokens: int
    predicted_s: float
    actual_s: float


class PrefillBudget:
    """What is left for prompts in a step that is being made."""

    __slots__ = ("_limit_s", "_model", "_shape", "_started", "num_tokens")

    def __init__(
        self, num_tokens: int, model: StepTimeModel | None, shape: StepShape, limit_s: float
    ) -> None:
        """``num_tokens`` at most; with a ``model``, as long as the step stays within ``limit_s``.

        ``shape`` is what the step holds besides.
        """
        self.num_tokens = num_tokens
        self._model = model
        self._shape = shape
        self._limit_s = limit_s
        self._started = False  # a prompt has got its tokens

    @property
    def is_spent(self) -> bool:
        """Whether no prompt gets another token in this step, wherever it stands."""
        return not self.num_tokens or (self._started and not self._fits(0, 1, samples=False))

    def grant(self, start: int, num_left: int) -> int:
        """How many of ``num_left`` tokens from position ``start`` the step has time for.

        The largest number, so that a chunk fills the rows that the step is padded to.
        """
        wanted = min(num_left, self.num_tokens)
        if self._model is None or self._fits(start, wanted, samples=wanted == num_left):
            return wanted
        fits, too_many = 0, wanted
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self._fits(start, middle, samples=False):
                fits = middle
            else:
                too_many = middle
        return fits if self._started else max(fits, min(MIN_CHUNK_TOKENS, wanted))

    def take(self, start: int, num_tokens: int, *, samples: bool) -> None:
        """Book a chunk."""
        self._started = True
        self.num_tokens -= num_tokens
        self._shape = self._shape.with_chunk(start, num_tokens, samples)

    def _fits(self, start: int, num_tokens: int, *, samples: bool) -> bool:
        if self._model is None:
            return True
        shape = self._shape.with_chunk(start, num_tokens, samples)
        return self._model.predict(shape) <= self._limit_s


class PrefillPacer:
    """Opens each step's budget, and learns from what the steps took."""

    def __init__(self, config: SchedulerConfig, model: StepTimeModel | None) -> None:
        """Without a ``model``, a chunk is what is left of ``max_num_batched_tokens``."""
        self._max_tokens = config.max_num_batched_tokens
        self._target_s = None if config.itl_target_ms is None else config.itl_target_ms / 1000
        self._model = model
        self.chunk_backoff = MemoryBackoff(config.max_num_batched_tokens)
        self.stats = PacingStats()
        self.last_report: StepReport | None = None

    def open(
        self,
        running: Iterable[Request],
        waiting: Sequence[Request],
        num_free_seats: int,
        clock: Clock,
        drafts: Drafts | None = None,
    ) -> PrefillBudget:
        """The budget of a step that sets a token aside for each request that needs only one.

        And for each of their ``drafts``: what the decodes take, they take with them.
        """
        num_decodes = decode_context = 0
        prompts: list[Request] = []
        for request in running:
            num_tokens = len(request.token_ids) + request.num_pending_tokens
            if num_tokens - request.num_computed_tokens == 1:
                num_decodes += 1
                decode_context += num_tokens
            else:
                prompts.append(request)
        shape = StepShape(num_decodes, num_decodes, decode_context)
        num_taken = num_decodes
        if drafts is not None:
            shape = drafts.shape
            num_taken += drafts.num_tokens
        model = self._model if num_decodes and (prompts or waiting) else None
        limit_s = 0.0
        if model is not None:
            num_seated = min(len(waiting), num_free_seats)
            max_stretch = max((len(prompts) + num_seated) / num_decodes, MAX_STRETCH)
            prompts += waiting[: max(min(num_seated, MAX_PROMPTS_COUNTED), 1)]
            limit_s = self._limit_s(model, model.predict(shape), prompts, max_stretch, clock())
        num_left = min(self._max_tokens - num_taken, self.chunk_backoff.limit)
        return PrefillBudget(max(num_left, 0), model, shape, limit_s)

    def open_alone(self) -> PrefillBudget:
        """The budget of a step with one request, that keeps nobody waiting."""
        return PrefillBudget(self.chunk_backoff.limit, None, StepShape(), 0.0)

    def _limit_s(
        self, model: StepTimeModel, decode_s: float, prompts: list[Request], most: float, now: float
    ) -> float:
        """What a prediction may be: the target less the error, or the least for prompts.

        A target that nobody asked for is where steps end on average.
        """
        self.stats.error = model.error
        if self._target_s is not None:
            self.stats.itl_target_s = self._target_s
            limit_s = self._target_s / (1.0 + model.error)
        else:
            share = share_needed(model, prompts, now)
            stretch = min(max(share / (1.0 - share), 1.0), most) if share < 1.0 else most
            allowance_s = min(max(decode_s * stretch, MIN_ALLOWANCE_S), MAX_ALLOWANCE_S)
            limit_s = self.stats.itl_target_s = decode_s + allowance_s
        return max(limit_s, decode_s * (1.0 + MIN_SHARE))

    def observe(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Learn from a step that has retired."""
        seconds = output.duration_s
        if self._model is None or seconds is None or not plan.scheduled:
            return
        shape = shape_of(plan)
        chunk_tokens = chunk_tokens_of(plan)
        draft_tokens = sum([s.sample - 1 for s in plan.scheduled if s.sample > 1])
        predicted = self._model.predict(shape)
        self._model.observe(shape, seconds, has_prompt=chunk_tokens > 0 or not draft_tokens)
        self.last_report = StepReport(
            plan.step_id, shape.num_tokens, chunk_tokens, draft_tokens, predicted, seconds
        )
        self.stats.step_time.observe(seconds)
        self.stats.step_time_ratio.observe(seconds / predicted)
        if chunk_tokens:
            self.stats.chunk_tokens.observe(chunk_tokens)


def chunk_tokens_of(plan: SchedulerOutput) -> int:
    """Tokens of prompts in a plan, without those that decode, and without drafts."""
    return sum([len(s.token_ids) for s in plan.scheduled if len(s.token_ids) > 1 >= s.sample])


def first_token_base(model: StepTimeModel) -> float:
    """Seconds after its arrival that a prompt of next to no work has."""
    return max(FIRST_TOKEN_BASE_S, FIRST_TOKEN_BASE_STEPS * model.predict(StepShape(1, 1)))


def share_needed(model: StepTimeModel, prompts: list[Request], now: float) -> float:
    """The share of the machine's time that lets each of ``prompts`` have its first token in time.

    They are served in the order of their keys, so that each waits for the work of those before it.
    1 if it takes all there is, or more.
    """
    base_s = first_token_base(model)
    share = before_s = 0.0
    for request in sorted(prompts, key=_by_key):
        num_tokens = len(request.token_ids)
        num_cached = num_tokens - request.num_uncached_tokens
        alone_s = model.prompt_seconds(num_cached, request.num_uncached_tokens)
        wait_s = base_s + FIRST_TOKEN_FACTOR * alone_s
        # Of its own work all counts until it is done: an even pace, not a rush in the end.
        late = max((now - request.arrival_time) / wait_s - 1.0, 1.0)
        share = max(share, late * (before_s + alone_s) / wait_s)
        start = request.num_computed_tokens
        before_s += model.prompt_seconds(start, num_tokens - start) if start else alone_s
    return min(share, 1.0)
