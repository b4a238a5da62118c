"""Sizes of an attention launch: the table to change after a measurement.

Everything follows from shapes and from what the host knows, never from lengths on the device: a
launch is captured into a CUDA graph and replayed for other lengths.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows x keys of a score tile, and how many key tiles are in flight."""

    rows: int
    keys: int
    stages: int


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


def plan(group: int, head_size: int, num_tokens: int, max_query_len: int | None) -> Plan:
    """Sizes for `num_tokens` queries, at most `max_query_len` of a request."""
    most = num_tokens if max_query_len is None else min(max_query_len, num_tokens)
    keys = 64 if head_size <= 128 else 32
    if most * group <= 64 or num_tokens * group <= FEW_ROWS:
        rows = min(power_of_two(most * group), 64)
        return Plan(
            split=Tiles(rows, keys, 3),
            chunk=Tiles(16, keys, 1),
            shared=Tiles(64, keys, 3),
            has_chunks=False,
            split_queries=most,
            shared_queries=most if most <= 8 else 1,
            warps=4,
            programs_per_processor=2,
            shared_programs_per_processor=1,
        )
    split_rows = min(power_of_two(group), 64)
    return Plan(
        split=Tiles(split_rows, keys, 3),
        chunk=Tiles(128, keys, 3),
        shared=Tiles(128, keys, 3),
        has_chunks=True,
        split_queries=max(1, min(SPLIT_QUERIES, split_rows // group)),
        shared_queries=1,
        warps=8,
        programs_per_processor=1,
        shared_programs_per_processor=1,
    )
