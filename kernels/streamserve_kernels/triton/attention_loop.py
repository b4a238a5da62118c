"""The inner loop of all attention kernels: one tile of query rows over a run of paged keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

MASKED = tl.constexpr(-1.0e30)  # a score, before it is scaled
NOTHING = tl.constexpr(-1.0e20)  # the largest of no scores


class Constants(NamedTuple):
    """What a kernel is compiled for. A path's `rows` and `keys` are the size of its score tiles."""

    num_kv_heads: int
    group: int  # query heads per kv head
    head_size: int
    value_size: int
    block_d: int  # the sizes of a head, padded to powers of two
    block_dv: int
    block_size: int
    split_rows: int
    split_keys: int
    chunk_rows: int
    chunk_keys: int
    shared_rows: int
    shared_keys: int
    has_window: bool
    has_alibi: bool
    has_cap: bool
    has_sinks: bool
    has_groups: bool
    has_chunks: bool
    least_units: int  # of split work, for one program
    one_launch: bool  # the last program at a part of the output puts it together
    merged_rows: int  # of a split tile that a request can have; then only
    asks_ahead: bool  # for its first keys and values, before it waits for the kernel before
    unscaled: bool  # scores are scaled in the exponent
    ieee: bool  # float32 operands are multiplied as such, not as TF32
    in_float16: bool  # products of bfloat16 queries and float8 keys: see `load_query`
    overlaps: bool  # see `runtime.overlaps`
    interpreted: bool


class Cache(NamedTuple):
    """Key and value caches [B, Hkv, S, D] with the strides of their first three dimensions."""

    key: Any
    key_block: Any
    key_head: Any
    key_row: Any
    value: Any
    value_block: Any
    value_head: Any
    value_row: Any


class Rule(NamedTuple):
    """How a score is made of a product. In base 2: `scale`, `slopes` and `sinks` carry log2(e)."""

    scale: Any
    soft_cap: Any
    window: Any


@triton.jit
def score(
    product,
    position,
    slope,
    keys,
    limit,
    rule,
    masked: tl.constexpr,
    causal: tl.constexpr,
    c: tl.constexpr,
):
    """Base-2 scores [M, N] of products q·k; what a row may not see becomes hugely negative.

    Where nothing else happens to a score it is left unscaled, for the exponential to do both.
    Hugely, not infinitely: no difference is that of two infinities.
    """
    if c.has_cap:
        # cap·tanh(x / cap) with tanh(y) = 1 - 2 / (1 + e^2y): exact at both ends
        doubled = product * (rule.scale * 2.0 / rule.soft_cap)
        capped = 1.0 - 2.0 / (1.0 + tl.exp2(doubled))
        scores = capped * (rule.soft_cap * 1.4426950408889634)
    else:
        scores = product if c.unscaled else product * rule.scale
    if c.has_alibi:
        scores += slope[:, None] * (keys[None, :] - position[:, None]).to(tl.float32)
    if masked:
        if causal:
            visible = keys[None, :] <= position[:, None]
            if c.has_window:
                visible = visible & (position[:, None] - keys[None, :] < rule.window)
        else:
            visible = keys[None, :] < limit
        scores = tl.where(visible, scores, MASKED)
    return scores


@triton.jit
def pointers_to(
    cache,
    block_stride,
    head_stride,
    row_stride,
    block,
    kv_head,
    offset,
    columns,
    one_block: tl.constexpr,
):
    """To `columns` [M] of rows `offset` [N] of `block` -> [N, M].

    `block` is one for all (`one_block`) or one for each row.
    """
    base = block * block_stride + kv_head * head_stride
    if one_block:
        pointers = cache + base + (offset[:, None] * row_stride + columns[None, :])
    else:
        pointers = cache + (base + offset * row_stride)[:, None] + columns[None, :]
    return pointers


@triton.jit
def load_rows(
    cache,
    block_stride,
    head_stride,
    row_stride,
    block,
    kv_head,
    offset,
    keys,
    limit,
    bounded: tl.constexpr,
    one_block: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
):
    """Rows `offset` [N] of `block` -> [N, padded]: see `pointers_to`.

    Bounded: zeros from key `limit` on, where nothing was ever written.
    """
    columns = tl.arange(0, padded)
    pointers = pointers_to(
        cache, block_stride, head_stride, row_stride, block, kv_head, offset, columns, one_block
    )
    if bounded and size < padded:
        tile = tl.load(
            pointers, mask=(keys[:, None] < limit) & (columns[None, :] < size), other=0.0
        )
    elif bounded:
        tile = tl.load(pointers, mask=keys[:, None] < limit, other=0.0)
    elif size < padded:
        tile = tl.load(pointers, mask=columns[None, :] < size, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def blocks_at(table, at, stop, one_block: tl.constexpr, KEYS: tl.constexpr, c: tl.constexpr):
    """Int64 ids of the blocks that hold the keys from `at`: one for a tile, or one for each key."""
    if one_block:
        block = tl.load(table + at // c.block_size, mask=at < stop, other=0)
    else:
        keys = at + tl.arange(0, KEYS)
        block = tl.load(table + keys // c.block_size, mask=keys < stop, other=0)
    return block.to(tl.int64)


@triton.jit
def multiply(a, b, acc, c: tl.constexpr):
    """`acc + a @ b` in float32. The interpreter is wrong about bfloat16, and knows no float8."""
    if c.interpreted:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif c.ieee:
        out = tl.dot(a, b, acc, input_precision="ieee")
    else:
        out = tl.dot(a, b, acc)
    return out


@triton.jit
def attend(
    query,  # [M, block_d]
    position,  # [M] of the rows; keys past it are invisible
    slope,  # [M], ALiBi
    peak,  # [M] largest score so far
    weight,  # [M] sum of 2^(score - peak) so far
    acc,  # [M, block_dv] sum of 2^(score - peak)·value so far
    cache,
    table,  # of one request
    kv_head,
    start,
    stop,
    limit,  # keys from here on are never read
    rule,
    masked: tl.constexpr,  # rows may not see all of it, or it ends at `limit` inside a tile
    causal: tl.constexpr,
    KEYS: tl.constexpr,
    c: tl.constexpr,
):
    """Online softmax (Milakov & Gimelshein 2018) over the keys from `start` to `stop`.

    Where a block holds whole tiles, a tile is one look-up and one contiguous piece of memory.
    """
    one_block: tl.constexpr = c.block_size % KEYS == 0
    ROWS: tl.constexpr = query.shape[0]
    block = blocks_at(table, start, stop, one_block, KEYS, c)
    for at in range(start, stop, KEYS):
        keys = at + tl.arange(0, KEYS)
        offset = keys % c.block_size
        if one_block:
            offset = at % c.block_size + tl.arange(0, KEYS)
        # One tile ahead: a look-up whose tile is in the same turn would be a step of the pipeline
        # of its own and take half of the keys' and values' buffers. For the same reason the loop
        # has the kernel's number of stages: with one of its own, all its loads are pipelined.
        later = blocks_at(table, at + KEYS, stop, one_block, KEYS, c)
        k = load_rows(
            cache.key,
            cache.key_block,
            cache.key_head,
            cache.key_row,
            block,
            kv_head,
            offset,
            keys,
            limit,
            masked,
            one_block,
            c.head_size,
            c.block_d,
        ).to(query.dtype)
        zeros = tl.zeros([ROWS, KEYS], tl.float32)
        scores = score(
            multiply(query, tl.trans(k), zeros, c),
            position,
            slope,
            keys,
            limit,
            rule,
            masked,
            causal,
            c,
        )
        if c.unscaled:
            higher = tl.maximum(peak, tl.max(scores, 1) * rule.scale)
            weights = tl.exp2(scores * rule.scale - higher[:, None])
        else:
            higher = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
        decay = tl.exp2(peak - higher)
        v = load_rows(
            cache.value,
            cache.value_block,
            cache.value_head,
            cache.value_row,
            block,
            kv_head,
            offset,
            keys,
            limit,
            masked,
            one_block,
            c.value_size,
            c.block_dv,
        ).to(query.dtype)
        weight = weight * decay + tl.sum(weights, 1)
        acc = multiply(weights.to(query.dtype), v, acc * decay[:, None], c)
        peak = higher
        block = later
    return peak, weight, acc


@triton.jit
def begin(sinks, head, valid, with_sink, ROWS: tl.constexpr, c: tl.constexpr):
    """The softmax of nothing, or of the sink alone: (peak, weight, acc).

    Nothing is below every score and far above what is masked: a row that sees nothing in its first
    tiles keeps a weight of exactly 0. With their own largest score as its peak, the masked ones
    would weigh 2^(x·scale - x·scale), of which a GPU rounds the second product and not the first.
    """
    peak = tl.full([ROWS], NOTHING, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    if c.has_sinks:
        there = valid & with_sink
        sink = tl.load(sinks + head, mask=there, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(sink * 1.4426950408889634, NOTHING)
        weight = tl.where(peak == NOTHING, 0.0, 1.0)
    DV: tl.constexpr = c.block_dv
    return peak, weight, tl.zeros([ROWS, DV], tl.float32)


@triton.jit
def slopes_of(slopes, head, valid, ROWS: tl.constexpr, c: tl.constexpr):
    slope = tl.zeros([ROWS], tl.float32)
    if c.has_alibi:
        slope = tl.load(slopes + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
    return slope


@triton.jit
def load_query(query, stride, token, head, valid, c: tl.constexpr):
    """Rows [M, block_d] of query [T, Hq, D], whose heads are adjacent; zeros where not valid.

    Their dtype is that of the products. A GPU makes two numbers of float8 into float16 by one
    instruction, exactly; bfloat16 takes two more, at a quarter of the rate.
    """
    columns = tl.arange(0, c.block_d)
    row = token.to(tl.int64) * stride + head * c.head_size
    mask = valid[:, None] & (columns[None, :] < c.head_size)
    q = tl.load(query + row[:, None] + columns[None, :], mask=mask, other=0.0)
    if c.in_float16:
        largest = 65504.0
        q = tl.clamp(q.to(tl.float32), -largest, largest, tl.PropagateNan.ALL).to(tl.float16)
    return q


@triton.jit
def store_output(output, token, head, acc, weight, valid, c: tl.constexpr):
    """Rows of output [T, Hq, Dv]; a row that saw nothing is zero."""
    columns = tl.arange(0, c.block_dv)
    out = acc / tl.where(weight > 0.0, weight, 1.0)[:, None]
    row = token.to(tl.int64) * (c.num_kv_heads * c.group) + head
    mask = valid[:, None] & (columns[None, :] < c.value_size)
    pointers = output + row[:, None] * c.value_size + columns[None, :]
    tl.store(pointers, out.to(output.dtype.element_ty), mask=mask)
