"""Kernels of a mixture of experts: routing, the order of (token, choice) pairs, grouped products.

A *pair* is a token and one of the experts that it chose: number `token * top_k + choice`. The pairs
of an expert are multiplied in tiles, so that its weight is read for many rows at once. `order`
lists the pairs expert by expert, each one's padded to whole tiles with a number that is no pair:

    order         7  2  9  .  |  0  5  .  .  |  1  3  4  6  |  8  .  .  .      tiles of four rows
    tile_experts       1             4              6              6      -1 -1 ...

Where the pairs go follows from the device's numbers alone; the grid from shapes, so it has room for
the most tiles there can be, and a program whose tile does not exist leaves at once.
"""

from __future__ import annotations

import triton.language as tl

from streamserve_kernels.triton.elementwise import gate
from streamserve_kernels.triton.runtime import jit


@jit
def _of_best_groups(
    values,
    experts,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    VOTES: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The values of a token's experts; minus infinity in groups that are not among the best."""
    groups = tl.arange(0, BLOCK_G)
    worth = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
    for group in tl.static_range(GROUPS):
        mine = tl.where(experts // SIZE == group, values, float("-inf"))
        votes = tl.max(mine, axis=0)
        if VOTES == 2:
            first = tl.argmax(mine, axis=0, tie_break_left=True)
            votes += tl.max(tl.where(experts == first, float("-inf"), mine), axis=0)
        worth = tl.where(groups == group, votes, worth)
    found = tl.full(values.shape, float("-inf"), dtype=tl.float32)
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.argmax(worth, axis=0, tie_break_left=True)
        found = tl.where(experts // SIZE == best, values, found)
        worth = tl.where(groups == best, float("-inf"), worth)
    return found


@jit
def route_kernel(
    logits,  # [T, E]
    chosen,  # [T, TOP_K] int32
    weights,  # [T, TOP_K] float32
    correction,  # [E] float32; read with CORRECTED
    own_scales,  # [E] float32; read with OWN_SCALES
    row_stride,
    eps,
    scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    OWN_SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    VOTES: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The best experts of a token and their weights: see `Routing`; of equals the first."""
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    slots = tl.arange(0, BLOCK_K)
    inside = experts < E
    # no power to speak of, and no infinity that could be subtracted from itself
    values = tl.load(logits + token * row_stride + experts, mask=inside, other=0.0)
    values = tl.where(inside, values.to(tl.float32), -1e38)
    if SIGMOID:
        powers = 1.0 / (1.0 + tl.exp(tl.where(inside, -values, 0.0)))
        total = 1.0
    else:
        powers = tl.exp(values - tl.max(values, axis=0))
        total = tl.sum(powers, axis=0)
    if CORRECTED or GROUPS > 1:
        values = powers / total
        if CORRECTED:
            values += tl.load(correction + experts, mask=inside, other=0.0)
    # Of NaN nothing is the largest, yet an expert must be chosen: any, its probability is NaN too.
    left = tl.where(inside & (values > float("-inf")), values, float("-inf"))
    if GROUPS > 1:
        left = _of_best_groups(left, experts, E // GROUPS, GROUPS, TOP_GROUPS, VOTES, BLOCK_G)
    ids = tl.zeros((BLOCK_K,), dtype=tl.int32)
    likely = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        best = tl.argmax(left, axis=0, tie_break_left=True).to(tl.int32)
        ids = tl.where(slots == slot, best, ids)
        power = tl.sum(tl.where(experts == best, powers, 0.0), axis=0)
        likely = tl.where(slots == slot, power, likely)
        left = tl.where(experts == best, float("-inf"), left)
    likely /= tl.sum(likely, axis=0) + eps * total if RENORMALISE else total
    likely *= scale
    if OWN_SCALES:
        likely *= tl.load(own_scales + ids)
    at = token * TOP_K + slots
    tl.store(chosen + at, ids, mask=slots < TOP_K)
    tl.store(weights + at, likely, mask=slots < TOP_K)


@jit(do_not_specialize=["num_pairs"])
def count_kernel(chosen, counts, num_pairs, BLOCK: tl.constexpr):
    """counts[e]: pairs of expert e, the program's."""
    expert = tl.program_id(0)
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, num_pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(chosen + at, mask=at < num_pairs, other=-1)
        count += (ids == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(count, axis=0))


@jit(do_not_specialize=["num_pairs", "num_tiles"])
def order_kernel(
    chosen,  # [pairs] int32
    counts,  # [E] int32
    order,  # [tiles * BLOCK_M] int32
    tile_experts,  # [tiles] int32
    num_pairs,
    num_tiles,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lists the pairs of one expert, in the order of their numbers, and its tiles."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    tiles = tl.load(counts + experts, mask=experts < E, other=0)
    tiles = (tiles + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
    end_tile = first_tile + tl.sum(tl.where(experts == expert, tiles, 0), axis=0)
    position = first_tile * BLOCK_M
    offsets = tl.arange(0, BLOCK)
    for start in range(0, num_pairs, BLOCK):
        at = start + offsets
        mine = tl.load(chosen + at, mask=at < num_pairs, other=-1) == expert
        ones = mine.to(tl.int32)
        tl.store(order + position + tl.cumsum(ones, axis=0) - 1, at, mask=mine)
        position += tl.sum(ones, axis=0)
    padding = position + tl.arange(0, BLOCK_M)
    tl.store(order + padding, num_pairs, mask=padding < end_tile * BLOCK_M)
    for start in range(first_tile, end_tile, BLOCK):
        at = start + offsets
        tl.store(tile_experts + at, expert, mask=at < end_tile)
    if expert == E - 1:
        for start in range(end_tile, num_tiles, BLOCK):
            at = start + offsets
            tl.store(tile_experts + at, -1, mask=at < num_tiles)


@jit(do_not_specialize=["num_pairs"])
def grouped_product_kernel(
    x,  # [T, K], or [pairs, K] with ROWS_PER_X = 1
    weights,  # [E] int64: addresses of weights [N, K], with KIND >= 0 [2N, K]: gates, then values
    biases,  # [E] int64, of biases of as many outputs; read with HAS_BIAS
    order,  # [tiles * BLOCK_M] int32; read with SORTED
    tile_experts,  # [tiles] int32; without SORTED a tile is one pair, and this [pairs]
    y,  # [pairs, N]
    x_stride,
    num_pairs,
    N,
    K,
    ROWS_PER_X: tl.constexpr,  # pairs that a row of x has
    KIND: tl.constexpr,  # of the activation of gates; -1: a plain product
    HAS_BIAS: tl.constexpr,
    SORTED: tl.constexpr,
    ALIGNED: tl.constexpr,  # addresses are multiples of 16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(tile_experts + tile)
    if expert < 0:
        return
    m = tl.arange(0, BLOCK_M)
    if SORTED:
        pairs = tl.load(order + tile * BLOCK_M + m)
    else:
        pairs = tl.where(m == 0, tile, num_pairs)
    is_pair = pairs < num_pairs
    x_rows = x + (pairs // ROWS_PER_X).to(tl.int64)[:, None] * x_stride
    weight = tl.load(weights + expert).to(x.dtype)
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    rows = weight + n.to(tl.int64)[None, :] * K
    up_rows = weight + (n.to(tl.int64) + N)[None, :] * K
    offsets = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + offsets
        a = tl.load(x_rows + k[None, :], mask=is_pair[:, None] & (k < K)[None, :], other=0.0)
        mask = inside[None, :] & (k < K)[:, None]
        b = tl.load(rows + k[:, None], mask=mask, other=0.0)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if KIND >= 0:
            b = tl.load(up_rows + k[:, None], mask=mask, other=0.0)
            if INTERPRETED:
                b = b.to(tl.float32)
            up_acc = tl.dot(a, b, up_acc, input_precision="ieee")
    if HAS_BIAS:
        bias = tl.load(biases + expert).to(x.dtype)
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        if KIND >= 0:
            up_acc += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    out = acc.to(y.dtype.element_ty)
    if KIND >= 0:
        up = up_acc.to(y.dtype.element_ty).to(tl.float32)
        out = gate(out.to(tl.float32), up, KIND).to(y.dtype.element_ty)
    y_rows = y + pairs.to(tl.int64)[:, None] * N
    tl.store(y_rows + n[None, :], out, mask=is_pair[:, None] & inside[None, :])


@jit
def combine_kernel(
    parts,  # [T * TOP_K, H]
    weights,  # [T, TOP_K] float32
    y,  # [T, H]
    H,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of a token's experts, by their weights."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < H
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        part = tl.load(parts + pair * H + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weights + pair) * part
    tl.store(y + token * H + at, total.to(y.dtype.element_ty), mask=inside)
