"""Puts together what several programs, or a group and its member, know of a row of attention."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from streamserve_kernels.triton.attention_work import (
    REQUESTS,
    group_work,
    membership,
    own_work,
)

PARTS = tl.constexpr(16)  # read at a time
PART_ROWS = tl.constexpr(64)  # of parts, read at a time by the last program of an item


@triton.jit
def request_of_token(token, batch):
    """The request of a row, or `num_requests` if it belongs to none."""
    request = tl.full([], 0, tl.int32)
    for base in range(0, batch.num_requests, REQUESTS):
        index = base + tl.arange(0, REQUESTS)
        valid = index < batch.num_requests
        after = tl.load(batch.query_start_loc + index + 1, mask=valid, other=2147483647)
        request += tl.sum((after <= token).to(tl.int32), 0)
    return request


@triton.jit
def parts_of(places, sequence, item, key_tiles):
    """(first program of an item, how many worked on it)."""
    share = tl.load(places)
    begin = tl.load(places + 1 + sequence) + item * key_tiles
    first = begin // share
    return first, (begin + key_tiles - 1) // share - first + 1


@triton.jit
def merge_if_last(
    output, parts, logs, counters, first, count, kv_head, begin, key_tiles, share, c: tl.constexpr
):
    """Puts an item of one tile of rows together, if all other programs have done their part of it.

    Its units are `begin` to `begin + key_tiles`. Parts are taken in the order of their keys,
    whoever comes last. `counters`, of which an item has that of its first program, are zero before
    a launch and after it.
    """
    ROWS: tl.constexpr = c.merged_rows
    AT_ONCE: tl.constexpr = PART_ROWS // ROWS
    DV: tl.constexpr = c.block_dv
    program = begin // share
    others = (begin + key_tiles - 1) // share - program
    tl.debug_barrier()  # the whole program's stores before the one thread's release
    last = tl.atomic_add(counters + program, 1, sem="acq_rel", scope="gpu") == others
    if last:
        tl.store(counters + program, 0)
        index = tl.arange(0, ROWS)
        valid = index < count * c.group
        # A part's rows, one behind the other: a thread has its columns of all parts.
        column = tl.arange(0, ROWS * DV)
        row = column // DV
        kept = row < count * c.group
        peak = tl.full([ROWS], -1.0e30, tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS * DV], tl.float32)
        for base in range(0, others + 1, AT_ONCE):
            part = base + tl.arange(0, AT_ONCE)
            # slot 1 of a program holds an item that it began, slot 0 one that it went on with
            place = ((program + part) * 2 + (part == 0).to(tl.int32)) * c.split_rows
            there = (part <= others)[:, None] & valid[None, :]
            log = tl.load(
                logs + (place[:, None] + index[None, :]),
                mask=there, other=-1.0e30, cache_modifier=".cg",
            )  # fmt: skip
            values = tl.load(
                parts + (place.to(tl.int64)[:, None] * DV + column[None, :]),
                mask=(part <= others)[:, None] & kept[None, :], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            higher = tl.maximum(peak, tl.max(log, 0))
            scale = tl.where(there, tl.exp2(log - higher[None, :]), 0.0)
            decay = tl.exp2(peak - higher)
            weight = weight * decay + tl.sum(scale, 0)
            scale = tl.broadcast_to(scale[:, :, None], (AT_ONCE, ROWS, DV))
            decay = tl.broadcast_to(decay[:, None], (ROWS, DV))
            acc = acc * tl.reshape(decay, (ROWS * DV,))
            acc += tl.sum(values * tl.reshape(scale, (AT_ONCE, ROWS * DV)), 0)
            peak = higher
        weight = tl.broadcast_to(tl.where(weight > 0.0, weight, 1.0)[:, None], (ROWS, DV))
        out = acc / tl.reshape(weight, (ROWS * DV,))
        token = (first + row // c.group).to(tl.int64)
        head = kv_head * c.group + row % c.group
        start = (token * (c.num_kv_heads * c.group) + head) * c.value_size
        tl.store(
            output + start + column % DV,
            out.to(output.dtype.element_ty),
            mask=kept & (column % DV < c.value_size),
        )


@triton.jit
def zero_idle_rows(output, batch, rule, program, programs, num_tokens, c: tl.constexpr):
    """Zeros for rows of no request, and of requests without keys."""
    WIDTH: tl.constexpr = c.num_kv_heads * c.group * c.value_size
    BLOCK: tl.constexpr = 1024
    for token in range(program, num_tokens, programs):
        request = request_of_token(token, batch)
        _, _, _, _, key_tiles, _ = own_work(
            request, request < batch.num_requests, 0, batch, rule, c
        )
        if key_tiles == 0:
            row = output + (tl.full([], 0, tl.int64) + token) * WIDTH
            for base in range(0, WIDTH, BLOCK):
                at = base + tl.arange(0, BLOCK)
                zeros = tl.zeros([BLOCK], output.dtype.element_ty)
                tl.store(row + at, zeros, mask=at < WIDTH)


@triton.jit
def merge_row(
    output, parts, logs, places, batch, rule, slot, head, by_request: tl.constexpr,
    part_base, whole_base, shared_whole_base, c: tl.constexpr,
):  # fmt: skip
    """The output of one query and head, unless one program has written it alone.

    `slot` is a token, or `by_request` a place for each of the most queries of a split request.
    """
    kv_head = head // c.group
    if by_request:
        request = slot // batch.split_queries
    else:
        request = request_of_token(slot, batch)
    real = request < batch.num_requests
    prefix = tl.full([], 0, tl.int32)
    if c.has_groups:
        place, group, blocks = membership(request, batch)
        prefix = blocks * c.block_size
    first, count, _, _, key_tiles, row_tiles = own_work(request, real, prefix, batch, rule, c)
    if by_request:
        number = slot % batch.split_queries
        token = first + number
        mine = (number < count) & (count <= batch.split_queries)
    else:
        token = slot
        number = token - first
        mine = slot >= 0  # padding rows too: they come out as zeros
    row = number * c.group + head % c.group

    if c.overlaps:
        gdc_wait()
    own = tl.full([], 0, tl.int32)  # parts
    own_first = own  # program
    if key_tiles > 0:
        item = kv_head * row_tiles + row // c.split_rows
        own_first, own = parts_of(places, request, item, key_tiles)
    own_row = row % c.split_rows
    whole = (
        whole_base + (request * batch.shared_queries + number) * (c.num_kv_heads * c.group) + head
    )
    common = tl.full([], 0, tl.int32)
    common_first = common
    common_row = common
    if c.has_groups:
        if (place >= 0) & (count <= batch.shared_queries) & (key_tiles > 0):
            group_first, _, _, group_keys, group_rows = group_work(group, True, batch, c)
            shared_row = ((place - group_first) * batch.shared_queries + number) * c.group
            shared_row += head % c.group
            common_row = shared_row % c.shared_rows
            shared_item = kv_head * group_rows + shared_row // c.shared_rows
            common_first, common = parts_of(
                places + 1 + batch.num_requests, group, shared_item, group_keys
            )

    if mine & (own + common != 1):
        DV: tl.constexpr = c.block_dv
        columns = tl.arange(0, DV)
        peak = tl.full([], -1.0e30, tl.float32)
        weight = tl.full([], 0.0, tl.float32)
        acc = tl.zeros([DV], tl.float32)
        for base in range(0, own + common, PARTS):
            part = base + tl.arange(0, PARTS)
            # slot 1 of a program holds an item that it began, slot 0 one that it went on with
            index = ((own_first + part) * 2 + (part == 0).to(tl.int32)) * c.split_rows + own_row
            if c.has_groups:
                index = tl.where(own == 1, whole, index)
                other = part - own
                there = (common_first + other) * 2 + (other == 0).to(tl.int32)
                there = part_base + there * c.shared_rows + common_row
                there = tl.where(common == 1, shared_whole_base + whole - whole_base, there)
                index = tl.where(part < own, index, there)
            valid = part < own + common
            log = tl.load(logs + index, mask=valid, other=-1.0e30)
            pointers = parts + index.to(tl.int64)[:, None] * c.block_dv + columns[None, :]
            values = tl.load(pointers, mask=valid[:, None], other=0.0)
            higher = tl.maximum(peak, tl.max(log, 0))
            share = tl.where(valid, tl.exp2(log - higher), 0.0)
            decay = tl.exp2(peak - higher)
            weight = weight * decay + tl.sum(share, 0)
            acc = acc * decay + tl.sum(values * share[:, None], 0)
            peak = higher
        out = acc / tl.where(weight > 0.0, weight, 1.0)
        start = (token.to(tl.int64) * (c.num_kv_heads * c.group) + head) * c.value_size
        tl.store(
            output + start + columns,
            out.to(output.dtype.element_ty),
            mask=columns < c.value_size,
        )
