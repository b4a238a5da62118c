"""The factor on cos and sin that a stretched rope takes where a config names none."""

from __future__ import annotations

import math


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """The factor on cos and sin that YaRN (Peng et al. 2023) takes when a config names none."""
    if mscale and mscale_all_dim:
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
    return yarn_magnitude(factor)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """How much larger queries and keys are taken for a context ``factor`` times as long."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def longrope_attention_factor(factor: float, original: int) -> float:
    """The factor on cos and sin that LongRoPE (Ding et al. 2024) takes when a config names none."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
