"""How long a step will take: a table for its rows, least squares for the rest, learnt online.

    seconds ≈ speed × (rows(T) + c·Σ decode context + e·Σ chunk × (start + chunk / 2)
                       + k·Σ (start + chunk) + d·sampled)

``rows`` is measured at warm-up and refined by every step; the coefficients are recursive least
squares; ``speed`` follows a machine that becomes slower or faster as a whole. ``k`` is what a chunk
pays for reading its keys once, however few queries it has: without it small chunks look cheap.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from streamserve.core.least_squares import RobustLeastSquares
from streamserve.core.plan import SchedulerOutput
from streamserve.core.row_times import RowTimes

# Steps in which the least squares' certainty would fade away; what they follow is slow (contexts
# that share more or less), a machine that slows down is the speed's matter.
_MEMORY = 10_000.0
# What a thousand tokens of context, a thousand pairs of a chunk's query and key, a thousand of its
# keys, and a sampled row may plausibly cost, in steps of one row.
_DEVIATIONS = (0.2 / 1000, 0.05 / 1000, 0.5 / 1000, 0.02)
_NUM_PASSES = 8  # over the profile: its samples say little, but that is all there is at first
_SPEED_RATE = 0.02
_NUM_OUTLIERS = 4  # so many in a row, all to one side, are no disturbance but another machine
_OUTLIER = 3.0
_NOISE_RATE = 0.05
_MIN_NOISE = 0.01  # of a step's time; what any machine has
_NUM_ERRORS = 64
_MIN_ERRORS = 20  # before the recent errors say anything
_FIRST_ERROR, _MAX_ERROR = 0.1, 0.25


class StepShape(NamedTuple):
    """What a step's time depends on."""

    num_tokens: int = 0
    num_sampled: int = 0
    decode_context: int = 0  # Σ positions that requests with one token attend to
    prefill_pairs: float = 0.0  # Σ chunk × (start + chunk / 2) of the others
    prefill_keys: int = 0  # Σ (start + chunk) of the others

    def with_chunk(self, start: int, num_tokens: int, samples: int) -> StepShape:
        """The shape with ``num_tokens`` of one more request in it."""
        return StepShape(
            self.num_tokens + num_tokens,
            self.num_sampled + samples,
            self.decode_context,
            self.prefill_pairs + num_tokens * (start + 0.5 * num_tokens),
            self.prefill_keys + start + num_tokens,
        )


def shape_of(plan: SchedulerOutput) -> StepShape:
    """The shape of a whole plan."""
    num_tokens = num_sampled = decode_context = keys = 0
    pairs = 0.0
    for _, start, token_ids, _, sample, _ in plan.scheduled:
        count = len(token_ids)
        num_tokens += count
        num_sampled += sample
        if count == 1:
            decode_context += start + 1
        else:
            pairs += count * (start + 0.5 * count)
            keys += start + count
    return StepShape(num_tokens, num_sampled, decode_context, pairs, keys)


@dataclass(frozen=True, slots=True)
class StepProfile:
    """What warm-up measured: shapes with their seconds, and the sizes that steps are padded to.

    The rows of a step are padded to the next of ``padded_sizes``, and so are its sampled rows,
    each with rows of its own; empty: no padding.
    """

    samples: tuple[tuple[StepShape, float], ...]
    padded_sizes: tuple[int, ...] = ()


class StepTimeModel:
    """Predicts seconds and learns from what steps really took. Microseconds per call."""

    def __init__(self, profile: StepProfile) -> None:
        """``profile`` holds at least one sample."""
        self._sizes = sorted(profile.padded_sizes)
        samples = profile.samples
        plain = [s for s in samples if s[0].num_sampled <= 1 and not _has_context(s[0])] or samples
        self._row_times = RowTimes((self.num_rows(shape), seconds) for shape, seconds in plain)
        one_row = self._row_times(1)
        self._rest = RobustLeastSquares([one_row * share for share in _DEVIATIONS], _MEMORY)
        self._speed = 1.0
        self._noise = _MIN_NOISE  # mean deviation, as a share of a step's time
        self._outlier_ratios: list[float] = []
        self._errors = _RecentErrors()
        for shape, seconds in samples * _NUM_PASSES:
            self.observe(shape, seconds)

    @property
    def error(self) -> float:
        """The recent p95 of how far steps with a chunk took longer than predicted, as a share.

        Relative, since what disturbs a step (another process, a slower clock) takes its share of
        the time, and since a step of 5 ms and one of 100 ms must both be believed.
        """
        return self._errors.p95

    def num_rows(self, shape: StepShape) -> int:
        """Rows of the forward, padding included."""
        num_sampled = shape.num_sampled
        extra = self._padded(num_sampled) - num_sampled if num_sampled else 0
        return self._padded(shape.num_tokens + extra)

    def predict(self, shape: StepShape) -> float:
        """Seconds that a step of this shape takes; grows with everything in it."""
        return self._speed * (
            self._row_times(self.num_rows(shape)) + self._rest.value(_features(shape))
        )

    def prompt_seconds(self, start: int, num_tokens: int) -> float:
        """Seconds that a prompt's tokens add to steps, in chunks large enough to cost what rows do.

        Which is the least that they can take, whatever the chunks.
        """
        shape = StepShape().with_chunk(start, num_tokens, samples=0)
        rest = self._rest.value(_features(shape))
        return self._speed * (self._row_times.slope * num_tokens + rest)

    def observe(self, shape: StepShape, seconds: float, *, has_prompt: bool = True) -> None:
        """Learn what a step of this shape took.

        Without ``has_prompt``, chunks are drafts: they say nothing of how prompts are predicted.
        """
        predicted = self.predict(shape)
        ratio = seconds / predicted
        if has_prompt and shape.prefill_pairs and shape.decode_context:
            self._errors.add(ratio - 1.0)
        plain = predicted / self._speed
        features = _features(shape)
        before = self._rest.value(features)
        innovation = (seconds - predicted) / self._speed
        noise = 1.5 * self._noise * plain
        deviations = abs(self._rest.observe(features, innovation, noise * noise))
        if deviations > _OUTLIER:
            innovation *= _OUTLIER / deviations
            if self._is_another_machine(ratio):
                return
        else:
            self._outlier_ratios.clear()
        # What the least squares leave is the table's, and then the speed's.
        rest = innovation - (self._rest.value(features) - before)
        self._row_times.observe(self.num_rows(shape), rest)
        self._speed *= 1.0 + _SPEED_RATE * max(min(rest / plain, 1.0), -0.5)
        share = min(abs(innovation) / plain, _OUTLIER * self._noise)
        self._noise = max(self._noise + _NOISE_RATE * (share - self._noise), _MIN_NOISE)

    def _is_another_machine(self, ratio: float) -> bool:
        """Whether outliers to one side have become the rule; the speed then follows at once."""
        is_slow = ratio > 1.0
        if self._outlier_ratios and (self._outlier_ratios[-1] > 1.0) != is_slow:
            self._outlier_ratios.clear()
        self._outlier_ratios.append(ratio)
        if len(self._outlier_ratios) < _NUM_OUTLIERS:
            return False
        # The mildest of them: what all have in common.
        self._speed *= min(self._outlier_ratios) if is_slow else max(self._outlier_ratios)
        self._outlier_ratios.clear()
        return True

    def _padded(self, count: int) -> int:
        place = bisect_left(self._sizes, count)
        return self._sizes[place] if place < len(self._sizes) else count


class _RecentErrors:
    """A window of errors, kept sorted."""

    def __init__(self) -> None:
        self._window: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, error: float) -> None:
        self._window.append(error)
        insort(self._sorted, error)
        if len(self._window) > _NUM_ERRORS:
            oldest = self._window.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]

    @property
    def p95(self) -> float:
        if len(self._sorted) < _MIN_ERRORS:
            return _FIRST_ERROR
        return min(max(self._sorted[int(0.95 * len(self._sorted))], 0.0), _MAX_ERROR)


def _features(shape: StepShape) -> tuple[float, float, float, float]:
    return shape.decode_context, shape.prefill_pairs, shape.prefill_keys, shape.num_sampled


def _has_context(shape: StepShape) -> bool:
    return shape.decode_context + shape.prefill_pairs > shape.num_tokens * (shape.num_tokens + 16)
