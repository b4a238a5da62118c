"""Attention of few query rows over a paged cache: the decode step, in one pass over the blocks.

The work of a step is a line of (request, kv head, block) units. It is cut into one equal piece per
thread, so a single long sequence uses every core and many short ones balance (stream-K, Osama et
al. 2023; flash-decoding, Dao et al. 2023). A cut inside one (request, head) leaves two or more
partial results, (accumulator, maximum, sum) each, which one thread merges at the end. A KV tile is
read once for all the query rows that share its head, straight from the cache.

    thread 0                  thread 1
    |r0 h0 ......|r0 h1 ..  | ..r0 h1 |r1 h0 ......|
                     └── merged ──┘
"""

# Numba infers the types of these functions: annotations would only repeat its work.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from streamserve_kernels.cpu.jit import (
    at,
    call_int,
    call_void,
    compile_body,
    exp,
    float_of,
    inline,
    pointer,
)
from streamserve_kernels.cpu.simd import (
    add_scaled,
    add_scaled4,
    add_scaled16,
    dot,
    dots16,
    fill,
    prefetch,
    scale_into,
)
from streamserve_kernels.cpu.vector import LANES

# After the pool's three: output, query, key_cache, value_cache, block_table, seq_lens,
# query_start_loc, alibi_slopes or 0, sinks or 0, scratch; strides of a query token and of a table
# row; R, Hq, Hkv; most rows and most queries of a request; window or 0; scale, soft cap or 0.
LAYOUT = "10q2q3q2q1q2d"


def padded_block(block_size: int) -> int:
    """Rows of a tile: whole vectors of scores."""
    return -(-block_size // LANES) * LANES


def scratch_floats(
    threads: int, max_rows: int, head_size: int, value_size: int, block_size: int
) -> int:
    """Float32 elements of scratch: an area for each thread, then two partial results for each."""
    padded = padded_block(block_size)
    state = max_rows * (value_size + 2)
    area = max_rows * (head_size + padded) + state + padded * (head_size + value_size)
    return threads * (area + 2 * state)


@inline
def _block_range(seq_len, queries, window, block_size):
    """First and one past the last block that any query of a request can see."""
    first = 0
    if window > 0:
        first = max(0, seq_len - queries - window + 1) // block_size
    return first, (seq_len + block_size - 1) // block_size


@inline
def _slot(thread, low, begin):
    """Where a thread leaves a partial result: 0 for the item it begins in, else 1."""
    return 2 * thread + (0 if low == begin else 1)


@inline
def _bias_scores(scores, low, high, distance, soft_cap, slope):
    """Caps the scores [low, high) and adds ALiBi; key s is `distance + s` from the query."""
    if soft_cap > np.float32(0.0):
        for s in range(low, high):
            e = exp(np.float32(2.0) * scores[s] / soft_cap)
            scores[s] = soft_cap * (np.float32(1.0) - np.float32(2.0) / (e + np.float32(1.0)))
    if slope != np.float32(0.0):
        for s in range(low, high):
            scores[s] += slope * np.float32(distance + s)


@inline
def _score_keys(scores, row_query, keys, low, high, head_size, padded):
    """Scores of a tile's keys; those outside [low, high) may be anything."""
    if head_size % 16 == 0:
        for s in range(0, padded, 16):
            dots16(at(scores, s), row_query, at(keys, s * head_size), head_size)
    else:
        for s in range(low, high):
            scores[s] = dot(row_query, at(keys, s * head_size), head_size)


@inline
def _softmax_step(scores, low, high, row_state, acc, value_size, padded):
    """Online softmax (Milakov & Gimelshein 2018): scores become weights, the old sum is rescaled.

    Runs over the whole padded tile, whose length is known when it is compiled: what is outside
    [low, high) becomes -inf first, and weighs e^-87 at most.

    `row_state` holds the row's running maximum and sum; `acc` its running weighted values.
    """
    for s in range(low):
        scores[s] = np.float32(-np.inf)
    for s in range(high, padded):
        scores[s] = np.float32(-np.inf)
    old = row_state[0]
    new = old
    for s in range(padded):
        new = max(new, scores[s])
    if new > old:
        # exp clamps at e^-87, so the first tile needs its own zero
        factor = exp(old - new) if old > np.float32(-np.inf) else np.float32(0.0)
        row_state[0] = new
        row_state[1] *= factor
        scale_into(acc, acc, factor, value_size)
    added = np.float32(0.0)
    for s in range(padded):
        p = exp(scores[s] - new)
        scores[s] = p
        added += p
    row_state[1] += added


@inline
def _add_values(acc, weights, values, low, high, value_size):
    """Adds weights[low:high] @ values[low:high] to acc."""
    s = low
    while s + 16 <= high:
        add_scaled16(acc, at(values, s * value_size), at(weights, s), value_size)
        s += 16
    while s + 4 <= high:
        add_scaled4(
            acc,
            at(values, s * value_size),
            weights[s],
            weights[s + 1],
            weights[s + 2],
            weights[s + 3],
            value_size,
        )
        s += 4
    while s < high:
        add_scaled(acc, at(values, s * value_size), weights[s], value_size)
        s += 1


@inline
def _finish_item(output, acc, rows, row0, h, group, num_heads, sinks, has_sinks, value_size):
    """Writes the outputs of one (request, kv head) from its rows of (acc [Dv], maximum, sum)."""
    for row in range(rows):
        head = h * group + row % group
        row_acc = at(acc, row * (value_size + 2))
        total = row_acc[value_size + 1]
        if has_sinks:
            total += exp(sinks[head] - row_acc[value_size])
        target = at(output, ((row0 + row // group) * num_heads + head) * value_size)
        scale_into(target, row_acc, np.float32(1.0) / total, value_size)


@inline
def _load_tile(tile, cache, first, low, high, size):
    """Widens rows [low, high) of a block that starts at row `first` of the cache."""
    for s in range(low, high):
        scale_into(at(tile, s * size), at(cache, (first + s) * size), np.float32(1.0), size)


@inline
def _merge(into, source, rows, value_size):
    """Adds the partial result `source` to `into`: rows of (acc [Dv], maximum, sum)."""
    for row in range(rows):
        a, b = at(into, row * (value_size + 2)), at(source, row * (value_size + 2))
        state_a, state_b = at(a, value_size), at(b, value_size)
        new = max(state_a[0], state_b[0])
        if new == np.float32(-np.inf):
            continue
        zero = np.float32(0.0)
        factor_a = exp(state_a[0] - new) if state_a[1] > zero else zero
        factor_b = exp(state_b[0] - new) if state_b[1] > zero else zero
        scale_into(a, a, factor_a, value_size)
        add_scaled(a, b, factor_b, value_size)
        state_a[0] = new
        state_a[1] = factor_a * state_a[1] + factor_b * state_b[1]


@lru_cache(maxsize=64)
def attention_body(  # noqa: C901, PLR0915 -- one C function; its steps are the inlined ones above
    bits: int, head_size: int, value_size: int, block_size: int
) -> Any:
    """The kernel for one element kind, head sizes and block size."""
    row_size = value_size + 2
    padded = padded_block(block_size)
    key_bytes, value_bytes = block_size * head_size * bits // 8, block_size * value_size * bits // 8

    def body(args):  # noqa: C901, PLR0912, PLR0915
        thread, num_threads = 0, 1
        if args[0] != 0:
            thread, num_threads = call_int(args[0]), call_int(args[1])
        output = pointer(args[3], bits)  # [T, Hq, Dv]
        query = pointer(args[4], bits)  # [T, Hq, D]
        key_cache = pointer(args[5], bits)  # [B, Hkv, S, D]
        value_cache = pointer(args[6], bits)  # [B, Hkv, S, Dv]
        block_table = pointer(args[7], -32)  # [R, M]
        seq_lens = pointer(args[8], -32)
        query_start = pointer(args[9], -32)
        slopes, sinks = pointer(args[10], 32), pointer(args[11], 32)
        scratch = pointer(args[12], 32)
        query_stride, table_stride = args[13], args[14]
        num_requests, num_heads, num_kv_heads = args[15], args[16], args[17]
        max_rows, max_queries, window = args[18], args[19], args[20]
        scale, soft_cap = float_of(args[21]), float_of(args[22])
        has_slopes, has_sinks = args[10] != 0, args[11] != 0
        group = num_heads // num_kv_heads

        state = max_rows * row_size
        area = max_rows * (head_size + padded) + state + padded * (head_size + value_size)
        row_queries = at(scratch, thread * area)
        row_scores = at(row_queries, max_rows * head_size)
        own_state = at(row_scores, max_rows * padded)
        tile_keys = at(own_state, state)
        tile_values = at(tile_keys, padded * head_size)
        partials = at(scratch, num_threads * area)

        total = 0
        for r in range(num_requests):
            queries = np.int64(query_start[r + 1]) - np.int64(query_start[r])
            if 0 < queries <= max_queries:
                first, last = _block_range(np.int64(seq_lens[r]), queries, window, block_size)
                total += (last - first) * num_kv_heads
        begin = total * thread // num_threads
        end = total * (thread + 1) // num_threads

        item = 0
        for r in range(num_requests):
            row0 = np.int64(query_start[r])
            queries = np.int64(query_start[r + 1]) - row0
            if queries <= 0 or queries > max_queries:
                continue
            seq_len = np.int64(seq_lens[r])
            first, last = _block_range(seq_len, queries, window, block_size)
            blocks = last - first
            rows = queries * group
            for h in range(num_kv_heads):
                low, high = max(begin, item), min(end, item + blocks)
                offset = first - item
                item += blocks
                if low >= high:
                    continue
                whole = high - low == blocks
                acc = own_state
                if not whole:
                    acc = at(partials, _slot(thread, low, begin) * state)
                for row in range(rows):
                    head = h * group + row % group
                    source = at(query, (row0 + row // group) * query_stride + head * head_size)
                    scale_into(at(row_queries, row * head_size), source, scale, head_size)
                    row_acc = at(acc, row * row_size)
                    fill(row_acc, np.float32(0.0), value_size)
                    row_acc[value_size] = np.float32(-np.inf)
                    row_acc[value_size + 1] = np.float32(0.0)
                for b in range(low + offset, high + offset):
                    block = np.int64(block_table[r * table_stride + b])
                    tile = (block * num_kv_heads + h) * block_size
                    start = b * block_size
                    if b + 1 < high + offset:
                        # the table is shuffled: the hardware cannot guess the next block
                        following = np.int64(block_table[r * table_stride + b + 1])
                        following = (following * num_kv_heads + h) * block_size
                        prefetch(at(key_cache, following * head_size), key_bytes)
                        prefetch(at(value_cache, following * value_size), value_bytes)
                    # the keys of this block that any of the rows may see
                    stop_s = min(block_size, seq_len - start)
                    start_s = 0
                    if window > 0:
                        start_s = max(0, seq_len - queries - window + 1 - start)
                    _load_tile(tile_keys, key_cache, tile, start_s, stop_s, head_size)
                    _load_tile(tile_values, value_cache, tile, start_s, stop_s, value_size)
                    for row in range(rows):
                        position = seq_len - queries + row // group
                        low_s, high_s = start_s, min(stop_s, position + 1 - start)
                        if window > 0:
                            low_s = max(low_s, position - window + 1 - start)
                        if low_s >= high_s:
                            continue
                        scores = at(row_scores, row * padded)
                        row_query = at(row_queries, row * head_size)
                        _score_keys(scores, row_query, tile_keys, low_s, high_s, head_size, padded)
                        slope = np.float32(0.0)
                        if has_slopes:
                            slope = slopes[h * group + row % group]
                        _bias_scores(scores, low_s, high_s, start - position, soft_cap, slope)
                        row_acc = at(acc, row * row_size)
                        _softmax_step(
                            scores,
                            low_s,
                            high_s,
                            at(row_acc, value_size),
                            row_acc,
                            value_size,
                            padded,
                        )
                        _add_values(row_acc, scores, tile_values, low_s, high_s, value_size)
                if whole:
                    _finish_item(
                        output, acc, rows, row0, h, group, num_heads, sinks, has_sinks, value_size
                    )
        if num_threads == 1:
            return
        call_void(args[2])
        if thread > 0:
            return
        item = 0
        for r in range(num_requests):
            row0 = np.int64(query_start[r])
            queries = np.int64(query_start[r + 1]) - row0
            if queries <= 0 or queries > max_queries:
                continue
            first, last = _block_range(np.int64(seq_lens[r]), queries, window, block_size)
            blocks = last - first
            rows = queries * group
            for h in range(num_kv_heads):
                pieces = 0
                acc = own_state
                for t in range(num_threads):
                    t_begin = total * t // num_threads
                    low = max(t_begin, item)
                    high = min(total * (t + 1) // num_threads, item + blocks)
                    if low >= high or high - low == blocks:
                        continue
                    part = at(partials, _slot(t, low, t_begin) * state)
                    if pieces == 0:
                        acc = part
                    else:
                        _merge(acc, part, rows, value_size)
                    pieces += 1
                item += blocks
                if pieces > 0:
                    _finish_item(
                        output, acc, rows, row0, h, group, num_heads, sinks, has_sinks, value_size
                    )

    return compile_body(body)
