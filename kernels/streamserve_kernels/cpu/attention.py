"""Paged attention on the CPU: short queries through one compiled kernel, prompts through torch."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from streamserve_kernels.cpu.attention_decode import LAYOUT, attention_body, scratch_floats
from streamserve_kernels.cpu.attention_prompt import prompt_attention
from streamserve_kernels.cpu.ops import COMPILED, require
from streamserve_kernels.float8 import refuse_float8
from streamserve_kernels.interface import PrefixGroups
from streamserve_kernels.pool import pool

# Query rows (queries times the heads that share a kv head) that one pass of the compiled kernel
# holds: beyond it the matrix units win.
MAX_ROWS = 64


@lru_cache(maxsize=64)
def decode_kernel(bits: int, head_size: int, value_size: int, block_size: int) -> Any:
    return pool().kernel(attention_body(bits, head_size, value_size, block_size), LAYOUT)


def decode_attention(
    output: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_queries: int,
    scale: float,
    window: int | None,
    alibi_slopes: Tensor | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> None:
    """Fills the rows of `output` [T, Hq, Dv] of every request with 1 to `max_queries` queries."""
    num_heads = query.shape[1]
    num_kv_heads, block_size, head_size = key_cache.shape[1:]
    value_size = value_cache.shape[3]
    max_rows = max_queries * (num_heads // num_kv_heads)
    threads = pool().threads()
    scratch = torch.empty(scratch_floats(threads, max_rows, head_size, value_size, block_size))
    decode_kernel(8 * query.element_size(), head_size, value_size, block_size)(
        threads,
        output.data_ptr(),
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        query_start_loc.data_ptr(),
        0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        scratch.data_ptr(),
        query.stride(0),
        block_table.stride(0),
        seq_lens.shape[0],
        num_heads,
        num_kv_heads,
        max_rows,
        max_queries,
        window or 0,
        scale,
        soft_cap or 0.0,
    )


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    prefix_groups: PrefixGroups | None = None,
    max_query_len: int | None = None,
) -> Tensor:
    """See `naive.paged_attention`. `prefix_groups` are ignored: each request reads all its own."""
    num_tokens, num_heads, head_size = query.shape
    group = num_heads // key_cache.shape[1]
    refuse_float8("cpu", key_cache, value_cache)
    require("block_table", block_table, torch.int32)
    require("seq_lens", seq_lens, torch.int32)
    require("query_start_loc", query_start_loc, torch.int32)
    if key_cache.dtype != query.dtype or not (
        key_cache.is_contiguous() and value_cache.is_contiguous()
    ):
        raise TypeError(f"the caches must be contiguous {query.dtype}, got {key_cache.dtype}")
    output = query.new_empty(num_tokens, num_heads, value_cache.shape[3])
    if query.stride(2) != 1 or query.stride(1) != head_size:
        query = query.contiguous()
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.float().contiguous()
    if sinks is not None:
        sinks = sinks.float().contiguous()
    max_queries = max(1, MAX_ROWS // group)
    if query.dtype not in COMPILED:
        max_queries = 0
    starts = None
    longest = num_tokens
    if num_tokens > seq_lens.shape[0] or max_queries == 0:
        # not plain decoding: some request has several queries, or there are padding rows
        starts = query_start_loc.tolist()
        longest = max((b - a for a, b in pairwise(starts)), default=0)
        output[starts[-1] :] = 0.0
    if max_queries > 0:
        decode_attention(
            output,
            query,
            key_cache,
            value_cache,
            block_table,
            seq_lens,
            query_start_loc,
            max(1, min(longest, max_queries)),
            scale,
            window,
            alibi_slopes,
            soft_cap,
            sinks,
        )
    if starts is None or longest <= max_queries:
        return output
    for r, (start, end) in enumerate(pairwise(starts)):
        if end - start > max_queries:
            prompt_attention(
                output[start:end],
                query[start:end],
                key_cache,
                value_cache,
                block_table[r],
                int(seq_lens[r]),
                scale,
                window,
                alibi_slopes,
                soft_cap,
                sinks,
            )
    return output
