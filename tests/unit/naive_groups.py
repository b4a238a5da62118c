"""Prefix groups by trying: the greatest gain of any grouping, in the fewest lines."""

from collections.abc import Sequence
from functools import cache
from itertools import combinations, takewhile

from streamserve.core.plan import PrefixGroup


def gain_of(groups: Sequence[PrefixGroup], block_size: int, overhead_tokens: int) -> int:
    """What a grouping saves, less what it costs."""
    return sum(
        (len(members) - 1) * num_blocks * block_size - len(members) * overhead_tokens
        for members, num_blocks in groups
    )


def best_gain(tables: Sequence[list[int]], block_size: int, overhead_tokens: int) -> int:
    """The greatest gain of all partitions of the requests that share their first block."""
    alike: dict[int, list[list[int]]] = {}
    for table in tables:
        if table:
            alike.setdefault(table[0], []).append(table)
    return sum(
        _best_gain(members, block_size, overhead_tokens)
        for members in alike.values()
        if len(members) > 1
    )


def _best_gain(tables: list[list[int]], block_size: int, overhead_tokens: int) -> int:
    def num_common(members: tuple[int, ...]) -> int:
        columns = zip(*(tables[i] for i in members), strict=False)
        return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))

    @cache
    def best(rest: tuple[int, ...]) -> int:
        if len(rest) < 2:
            return 0
        first, others = rest[0], rest[1:]
        gains = [best(others)]  # the first one is in no group
        for size in range(1, len(others) + 1):
            for chosen in combinations(others, size):
                group = PrefixGroup((first, *chosen), num_common((first, *chosen)))
                left = tuple(i for i in others if i not in chosen)
                gains.append(gain_of([group], block_size, overhead_tokens) + best(left))
        return max(gains)

    return best(tuple(range(len(tables))))
