"""The launches of `paged_attention`: all kinds of work at once, and what merges them, if any."""

from __future__ import annotations

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from streamserve_kernels.triton.attention_chunk import chunk_tile
from streamserve_kernels.triton.attention_loop import Cache, Rule
from streamserve_kernels.triton.attention_merge import merge_row
from streamserve_kernels.triton.attention_split import own_parts, shared_parts
from streamserve_kernels.triton.attention_work import Batch
from streamserve_kernels.triton.runtime import jit

# What differs from step to step must not compile anew: not by its divisibility, nor by where the
# step's buffers happen to begin.
COUNTS = (
    "table_stride", "num_requests", "num_tokens", "split_queries", "shared_queries", "num_members",
    "num_groups", "window", "programs", "shared_programs", "part_base", "whole_base",
    "shared_whole_base",
)  # fmt: skip
BUFFERS = (
    "block_table", "seq_lens", "query_start_loc", "members", "starts", "num_blocks",
)  # fmt: skip
MERGE_COUNTS = (
    "num_requests", "num_members", "num_groups", "window", "split_queries", "shared_queries",
    "part_base", "whole_base", "shared_whole_base",
)  # fmt: skip
MERGE_BUFFERS = BUFFERS[1:]


@jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=BUFFERS)
def attention_kernel(
    output,  # [T, Hq, Dv]
    parts,  # [rows, block_dv] float32: see `attention.Scratch`
    logs,  # [rows] float32
    places,  # int32: [1 + R + 1 + G], or of one launch [programs], zeros
    query,  # [T, Hq, D]
    query_stride,
    key_cache, key_block, key_head, key_row,
    value_cache, value_block, value_head, value_row,
    block_table, table_stride, seq_lens, query_start_loc, num_requests, num_tokens,
    members, starts, num_blocks, num_members, num_groups,
    slopes, sinks, scale, soft_cap, window,
    split_queries, shared_queries, programs, shared_programs, part_base, whole_base,
    shared_whole_base,
    c: tl.constexpr,
):  # fmt: skip
    """Programs: those of shared prefixes, of split requests, then a tile of a chunk each.

    Whose work is whose is found out before the kernel before this one has ended.
    """
    if c.overlaps:
        gdc_launch_dependents()
    cache = Cache(
        key_cache, key_block, key_head, key_row, value_cache, value_block, value_head, value_row
    )
    batch = Batch(
        block_table, table_stride, seq_lens, query_start_loc, num_requests, split_queries,
        shared_queries, members, starts, num_blocks, num_members, num_groups,
    )  # fmt: skip
    rule = Rule(scale, soft_cap, window)
    program = tl.program_id(0)
    if c.has_groups:
        if program < shared_programs:
            shared_parts(
                query, query_stride, parts, logs, places + 1 + num_requests, slopes, sinks, cache,
                batch, rule,
                program, shared_programs, part_base, shared_whole_base, c,
            )  # fmt: skip
        program -= shared_programs
    if c.has_chunks:
        if program >= programs:
            # the last tile first: within a prompt it has the most keys
            index = tl.num_programs(0) - 1 - tl.program_id(0)
            chunk_tile(
                query, query_stride, output, num_tokens, slopes, sinks, cache, batch, rule,
                index // c.num_kv_heads, index % c.num_kv_heads, c,
            )  # fmt: skip
    if (program >= 0) & (program < programs):
        own_parts(
            query, query_stride, output, parts, logs, places, slopes, sinks, cache, batch,
            rule, program, programs, num_tokens, whole_base, c,
        )  # fmt: skip


@jit(do_not_specialize=MERGE_COUNTS, do_not_specialize_on_alignment=MERGE_BUFFERS)
def merge_kernel(
    output, parts, logs, places,
    seq_lens, query_start_loc, num_requests,
    members, starts, num_blocks, num_members, num_groups, window,
    split_queries, shared_queries, part_base, whole_base, shared_whole_base,
    c: tl.constexpr,
):  # fmt: skip
    """A program per query and head: of all tokens, or beside chunks of split requests only."""
    if c.overlaps:
        gdc_launch_dependents()
    batch = Batch(
        None, 0, seq_lens, query_start_loc, num_requests, split_queries,
        shared_queries, members, starts, num_blocks, num_members, num_groups,
    )  # fmt: skip
    merge_row(
        output, parts, logs, places, batch, Rule(0.0, 0.0, window),
        tl.program_id(0), tl.program_id(1), c.has_chunks,
        part_base, whole_base, shared_whole_base, c,
    )  # fmt: skip
