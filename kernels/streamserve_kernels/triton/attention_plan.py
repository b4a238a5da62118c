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
    stages: int  # key tiles on their way, and the one in use
    programs_per_processor: int
    shared_programs_per_processor: int


def power_of_two(size: int, least: int = 16) -> int:
    """The next power of two."""
    return max(least, 1 << (size - 1).bit_length())


# Requests of a mixed step with no more queries than this are split over their keys.
SPLIT_QUERIES = 4
# A step with fewer (query, head of a group) rows than this has too few tiles to fill a GPU: all of
# its requests are split.
FEW_ROWS = 512
# So few decodes are done sooner by one program on a processor than by two that divide them further.
FEW_REQUESTS = 16
# Drafts to verify: a group's members with no more queries than this attend to its prefix together.
SHARED_QUERIES = 8
# Of float32, but for decodes of one tile: larger ones do not fit into registers.
FLOAT32 = Tiles(16, 16)


def plan(
    group: int,
    head_size: int,
    num_tokens: int,
    max_query_len: int | None,
    has_groups: bool,
    is_float32: bool = False,
) -> Plan:
    """Sizes for `num_tokens` queries, at most `max_query_len` of a request.

    Shared memory decides how many programs are on a processor (of 228 KiB): for heads of 128, a
    stage of 64 keys takes 32 KiB. Measured on an H200: three stages and two programs read decodes
    of 64 x 4096 at 99% of the bandwidth, four stages at 97, eight warps at 89; tiles of 64 x 64 on
    four warps, several on a processor, compute a prompt of 4096 1.1 times faster than tiles of
    128 x 64 on eight.
    """
    most = num_tokens if max_query_len is None else min(max_query_len, num_tokens)
    if is_float32:
        found = plan(group, head_size, num_tokens, max_query_len, has_groups)
        if found.split.rows == 16 and not (found.has_chunks or has_groups):
            return found
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
    keys = 64 if head_size <= 128 else 32
    if most * group <= 64 or num_tokens * group <= FEW_ROWS:
        return Plan(
            split=Tiles(min(power_of_two(most * group), 64), keys),
            chunk=Tiles(16, keys),
            shared=Tiles(64, keys),
            has_chunks=False,
            split_queries=most,
            shared_queries=most if most <= SHARED_QUERIES else 1,
            warps=4,
            stages=3,
            programs_per_processor=1 if has_groups or num_tokens <= FEW_REQUESTS else 2,
            shared_programs_per_processor=1,
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
    )
