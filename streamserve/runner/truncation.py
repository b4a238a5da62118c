"""Top-k and top-p without sorting the vocabulary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Weights are relative to the likeliest token's. Whatever lies above a threshold is a prefix of the
# sorted vocabulary, so a prefix that holds k tokens, or the mass, holds all that can be kept.
# A model's own distribution is done with the first; the others are for flat ones.
_THRESHOLDS = (2.0**-10, 2.0**-13, 2.0**-16, 2.0**-20, 2.0**-30)


def restricted_draw(
    weights: NDArray[np.float32], total: float, top_k: int, top_p: float, uniform: float
) -> int:
    """The id that ``uniform`` selects among the tokens that top-k, then top-p leave.

    ``weights`` ``[V]`` are unnormalised probabilities, ``total`` their sum. ``top_k == 0`` is no
    limit; tokens that tie with the k-th stay (as in transformers and vLLM). Top-p keeps the
    smallest set of likeliest tokens whose mass reaches ``top_p`` of what top-k left (Holtzman et
    al. 2020); of tokens that tie at its edge the lowest ids stay. The kept ones are drawn from in
    id order.
    """
    ids, values = _candidates(weights, total, top_k, top_p)
    # Methods, not numpy's functions: on arrays this short the wrappers would take half the time.
    falling = values.copy()
    falling.sort()
    falling = falling[::-1]
    kept = len(falling)
    if 0 < top_k < kept:
        kept = int((values >= falling[top_k - 1]).sum())
    if top_p < 1.0:
        cumulative = falling[:kept].cumsum(dtype=np.float64)
        mass = top_p * (cumulative[-1] if top_k > 0 else total)
        kept = min(int(cumulative.searchsorted(mass, side="left")) + 1, kept)
    if kept < len(values):
        chosen = _largest(values, falling[kept - 1], kept)
        ids, values = ids[chosen], values[chosen]
    cumulative = values.cumsum(dtype=np.float64)
    place = int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))
    return int(ids[min(place, len(ids) - 1)])


def _candidates(
    weights: NDArray[np.float32], total: float, top_k: int, top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids in rising order, and weights, of a set that holds every token that can be kept."""
    for threshold in _THRESHOLDS:
        ids = (weights >= threshold).nonzero()[0]
        values = weights[ids]
        if top_k > 0:
            enough = len(ids) >= top_k
        else:
            enough = float(values.sum(dtype=np.float64)) >= top_p * total
        if enough:
            return ids, values
    ids = weights.nonzero()[0]
    return ids, weights[ids]


def _largest(values: NDArray[np.float32], smallest: np.float32, count: int) -> NDArray[np.bool_]:
    """Marks the ``count`` largest values, ``smallest`` being the last of them; first ties win."""
    chosen = values > smallest
    room = count - int(chosen.sum())
    chosen[(values == smallest).nonzero()[0][:room]] = True
    return chosen
