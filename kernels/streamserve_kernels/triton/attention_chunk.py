"""Attention of requests with many queries: a tile of a prompt's query rows at a time."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from streamserve_kernels.triton.attention_loop import (
    attend,
    begin,
    load_query,
    slopes_of,
    store_output,
)


@triton.jit
def request_of_tile(tile, batch, ROWS: tl.constexpr, c: tl.constexpr):
    """(request, its first tile): request r has tiles from `query_start_loc[r]·group // ROWS + r`.

    That is at least as many as its rows need, and a grid needs to know no length. The request after
    the last one has the rows that belong to none.
    """
    low = tl.full([], 0, tl.int32)
    high = tl.full([], 0, tl.int32) + batch.num_requests
    while low < high:  # the last request whose first tile is not past this one
        middle = (low + high + 1) // 2
        first = tl.load(batch.query_start_loc + middle) * c.group // ROWS + middle
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle - 1)
    return low, tl.load(batch.query_start_loc + low) * c.group // ROWS + low


@triton.jit
def chunk_tile(
    query, query_stride, output, num_tokens, slopes, sinks, cache, batch, rule,
    tile, kv_head, c: tl.constexpr,
):  # fmt: skip
    """One tile of query rows, unless it is past its request's or the request is split work."""
    ROWS: tl.constexpr = c.chunk_rows
    KEYS: tl.constexpr = c.chunk_keys
    request, first_tile = request_of_tile(tile, batch, ROWS, c)
    real = request < batch.num_requests
    first = tl.load(batch.query_start_loc + request)
    after = tl.load(batch.query_start_loc + request + 1, mask=real, other=0)
    count = tl.where(real, after, num_tokens) - first
    length = tl.load(batch.seq_lens + request, mask=real, other=0)
    first_row = (tile - first_tile) * ROWS
    if c.overlaps:
        gdc_wait()
    if (first_row < count * c.group) & (
        (count > batch.split_queries) | (request >= batch.num_requests)
    ):
        row = first_row + tl.arange(0, ROWS)
        valid = row < count * c.group
        token = first + row // c.group
        head = kv_head * c.group + row % c.group
        before = length - count
        position = before + row // c.group
        q = load_query(query, query_stride, token, head, valid & real, c)
        slope = slopes_of(slopes, head, valid, ROWS, c)
        peak, weight, acc = begin(sinks, head, valid, real, ROWS, c)
        table = batch.block_table + tl.where(real, request, 0).to(tl.int64) * batch.table_stride

        #  keys      start     full      rest      stop
        #  first row   |··\#####|#########|\
        #  last row    |    \···|#########|###\      # visible   · not
        oldest = before + first_row // c.group
        newest = tl.minimum(before + (first_row + ROWS - 1) // c.group, length - 1)
        stop = newest + 1
        start = tl.full([], 0, tl.int32)
        full = start
        rest = tl.maximum(oldest + 1, 0) // KEYS * KEYS
        if c.has_window:
            start = tl.maximum(oldest - rule.window + 1, 0) // KEYS * KEYS
            full = (tl.maximum(newest - rule.window + 1, 0) + KEYS - 1) // KEYS * KEYS
            peak, weight, acc = attend(
                q, position, slope, peak, weight, acc, cache, table, kv_head,
                start, tl.minimum(full, stop), stop, rule, True, True, KEYS, c,
            )  # fmt: skip
        peak, weight, acc = attend(
            q, position, slope, peak, weight, acc, cache, table, kv_head,
            full, rest, stop, rule, False, True, KEYS, c,
        )  # fmt: skip
        peak, weight, acc = attend(
            q, position, slope, peak, weight, acc, cache, table, kv_head,
            tl.maximum(full, rest), stop, stop, rule, True, True, KEYS, c,
        )  # fmt: skip
        store_output(output, token, head, acc, weight, valid, c)
