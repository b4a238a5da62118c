"""Sizes of an attention launch: the table to change after a measurement.

Everything follows from shapes and from what the host knows, never from lengths on the device: a
launch is captured into a CUDA graph and replayed for other lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows x keys of a score tile."""

    rows: int
    keys: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How one call is cut up."""

    split: Tiles
    chunk: Tiles
    shared: Tiles
    has_chunks: bool
    split_queries: int  # requests with no more queries are split over all programs
    shared_queries: int  # and those with no more than this attend to a prefix with their group
    warps: int
    stages: int  # one tile of keys and values is in use, the others are on their way
    programs_per_processor: int
    shared_programs_per_processor: int
    least_units: int  # key tiles of one program: fewer are not worth a merge
    one_launch: bool  # the last program at a part of the output puts it together
    asks_ahead: bool  # for a program's first keys, before it waits for the kernel before


def power_of_two(size: int, least: int = 16) -> int:
    """The next power of two."""
    return max(least, 1 << (size - 1).bit_length())


# Requests of a mixed step with no more queries than this are split over their keys.
SPLIT_QUERIES = 4
# A step with fewer (query, head of a group) rows than this has too few tiles to fill a GPU: all of
# its requests are split.
FEW_ROWS = 512
# What is split is put together by the last program at it if that is no more rows (query and head of
# a group) than this, which it reads at once; else, and with prefix groups, by a launch of its own.
MERGED_ROWS = 16
# So few decodes are done sooner by one program on a processor than by two that divide them further.
FEW_REQUESTS = 16
# Keys and values that the programs of a processor have on their way together.
ON_THE_WAY = 128 * 1024
_MOST_STAGES = 6
LEAST_UNITS = 2
# Drafts to verify: a group's members with no more queries than this attend to its prefix together.
SHARED_QUERIES = 8
# Of float32, but for decodes of one tile: larger ones do not fit into registers.
FLOAT32 = Tiles(16, 16)
# Heads of more elements than this are latents that all heads share: tiles of so many rows and keys.
WIDEST_HEAD = 256
LATENT = Tiles(16, 32)


def plan(
    group: int,
    head_size: int,
    num_tokens: int,
    max_query_len: int | None,
    has_groups: bool,
    cache_bytes: int = 2,
) -> Plan:
    """Sizes for `num_tokens` queries, at most `max_query_len` of a request.

    `cache_bytes` are those of one number of the cache: 4 only with queries of float32. Shared
    memory decides how many programs are on a processor (of 228 KiB). Measured on an H200, heads of
    128 in bfloat16: two programs with two tiles of 64 keys on their way each (128 KiB) read decodes
    of 64 x 4096 at 99% of the bandwidth, with three tiles at 97, on eight warps at 89; tiles of
    64 x 64 on four warps, several on a processor, compute a prompt of 4096 1.1 times faster than
    tiles of 128 x 64 on eight.
    """
    most = num_tokens if max_query_len is None else min(max_query_len, num_tokens)
    if cache_bytes == 4:
        found = plan(group, head_size, num_tokens, max_query_len, has_groups)
        if found.split.rows == 16 and not (found.has_chunks or has_groups):
            return replace(found, stages=3)
        split_queries = found.split_queries
        if found.has_chunks:
            split_queries = max(1, min(SPLIT_QUERIES, FLOAT32.rows // group))
        return replace(
            found,
            split=FLOAT32,
            chunk=FLOAT32,
            shared=FLOAT32,
            split_queries=split_queries,
            stages=2,
        )
    if head_size > WIDEST_HEAD:
        # Not measured. What fits: two tiles of keys and values are 192 KiB with heads of 512.
        found = plan(group, WIDEST_HEAD, num_tokens, max_query_len, has_groups, cache_bytes)
        return replace(
            found,
            split=LATENT,
            chunk=LATENT,
            shared=LATENT,
            split_queries=max(1, LATENT.rows // group) if found.has_chunks else found.split_queries,
            stages=2,
            warps=8,
            programs_per_processor=1,
        )
    keys = 64 if head_size <= 128 else 32
    if most * group <= 64 or num_tokens * group <= FEW_ROWS:
        programs = 1 if has_groups or num_tokens <= FEW_REQUESTS else 2
        tile = 2 * keys * power_of_two(head_size) * cache_bytes
        on_the_way = ON_THE_WAY // (programs + has_groups) // tile
        return Plan(
            split=Tiles(min(power_of_two(most * group), 64), keys),
            chunk=Tiles(16, keys),
            shared=Tiles(64, keys),
            has_chunks=False,
            split_queries=most,
            shared_queries=most if most <= SHARED_QUERIES else 1,
            warps=4,
            stages=max(2, min(on_the_way + 1, _MOST_STAGES)),
            programs_per_processor=programs,
            shared_programs_per_processor=1,
            least_units=LEAST_UNITS,
            one_launch=most * group <= MERGED_ROWS and not has_groups,
            asks_ahead=not has_groups,
        )
    split_rows = min(power_of_two(group), 64)
    return Plan(
        split=Tiles(split_rows, keys),
        chunk=Tiles(64, keys),
        shared=Tiles(64, keys),
        has_chunks=True,
        split_queries=max(1, min(SPLIT_QUERIES, split_rows // group)),
        shared_queries=1,
        warps=4,
        stages=3,
        programs_per_processor=1,
        shared_programs_per_processor=1,
        least_units=LEAST_UNITS,
        one_launch=False,
        asks_ahead=False,
    )
