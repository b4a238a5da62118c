"""What rotary positions are, as data: a part of `spec`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeScalingKind = Literal[
    "linear", "dynamic", "stepped_dynamic", "llama3", "yarn", "longrope", "proportional"
]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched past the trained length.

    ``original_max_position_embeddings`` is the length trained on before stretching. The ``*_freq``
    fields belong to ``llama3``, ``beta_*`` and ``truncate`` to ``yarn``, ``short_factors`` and
    ``long_factors`` (one for each rotated pair) to ``longrope``. ``turning_pairs`` belongs to
    ``proportional``: the first so many pairs turn, the others stand still. ``attention_factor``
    multiplies cos and sin.
    """

    kind: RopeScalingKind
    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    turning_pairs: int = 0


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions on the first ``rotary_dim`` elements of each head.

    ``interleaved`` pairs elements (0, 1), (2, 3), … (GPT-J); otherwise (0, d/2), (1, d/2 + 1), …
    """

    base: float
    rotary_dim: int
    interleaved: bool = False
    scaling: RopeScaling | None = None
