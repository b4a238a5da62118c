"""Logprobs of one token and of the k likeliest, and the counts of generated tokens.

The k best of each chunk are taken one after another, then the k best of those. k is small.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from streamserve_kernels.sampling import MIN_LOGPROB
from streamserve_kernels.triton.runtime import jit
from streamserve_kernels.triton.sampling_kernels import first_maximum, load_logits, weights_of

_LOG2_E = tl.constexpr(1.4426950408889634)
_MIN_LOGPROB = tl.constexpr(MIN_LOGPROB)
_NO_ID = tl.constexpr(2**31 - 1)


@jit
def next_best(values, ids, best, token):
    """The pair that follows (best, token) by falling value, then by rising id; (-inf, _NO_ID)."""
    later = (values < best) | ((values == best) & (ids > token))
    best, token = first_maximum(
        tl.where(later, values, float("-inf")), tl.where(later, ids, _NO_ID)
    )
    return best, token


@jit
def chunk_kernel(
    logits, stride, stats, tops, top_ids,
    V: tl.constexpr, CHUNK: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Fills stats [L, S, 2]: maximum, sum of weights under it; tops, top_ids [L, S, K]."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = offsets < V
    values = load_logits(logits + row * stride, offsets, inside)
    at = row * S + chunk
    largest = tl.max(values, 0)
    mass = 0.0
    if largest > float("-inf"):
        mass = tl.sum(weights_of(values, largest, _LOG2_E, 0.0), 0)
    tl.store(stats + at * 2, largest)
    tl.store(stats + at * 2 + 1, mass)
    ids = tl.where(inside, offsets, _NO_ID)
    best = tl.full([], float("inf"), tl.float32)
    token = tl.full([], -1, tl.int32)
    for i in range(K):
        best, token = next_best(values, ids, best, token)
        tl.store(tops + at * K + i, best)
        tl.store(top_ids + at * K + i, token)


@jit
def logprob_of(value, token, best, first, log_mass):
    """Of raw logits; rows without a finite maximum are repaired as the draw repairs them."""
    finite = tl.where((best > float("-inf")) & (best < float("inf")), best, 0.0)
    gap = tl.minimum(value, finite) - finite
    chosen = tl.where(best == float("inf"), value == best, token == first)
    gap = tl.where(finite == best, gap, tl.where(chosen, 0.0, float("-inf")))
    return tl.maximum(gap - log_mass, _MIN_LOGPROB)


@jit
def row_kernel(
    logits, stride, chosen_ids, stats, tops, top_ids, chosen, found_ids, found,
    S: tl.constexpr, S_PAD: tl.constexpr, K: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, S_PAD)
    parts = stats + (row * S + chunks) * 2
    part_best = tl.load(parts, mask=chunks < S, other=float("-inf"))
    part_mass = tl.load(parts + 1, mask=chunks < S, other=0.0)
    largest = tl.max(part_best, 0)
    log_mass = 0.0
    first = 0  # of a row of nothing but -inf: the only case in which it is read
    if largest > float("-inf"):
        log_mass = tl.log(tl.sum(weights_of(part_best, largest, _LOG2_E, 0.0) * part_mass, 0))
    token = tl.load(chosen_ids + row)
    value = load_logits(logits + row * stride, token, token >= 0)
    tl.store(chosen + row, logprob_of(value, token, largest, first, log_mass))
    if K > 0:
        entries = tl.arange(0, PAD)
        at = row * S * K + entries
        values = tl.load(tops + at, mask=entries < S * K, other=float("-inf"))
        ids = tl.load(top_ids + at, mask=entries < S * K, other=_NO_ID)
        best = tl.full([], float("inf"), tl.float32)
        token = tl.full([], -1, tl.int32)
        for i in range(K):
            best, token = next_best(values, ids, best, token)
            tl.store(found_ids + row * K + i, token.to(tl.int64))
            tl.store(found + row * K + i, logprob_of(best, token, largest, first, log_mass))


@jit
def add_tokens_kernel(
    counts, rows, ids, drafts, num_before, V: tl.constexpr, DRAFTS: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i).to(tl.int64)
    token = tl.load(ids + i)
    is_counted = (row >= 0) & (token >= 0) & (token < V)
    if DRAFTS:
        before = i - tl.load(num_before + i)
        while before < i:
            is_counted = is_counted & (tl.load(ids + before) == tl.load(drafts + before))
            before += 1
    if is_counted:
        tl.atomic_add(counts + row * V + token, 1)
