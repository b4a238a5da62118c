"""Ragged paged attention on a GPU: the host's side.

One launch does all kinds of work of a step. Where decodes alone were split, the last program at a
part of the output puts it together; else another launch does:

- requests with few queries (decodes): flash-decoding (Dao et al. 2023) over equal shares of all
  their keys together, whatever their lengths (`attention_work`, `attention_split`)
- groups with a shared prefix: its keys once for the queries of all members (`attention_split`)
- prompts and chunks: a tile of query rows per program (`attention_chunk`)
- rows of no request: zeros

A grid depends on shapes and on `max_query_len` only, and nothing is read back: calls can be
captured into CUDA graphs. Shapes that matter for a benchmark: decodes of 64 x 4096 and 1 x 32768
tokens, a prompt of 4096, 64 decodes behind 4096 shared tokens; 32/8 heads of 128, blocks of 64 (of
32 or 16: one look-up in the block table per key instead of one per 64 keys).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from streamserve_kernels.interface import PrefixGroups
from streamserve_kernels.triton.attention_kernels import attention_kernel, merge_kernel
from streamserve_kernels.triton.attention_loop import Constants
from streamserve_kernels.triton.attention_plan import Plan, plan, power_of_two
from streamserve_kernels.triton.runtime import (
    INTERPRETED,
    forget_with,
    num_processors,
    overlaps,
)

LOG2_E = math.log2(math.e)
_MOST_PROGRAMS = 4  # on a processor, of one launch

_counters: dict[int, Tensor] = {}


class Scratch(NamedTuple):
    """Rows of float32 in which programs leave what they know of a query and head.

    | 2 items per program of split work | 2 per program of shared work | of each request in a
    group: what it attends to alone, if one program did it | and what with its group |
    """

    parts: Tensor  # [rows, block_dv]
    logs: Tensor  # [rows]
    # [1 + R + 1 + G] int32: where the work of requests and of groups lies. Of one launch: counters.
    places: Tensor
    part_base: int
    whole_base: int
    shared_whole_base: int


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
    """See `naive.paged_attention`. Caches may be float8_e4m3fn, of whatever dtype the query is.

    A group's members that have more than a few queries read its prefix for themselves.
    """
    _check(query, key_cache, value_cache, block_table, seq_lens, query_start_loc, prefix_groups)
    num_tokens, num_heads, _ = query.shape
    num_requests, value_size = len(seq_lens), value_cache.shape[3]
    output = query.new_empty(num_tokens, num_heads, value_size)
    if scale <= 0.0:
        raise ValueError(f"scale must be positive, not {scale}")
    if num_tokens == 0 or num_requests == 0:
        return output.zero_()
    groups = prefix_groups
    if groups is not None and 0 in {len(groups.members), len(groups.num_blocks)}:
        groups = None
    group = num_heads // key_cache.shape[1]
    # The interpreter's float32 stands for any dtype.
    cache_bytes = min(key_cache.element_size(), 2 if INTERPRETED else 4)
    sizes = plan(group, query.shape[2], num_tokens, max_query_len, groups is not None, cache_bytes)
    constants = _constants(
        query, key_cache, value_cache, sizes, (window, alibi_slopes, soft_cap, sinks, groups)
    )
    processors = num_processors(query.device)
    programs = processors * sizes.programs_per_processor
    shared_programs = 0
    if groups is not None:
        shared_programs = processors * sizes.shared_programs_per_processor
    num_groups = 0 if groups is None else len(groups.num_blocks)
    if constants.one_launch:
        places = _counters_of(key_cache, programs)
    else:
        places = query.new_empty(2 + num_requests + num_groups, dtype=torch.int32)
    scratch = _scratch(query, constants, programs, shared_programs, num_requests, sizes, places)
    chunk_tiles = num_tokens * constants.group // sizes.chunk.rows + num_requests + 1
    grid = shared_programs + programs
    if sizes.has_chunks:
        grid += chunk_tiles * constants.num_kv_heads
    bases = (scratch.part_base, scratch.whole_base, scratch.shared_whole_base)
    most = (sizes.split_queries, sizes.shared_queries)
    of_groups: tuple[Tensor | int | None, ...] = (None, None, None, 0, 0)
    if groups is not None:
        of_groups = (*groups, len(groups.members), num_groups)

    attention_kernel[(grid,)](
        output,
        scratch.parts,
        scratch.logs,
        scratch.places,
        query,
        query.stride(0),
        key_cache,
        *key_cache.stride()[:3],
        value_cache,
        *value_cache.stride()[:3],
        block_table,
        block_table.stride(0),
        seq_lens,
        query_start_loc,
        num_requests,
        num_tokens,
        *of_groups,
        alibi_slopes,
        sinks,
        scale * LOG2_E,
        soft_cap if soft_cap is not None else 1.0,
        window if window is not None else 0,
        *most,
        programs,
        shared_programs,
        *bases,
        c=constants,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
        launch_pdl=constants.overlaps,
    )
    if constants.one_launch:
        return output
    slots = num_requests * sizes.split_queries if sizes.has_chunks else num_tokens
    merge_kernel[(slots, num_heads)](
        output,
        scratch.parts,
        scratch.logs,
        scratch.places,
        seq_lens,
        query_start_loc,
        num_requests,
        *of_groups,
        window if window is not None else 0,
        *most,
        *bases,
        c=constants,
        num_warps=max(1, constants.block_dv // 256),
        launch_pdl=constants.overlaps,
    )
    return output


def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    groups: PrefixGroups | None,
) -> None:
    """Kernels read by address: what is wrong must not become a wrong answer."""
    integers = {
        "block_table": block_table,
        "seq_lens": seq_lens,
        "query_start_loc": query_start_loc,
    } | ({} if groups is None else groups._asdict())
    for name, tensor in integers.items():
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise TypeError(f"{name} must be int32 and contiguous, not {tensor.dtype}")
    if key_cache.dtype != value_cache.dtype or key_cache.dtype not in {
        query.dtype,
        torch.float8_e4m3fn,
    }:
        raise TypeError(
            f"caches of {key_cache.dtype} and {value_cache.dtype} do not fit a query of "
            f"{query.dtype}"
        )
    if key_cache.stride(3) != 1 or value_cache.stride(3) != 1:
        raise ValueError("the heads of a cache must be contiguous")
    if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        raise ValueError("the heads of a token must be adjacent")
    if key_cache.shape[2] % 16:
        raise ValueError(f"a block must be a multiple of 16 tokens, not {key_cache.shape[2]}")


def _constants(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    sizes: Plan,
    features: tuple[object, object, object, object, object],
) -> Constants:
    _, num_kv_heads, block_size, head_size = key_cache.shape
    value_size = value_cache.shape[3]
    window, slopes, cap, sinks, groups = (feature is not None for feature in features)
    split, chunk, shared = sizes.split, sizes.chunk, sizes.shared
    group = query.shape[1] // num_kv_heads
    merged_rows = power_of_two(sizes.split_queries * group, least=1)
    return Constants(
        num_kv_heads=num_kv_heads,
        group=group,
        head_size=head_size,
        value_size=value_size,
        block_d=power_of_two(head_size),
        block_dv=power_of_two(value_size),
        block_size=block_size,
        split_rows=split.rows,
        split_keys=split.keys,
        chunk_rows=chunk.rows,
        chunk_keys=chunk.keys,
        shared_rows=shared.rows,
        shared_keys=shared.keys,
        has_window=window,
        has_alibi=slopes,
        has_cap=cap,
        has_sinks=sinks,
        has_groups=groups,
        has_chunks=sizes.has_chunks,
        least_units=sizes.least_units,
        one_launch=sizes.one_launch,
        merged_rows=merged_rows if sizes.one_launch else 0,
        asks_ahead=sizes.asks_ahead and (INTERPRETED or overlaps(query.device)),
        unscaled=not cap and not slopes,
        ieee=query.dtype == torch.float32,
        in_float16=query.dtype == torch.bfloat16 and key_cache.dtype == torch.float8_e4m3fn,
        overlaps=overlaps(query.device),
        interpreted=INTERPRETED,
    )


def _scratch(
    query: Tensor,
    c: Constants,
    programs: int,
    shared_programs: int,
    num_requests: int,
    sizes: Plan,
    places: Tensor,
) -> Scratch:
    part_base = programs * 2 * c.split_rows
    whole_base = part_base + shared_programs * 2 * c.shared_rows
    wholes = 0
    if c.has_groups:
        wholes = num_requests * sizes.shared_queries * c.num_kv_heads * c.group
    rows = whole_base + 2 * wholes
    buffer = query.new_empty(rows, c.block_dv + 1, dtype=torch.float32).view(-1)
    parts, logs = buffer[: rows * c.block_dv].view(rows, c.block_dv), buffer[rows * c.block_dv :]
    return Scratch(parts, logs, places, part_base, whole_base, whole_base + wholes)


def _counters_of(key_cache: Tensor, programs: int) -> Tensor:
    """[programs or more] int32, zeros before and after a launch: those on a cache take turns.

    Raises RuntimeError while a graph is captured that has not been run before: the graph would make
    them, and others would find them before it has.
    """
    most = num_processors(key_cache.device) * _MOST_PROGRAMS
    if programs > most:
        raise ValueError(f"at most {most} programs are counted, not {programs}")
    key = key_cache.data_ptr()
    counters = _counters.get(key)
    if counters is None:
        if key_cache.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("attention over these caches has to run once before its capture")
        counters = _counters[key] = key_cache.new_zeros(most, dtype=torch.int32)
        forget_with(key_cache, _counters, key)
    return counters
