"""Sampling in plain torch, with a sort: the specification of `triton.sampling`.

Same names, same signatures; see `streamserve_kernels.sampling` for the contract.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from streamserve_kernels.sampling import (
    IN_PROMPT,
    MIN_LOGPROB,
    MIN_TEMPERATURE,
    LogitsEditTensors,
    Logprobs,
    SamplingTensors,
)

__all__ = ["add_tokens", "greedy", "logprobs", "sample"]

_INF = float("inf")


def greedy(logits: Tensor) -> Tensor:
    return _first_of(_without_nan(logits))


def sample(
    logits: Tensor, tensors: SamplingTensors, edits: LogitsEditTensors | None = None
) -> Tensor:
    values = edited(logits, edits)
    weights = truncated_weights(values, tensors).double()
    cumulative = weights.cumsum(1)
    target = tensors.uniforms.double()[:, None] * cumulative[:, -1:]
    found = (cumulative <= target).sum(1)
    # Rounding may lift the target to the total; the last token with any weight then has it.
    last = weights.shape[1] - 1 - _first_of((weights > 0).float().flip(1))
    is_greedy = tensors.temperature < MIN_TEMPERATURE
    return torch.where(is_greedy, _first_of(values), torch.minimum(found, last))


def logprobs(logits: Tensor, ids: Tensor, k: int) -> Logprobs:
    values = _repaired(_without_nan(logits), logits).double()
    found = values.log_softmax(1).clamp(min=MIN_LOGPROB)
    top_ids = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return Logprobs(
        found.gather(1, ids[:, None])[:, 0].float(), top_ids, found.gather(1, top_ids).float()
    )


def add_tokens(
    counts: Tensor,
    rows: Tensor,
    ids: Tensor,
    drafts: Tensor | None = None,
    num_before: Tensor | None = None,
) -> None:
    counted = (rows >= 0) & (ids >= 0) & (ids < counts.shape[1])
    if drafts is not None and num_before is not None:
        wrong = (_before(num_before) & (ids != drafts)[None]).any(1)
        counted &= ~wrong
    places = (rows.clamp(min=0).long(), ids.clamp(0, counts.shape[1] - 1))
    counts.index_put_(places, counted.to(counts.dtype), accumulate=True)


def edited(logits: Tensor, edits: LogitsEditTensors | None) -> Tensor:
    """Logits as they are drawn from: [L, V] float32, every row with a finite maximum."""
    values = _without_nan(logits)
    if edits is not None:
        values = _masked(_biased(_penalised(values, edits), edits), edits)
    return _repaired(values, logits)


def truncated_weights(values: Tensor, tensors: SamplingTensors) -> Tensor:
    """Probabilities [L, V] over the likeliest token's, of the tokens that all filters leave."""
    temperature = torch.where(tensors.temperature < MIN_TEMPERATURE, 1.0, tensors.temperature)
    weights = ((values - values.amax(1, keepdim=True)) / temperature[:, None]).exp()
    weights = torch.where(weights >= tensors.min_p[:, None], weights, 0.0)
    return _truncated(weights, tensors)


def _without_nan(logits: Tensor) -> Tensor:
    values = logits.float()
    return torch.where(values.isnan(), -_INF, values)


def _first_of(values: Tensor) -> Tensor:
    """The lowest id of each row's maximum (`argmax` promises no order among equals)."""
    vocab_size = values.shape[1]
    ids = torch.arange(vocab_size, device=values.device)
    best = values.amax(1, keepdim=True)
    return torch.where(values == best, ids, vocab_size).amin(1)


def _penalised(values: Tensor, edits: LogitsEditTensors) -> Tensor:
    counts = edits.counts[edits.rows.clamp(min=0).long()]
    counts = torch.where((edits.rows >= 0)[:, None], counts, 0)
    if edits.drafts is not None and edits.num_before is not None:
        drafted = torch.nn.functional.one_hot(edits.drafts.clamp(min=0).long(), values.shape[1])
        before = _before(edits.num_before) & (edits.rows >= 0)[:, None]
        counts = counts + (before.double() @ drafted.double()).to(counts.dtype)
    generated = (counts & (IN_PROMPT - 1)).float()
    repetition = torch.where(counts != 0, edits.repetition[:, None], 1.0)
    values = torch.where(values < 0, values * repetition, values / repetition)
    values = values - edits.frequency[:, None] * generated
    return values - edits.presence[:, None] * (generated > 0)


def _before(num_before: Tensor) -> Tensor:
    """Whether the second of two rows [L, L] is among those right before the first."""
    row = torch.arange(len(num_before), device=num_before.device)
    return (row[None] < row[:, None]) & (row[None] >= (row - num_before)[:, None])


def _biased(values: Tensor, edits: LogitsEditTensors) -> Tensor:
    values = values.clone()
    starts = edits.bias_start.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        ids, bias = edits.bias_ids[start:end].long(), edits.bias_values[start:end]
        is_banned = bias == -_INF
        values[row, ids[~is_banned]] += bias[~is_banned]
        values[row, ids[is_banned]] = -_INF
    return values


def _masked(values: Tensor, edits: LogitsEditTensors) -> Tensor:
    ids = torch.arange(values.shape[1], device=values.device)
    words = edits.masks[edits.mask_rows.clamp(min=0).long()]
    words = words[:, (ids // 32).clamp(max=words.shape[1] - 1)]
    is_allowed = ((words >> (ids % 32)) & 1 == 1) | (edits.mask_rows < 0)[:, None]
    return torch.where(is_allowed, values, -_INF)


def _repaired(values: Tensor, logits: Tensor) -> Tensor:
    """Rows without a finite maximum, made drawable.

    Where all is forbidden the arg-max of the raw logits is left; infinities share the row.
    """
    ids = torch.arange(values.shape[1], device=values.device)
    best = values.amax(1, keepdim=True)
    first = ids == greedy(logits)[:, None]
    chosen = torch.where(best == -_INF, first, values == best)
    return torch.where(best.isinf(), torch.where(chosen, 0.0, -_INF), values)


def _truncated(weights: Tensor, tensors: SamplingTensors) -> Tensor:
    """The weights [L, V] that top-k, then top-p leave; zero elsewhere."""
    vocab_size = weights.shape[1]
    falling, order = weights.sort(dim=1, descending=True, stable=True)
    top_k = torch.where(tensors.top_k > 0, tensors.top_k, vocab_size).clamp(max=vocab_size)
    threshold = falling.gather(1, top_k[:, None].long() - 1)
    falling = torch.where(falling >= threshold, falling, 0.0)  # those that tie with it stay
    cumulative = falling.double().cumsum(1)
    top_p = tensors.top_p.double()[:, None]
    # A token is kept if those before it do not reach the mass.
    before = torch.nn.functional.pad(cumulative, (1, 0))[:, :-1]
    kept = (before < top_p * cumulative[:, -1:]) | (top_p >= 1.0)
    return torch.zeros_like(weights).scatter(1, order, torch.where(kept, falling, 0.0))
