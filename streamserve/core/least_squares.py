"""Recursive least squares that forgets, and that one bad observation cannot poison."""

from __future__ import annotations

import math
from collections.abc import Sequence

_OUTLIER = 3.0  # standard deviations past which an innovation counts no more


class RobustLeastSquares:
    """``value ≈ Σ coefficient × feature`` for coefficients that are never negative.

    A Kalman filter of standing coefficients. Forgetting is *stabilised*: with every observation
    the covariance drifts back towards the prior's by a share of ``1 / memory``, so that it can
    neither vanish (and stop learning) nor grow without end while a feature stands still (and then
    jump at the first disturbance). Innovations are clipped at three of their standard deviations.
    See Kulhavy and Zarrop, "On a general concept of forgetting", 1993, and Huber on clipping.
    """

    def __init__(self, deviations: Sequence[float], memory: float) -> None:
        """``deviations``: how large each coefficient may plausibly be."""
        self.coefficients = [0.0] * len(deviations)
        self._prior = [deviation * deviation for deviation in deviations]
        self._covariance = [
            [variance if i == j else 0.0 for j in range(len(deviations))]
            for i, variance in enumerate(self._prior)
        ]
        self._memory = memory

    def value(self, features: Sequence[float]) -> float:
        """What the coefficients make of ``features``."""
        return sum([c * x for c, x in zip(self.coefficients, features, strict=True)])

    def observe(self, features: Sequence[float], innovation: float, noise: float) -> float:
        """Learn that the value was ``innovation`` above the prediction.

        ``noise``: the variance of the observation itself. Returns the innovation in its own
        standard deviations, before clipping.
        """
        size = range(len(features))
        covariance = self._covariance
        gains = [sum([row[j] * features[j] for j in size]) for row in covariance]
        variance = sum([features[i] * gains[i] for i in size]) + noise
        deviations = innovation / math.sqrt(variance)
        clipped = innovation
        if abs(deviations) > _OUTLIER:
            clipped *= _OUTLIER / abs(deviations)
        step = clipped / variance
        kept = 1.0 - 1.0 / self._memory
        for i in size:
            self.coefficients[i] = max(self.coefficients[i] + gains[i] * step, 0.0)
            row, share = covariance[i], gains[i] / variance
            for j in size:
                row[j] = kept * (row[j] - share * gains[j])
            row[i] += (1.0 - kept) * self._prior[i]
        return deviations
