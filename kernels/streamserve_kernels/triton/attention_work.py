"""Who does what, found on the device: work as one line of key tiles, cut into equal pieces.

Requests with few queries (decodes, mostly) and groups of them that share a prefix are *sequences*.
A sequence has an item of work for each kv head and each tile of query rows, an item one unit for
each tile of keys:

    sequence 0                      sequence 1              sequence 3 (2 has no work)
    head 0     head 1               head 0  head 1
    |..........|..........|.........|.......|.......|.......|...
    ^               ^               ^               ^
    program 0       program 1       program 2       program 3     equal shares of the line

So a batch of any shape fills all programs evenly, and a launch needs to know no length (as Stream-K
does for matrix products, Osama et al. 2023). An item that several programs have worked on is put
together by `attention_merge`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

REQUESTS = tl.constexpr(256)  # read at a time
REQUESTS_WITH_GROUPS = tl.constexpr(128)  # each is compared with the members
GROUPS = tl.constexpr(16)
MEMBERS = tl.constexpr(32)


class Batch(NamedTuple):
    """The step. See `naive.paged_attention`."""

    block_table: Any
    table_stride: Any
    seq_lens: Any
    query_start_loc: Any
    num_requests: Any
    split_queries: Any  # requests with no more queries than this are sequences of split work
    shared_queries: Any  # and these attend to a shared prefix with their group
    members: Any
    starts: Any
    num_blocks: Any
    num_members: Any
    num_groups: Any


@triton.jit
def member_blocks(member, batch):
    """Blocks shared by the group of each entry [N] of `members`; 0 past the last group."""
    blocks = tl.zeros_like(member)
    for base in range(0, batch.num_groups, GROUPS):
        group = base + tl.arange(0, GROUPS)
        valid = group < batch.num_groups
        begin = tl.load(batch.starts + group, mask=valid, other=0)
        end = tl.load(batch.starts + group + 1, mask=valid, other=0)
        shared = tl.load(batch.num_blocks + group, mask=valid, other=0)
        inside = (member[:, None] >= begin[None, :]) & (member[:, None] < end[None, :])
        blocks += tl.sum(tl.where(inside, shared[None, :], 0), 1)
    return blocks


@triton.jit
def shared_tokens(request, batch, c: tl.constexpr):
    """Tokens that each request [N] shares with its group."""
    tokens = tl.zeros_like(request)
    for base in range(0, batch.num_members, MEMBERS):
        member = base + tl.arange(0, MEMBERS)
        of = tl.load(batch.members + member, mask=member < batch.num_members, other=-1)
        blocks = member_blocks(member, batch)
        same = of[:, None] == request[None, :]
        tokens = tl.maximum(tokens, tl.max(tl.where(same, blocks[:, None], 0), 0) * c.block_size)
    return tokens


@triton.jit
def membership(request, batch):
    """(place in `members` or -1, group, blocks shared) of one request."""
    place = tl.full([], -1, tl.int32)
    blocks = tl.full([], 0, tl.int32)
    for base in range(0, batch.num_members, MEMBERS):
        member = base + tl.arange(0, MEMBERS)
        of = tl.load(batch.members + member, mask=member < batch.num_members, other=-1)
        shared = member_blocks(member, batch)
        same = (of == request) & (shared > 0)
        place = tl.maximum(place, tl.max(tl.where(same, member, -1), 0))
        blocks = tl.maximum(blocks, tl.max(tl.where(same, shared, 0), 0))
    group = tl.full([], 0, tl.int32)
    for base in range(0, batch.num_groups, GROUPS):
        index = base + tl.arange(0, GROUPS)
        end = tl.load(batch.starts + index + 1, mask=index < batch.num_groups, other=2147483647)
        group += tl.sum((end <= place).to(tl.int32), 0)
    return place, group, blocks


@triton.jit
def own_work(request, valid, shared, batch, rule, c: tl.constexpr):
    """Of requests, of any shape: (first row, queries, length, first key, key tiles, row tiles)."""
    first = tl.load(batch.query_start_loc + request, mask=valid, other=0)
    count = tl.load(batch.query_start_loc + request + 1, mask=valid, other=0) - first
    length = tl.load(batch.seq_lens + request, mask=valid, other=0)
    start = tl.where(count <= batch.shared_queries, shared, 0)
    if c.has_window:
        oldest = tl.maximum(length - count - rule.window + 1, 0)
        start = tl.maximum(start, oldest // c.split_keys * c.split_keys)
    few = (count > 0) & (count <= batch.split_queries)
    key_tiles = (tl.maximum(length - start, 0) + c.split_keys - 1) // c.split_keys
    row_tiles = (count * c.group + c.split_rows - 1) // c.split_rows
    return first, count, length, start, tl.where(few, key_tiles, 0), row_tiles


@triton.jit
def group_work(group, valid, batch, c: tl.constexpr):
    """Of groups, of any shape: (first member, members, shared keys, key tiles, row tiles)."""
    first = tl.load(batch.starts + group, mask=valid, other=0)
    count = tl.load(batch.starts + group + 1, mask=valid, other=0) - first
    keys = tl.load(batch.num_blocks + group, mask=valid, other=0) * c.block_size
    rows = count * batch.shared_queries * c.group
    key_tiles = (keys + c.shared_keys - 1) // c.shared_keys
    row_tiles = (rows + c.shared_rows - 1) // c.shared_rows
    return first, count, keys, key_tiles, row_tiles


@triton.jit
def units(sequence, batch, rule, shared: tl.constexpr, c: tl.constexpr):
    """Of sequences [N], which are groups if `shared`, else requests: (units of work, queries)."""
    if shared:
        _, count, _, key_tiles, row_tiles = group_work(
            sequence, sequence < batch.num_groups, batch, c
        )
    else:
        prefix = tl.zeros_like(sequence)
        if c.has_groups:
            prefix = shared_tokens(sequence, batch, c)
        _, count, _, _, key_tiles, row_tiles = own_work(
            sequence, sequence < batch.num_requests, prefix, batch, rule, c
        )
    return key_tiles * row_tiles * c.num_kv_heads, count


@triton.jit
def survey(batch, rule, shared: tl.constexpr, c: tl.constexpr):
    """(units of all sequences, queries of those that have any)."""
    several: tl.constexpr = REQUESTS_WITH_GROUPS if c.has_groups else REQUESTS
    step: tl.constexpr = GROUPS if shared else several
    total = tl.full([], 0, tl.int32)
    queries = tl.full([], 0, tl.int32)
    for base in range(0, batch.num_groups if shared else batch.num_requests, step):
        work, count = units(base + tl.arange(0, step), batch, rule, shared, c)
        total += tl.sum(work, 0)
        queries += tl.sum(tl.where(work > 0, count, 0), 0)
    return total, queries


@triton.jit
def find(unit, batch, rule, shared: tl.constexpr, c: tl.constexpr):
    """(the sequence of a unit, units of the sequences before it)."""
    several: tl.constexpr = REQUESTS_WITH_GROUPS if c.has_groups else REQUESTS
    step: tl.constexpr = GROUPS if shared else several
    count = batch.num_groups if shared else batch.num_requests
    passed = tl.full([], 0, tl.int32)
    found = tl.full([], 0, tl.int32)
    before = tl.full([], 0, tl.int32)
    for base in range(0, count, step):
        sequence = base + tl.arange(0, step)
        work, _ = units(sequence, batch, rule, shared, c)
        ended = (passed + tl.cumsum(work, 0) <= unit) & (sequence < count)
        found += tl.sum(ended.to(tl.int32), 0)
        before += tl.sum(tl.where(ended, work, 0), 0)
        passed += tl.sum(work, 0)
    return found, before


@triton.jit
def share_of(program, programs, batch, rule, shared: tl.constexpr, c: tl.constexpr):
    """(units of each program, this one's first unit and the one after its last, the sequence of the
    first, units of the sequences before that, queries that have work).

    Reads nothing but the step's own tensors. In two passes: where the first turn of both was read
    once, before their loops, Triton 3.8 no longer pipelined the loop over keys.
    """
    total, queries = survey(batch, rule, shared, c)
    share = tl.maximum((total + programs - 1) // programs, c.least_units)
    at = program * share
    found, before = find(at, batch, rule, shared, c)
    return share, at, tl.minimum(at + share, total), found, before, queries
