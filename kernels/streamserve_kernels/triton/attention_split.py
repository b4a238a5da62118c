"""Attention of requests with few queries: flash-decoding over equal shares of all the keys."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from streamserve_kernels.triton.attention_loop import (
    attend,
    begin,
    blocks_at,
    load_query,
    pointers_to,
    slopes_of,
    store_output,
)
from streamserve_kernels.triton.attention_merge import merge_if_last, zero_idle_rows
from streamserve_kernels.triton.attention_work import (
    group_work,
    membership,
    own_work,
    share_of,
)
from streamserve_kernels.triton.runtime import bring_to_l2


@triton.jit
def store_part(parts, logs, row, peak, weight, acc, valid, c: tl.constexpr):
    """What one program knows of an item: the attention and the log2 of its denominator."""
    columns = tl.arange(0, c.block_dv)
    out = acc / tl.where(weight > 0.0, weight, 1.0)[:, None]
    log = tl.where(weight > 0.0, peak + tl.log2(tl.where(weight > 0.0, weight, 1.0)), -1.0e30)
    row = row.to(tl.int64)
    # Past the first-level cache, where another program's loads would not see them.
    tl.store(logs + row, log, mask=valid, cache_modifier=".cg")
    pointers = parts + row[:, None] * c.block_dv + columns[None, :]
    tl.store(pointers, out, mask=valid[:, None], cache_modifier=".cg")


@triton.jit
def bring_rows(
    cache, block_stride, head_stride, row_stride, block, kv_head, offset,
    one_block: tl.constexpr, size: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Has the cache lines of rows `offset` [N] of `block` brought nearer: see `pointers_to`."""
    LINE: tl.constexpr = 128 * 8 // cache.dtype.element_ty.primitive_bitwidth
    columns = tl.minimum(tl.arange(0, (padded + LINE - 1) // LINE) * LINE, size - 1)
    bring_to_l2(
        pointers_to(
            cache, block_stride, head_stride, row_stride, block, kv_head, offset, columns, one_block
        )
    )


@triton.jit
def ask_ahead(cache, batch, rule, request, unit, c: tl.constexpr):
    """Has a tile of keys and values brought nearer: that of a request's `unit` of its work."""
    KEYS: tl.constexpr = c.split_keys
    one_block: tl.constexpr = c.block_size % KEYS == 0
    _, _, length, start, key_tiles, row_tiles = own_work(
        request, request < batch.num_requests, 0, batch, rule, c
    )
    if unit < key_tiles * row_tiles * c.num_kv_heads:
        kv_head = unit // key_tiles // row_tiles
        at = start + unit % key_tiles * KEYS
        table = batch.block_table + request.to(tl.int64) * batch.table_stride
        block = blocks_at(table, at, length, one_block, KEYS, c)
        offset = (at + tl.arange(0, KEYS)) % c.block_size
        bring_rows(
            cache.key, cache.key_block, cache.key_head, cache.key_row,
            block, kv_head, offset, one_block, c.head_size, c.block_d,
        )  # fmt: skip
        bring_rows(
            cache.value, cache.value_block, cache.value_head, cache.value_row,
            block, kv_head, offset, one_block, c.value_size, c.block_dv,
        )  # fmt: skip


@triton.jit
def own_segment(
    query, query_stride, output, parts, logs, slopes, sinks, cache, batch, rule,
    program, request, first, count, length, start, item, key_tiles, row_tiles, tile, tiles,
    alone, whole_base, c: tl.constexpr,
):  # fmt: skip
    """Key tiles `tile` to `tile + tiles` of one item of one request."""
    ROWS: tl.constexpr = c.split_rows
    kv_head = item // row_tiles
    index = tl.arange(0, ROWS)
    row = item % row_tiles * ROWS + index
    valid = row < count * c.group
    token = first + row // c.group
    head = kv_head * c.group + row % c.group
    position = length - count + row // c.group
    q = load_query(query, query_stride, token, head, valid, c)
    slope = slopes_of(slopes, head, valid, ROWS, c)
    peak, weight, acc = begin(sinks, head, valid, tile == 0, ROWS, c)
    first_key = start + tile * c.split_keys
    peak, weight, acc = attend(
        q, position, slope, peak, weight, acc, cache,
        batch.block_table + request.to(tl.int64) * batch.table_stride, kv_head,
        first_key, tl.minimum(first_key + tiles * c.split_keys, length), length, rule,
        True, True, c.split_keys, c,
    )  # fmt: skip
    whole = tiles == key_tiles
    store_output(output, token, head, acc, weight, valid & whole & alone, c)
    part = (program * 2 + (tile == 0).to(tl.int32)) * ROWS + index
    if c.has_groups:
        # of a request in a group even a whole item waits to be merged with the shared part
        slot = request * batch.shared_queries + row // c.group
        whole_row = whole_base + slot * (c.num_kv_heads * c.group) + head
        part = tl.where(whole, whole_row, part)
    store_part(parts, logs, part, peak, weight, acc, valid & ~(whole & alone), c)


@triton.jit
def own_parts(
    query, query_stride, output, parts, logs, places, slopes, sinks, cache, batch, rule,
    program, programs, num_tokens, whole_base, c: tl.constexpr,
):  # fmt: skip
    """A program's share of what each request attends to for itself.

    Of one launch `places` counts the programs that have done their part of an item. Else it is told
    what a merge must know: each program's share, and each request's first unit.
    """
    share, at, end, request, passed, queries = share_of(program, programs, batch, rule, False, c)
    if c.asks_ahead:
        if at < end:
            ask_ahead(cache, batch, rule, request, at - passed, c)
    if c.overlaps:
        gdc_wait()
    if c.one_launch:
        if queries < num_tokens:
            zero_idle_rows(output, batch, rule, program, programs, num_tokens, c)
    else:
        tl.store(places, share, mask=program == 0)
    prefix = tl.full([], 0, tl.int32)
    if c.has_groups:
        looked_up = prefix - 1  # the request whose prefix it is
    while at < end:
        if c.has_groups:
            if request != looked_up:
                _, _, blocks = membership(request, batch)
                prefix = blocks * c.block_size
                looked_up = request
        first, count, length, start, key_tiles, row_tiles = own_work(
            request, request < batch.num_requests, prefix, batch, rule, c
        )
        alone = (prefix == 0) | (count > batch.shared_queries)
        work = key_tiles * row_tiles * c.num_kv_heads
        divisor = tl.maximum(key_tiles, 1)
        tile = (at - passed) % divisor
        tiles = tl.where(at - passed < work, tl.minimum(key_tiles - tile, end - at), 0)
        if tiles > 0:
            if not c.one_launch:
                if at == passed:
                    tl.store(places + 1 + request, passed)
            item = (at - passed) // divisor
            own_segment(
                query, query_stride, output, parts, logs, slopes, sinks, cache, batch, rule,
                program, request, first, count, length, start, item,
                key_tiles, row_tiles, tile, tiles, alone, whole_base, c,
            )  # fmt: skip
            if c.one_launch:
                if tiles < key_tiles:
                    merge_if_last(
                        output, parts, logs, places, first, count, item // row_tiles,
                        at - tile, key_tiles, share, c,
                    )  # fmt: skip
        at += tiles
        done = at - passed >= work
        passed += tl.where(done, work, 0)
        request += done.to(tl.int32)


@triton.jit
def shared_segment(
    query, query_stride, parts, logs, slopes, sinks, cache, batch, rule,
    program, first, count, num_keys, item, key_tiles, row_tiles, tile, tiles,
    part_base, whole_base, c: tl.constexpr,
):  # fmt: skip
    """Key tiles `tile` to `tile + tiles` of one item of one group: rows of all its members."""
    ROWS: tl.constexpr = c.shared_rows
    kv_head = item // row_tiles
    index = tl.arange(0, ROWS)
    row = item % row_tiles * ROWS + index
    place = row // c.group // batch.shared_queries
    number = row // c.group % batch.shared_queries  # of the query in its request
    request = tl.load(batch.members + first + place, mask=place < count, other=0)
    start = tl.load(batch.query_start_loc + request)
    queries = tl.load(batch.query_start_loc + request + 1) - start
    valid = (place < count) & (number < queries) & (queries <= batch.shared_queries)
    token = start + number
    head = kv_head * c.group + row % c.group
    position = tl.load(batch.seq_lens + request) - queries + number
    q = load_query(query, query_stride, token, head, valid, c)
    slope = slopes_of(slopes, head, valid, ROWS, c)
    peak, weight, acc = begin(sinks, head, valid, False, ROWS, c)
    leader = tl.load(batch.members + first).to(tl.int64)
    first_key = tile * c.shared_keys
    peak, weight, acc = attend(
        q, position, slope, peak, weight, acc, cache,
        batch.block_table + leader * batch.table_stride, kv_head,
        first_key, tl.minimum(first_key + tiles * c.shared_keys, num_keys), num_keys, rule,
        c.block_size % c.shared_keys != 0, False, c.shared_keys, c,
    )  # fmt: skip
    slot = request * batch.shared_queries + number
    whole_row = whole_base + slot * (c.num_kv_heads * c.group) + head
    part = part_base + (program * 2 + (tile == 0).to(tl.int32)) * ROWS + index
    part = tl.where(tiles == key_tiles, whole_row, part)
    store_part(parts, logs, part, peak, weight, acc, valid, c)


@triton.jit
def shared_parts(
    query, query_stride, parts, logs, places, slopes, sinks, cache, batch, rule,
    program, programs, part_base, whole_base, c: tl.constexpr,
):  # fmt: skip
    """A program's share of what groups attend to: each shared key once for all members.

    Leaves in `places` each program's share, and each group's first unit.
    """
    share, at, end, group, passed, _ = share_of(program, programs, batch, rule, True, c)
    if c.overlaps:
        gdc_wait()
    tl.store(places, share, mask=program == 0)
    while at < end:
        first, count, num_keys, key_tiles, row_tiles = group_work(
            group, group < batch.num_groups, batch, c
        )
        work = key_tiles * row_tiles * c.num_kv_heads
        divisor = tl.maximum(key_tiles, 1)
        tile = (at - passed) % divisor
        tiles = tl.where(at - passed < work, tl.minimum(key_tiles - tile, end - at), 0)
        if tiles > 0:
            if at == passed:
                tl.store(places + 1 + group, passed)
            shared_segment(
                query, query_stride, parts, logs, slopes, sinks, cache, batch, rule,
                program, first, count, num_keys, (at - passed) // divisor,
                key_tiles, row_tiles, tile, tiles, part_base, whole_base, c,
            )  # fmt: skip
        at += tiles
        done = at - passed >= work
        passed += tl.where(done, work, 0)
        group += done.to(tl.int32)
