"""Which requests of a step share leading blocks: for cascade attention, found in the block tables.

Attention over what a group shares may be computed once for all its members. Splitting a request's
attention has a price, too, so the grouping is the one with the greatest

    gain = Σ over groups (members - 1) · shared tokens - members · overhead      (in tokens of KV)

Groups have one level: a request is in one or none. A system prompt, a fork and a second turn look
the same here: a tree of blocks, of which some nodes become groups.

            [ 0 | 1 | 2 | 3 ]                   5 requests share 4 blocks, 3 of them 6 more:
             |           `- [ 7 ] a             {c, d, e} over 10 blocks and {a, b} over 4 save
             |           `- [ 8 ] b             20 + 4 blocks, one group of 5 would save 16
             `- [ 20 ... 25 ] - c, d, e
"""

from __future__ import annotations

from collections.abc import Sequence

from streamserve.config import SchedulerConfig
from streamserve.core.plan import PrefixGroup
from streamserve.core.request import Request
from streamserve.core.step import Step

_NO_GROUPS: list[PrefixGroup] = []


class PrefixGrouping:
    """The groups of each step. They are found anew only when a step has other requests.

    While a request stays in the runner its block table only grows, by blocks of its own, and what
    others share of it was full before they came. So the same requests in the same order are the
    same groups, whatever was appended since.
    """

    def __init__(self, config: SchedulerConfig, block_size: int) -> None:
        self.num_saved_tokens = 0  # of KV that members need not read again, over all steps
        self._is_on = config.enable_cascade_attention
        self._overhead_tokens = config.cascade_overhead_tokens
        self._block_size = block_size
        self._requests: list[Request] = []
        self._groups = _NO_GROUPS
        self._num_saved_per_step = 0

    def update(self, step: Step) -> list[PrefixGroup]:
        """The groups of a step that is complete; they refer to its requests by index."""
        plan = step.plan
        if not self._is_on:
            return _NO_GROUPS
        if plan.new_requests or step.requests != self._requests:
            size = self._block_size
            tables = [
                request.block_table[: scheduled.start // size]
                for request, scheduled in zip(step.requests, plan.scheduled, strict=True)
            ]
            self._requests = list(step.requests)
            self._groups = find_groups(tables, size, self._overhead_tokens)
            self._num_saved_per_step = num_saved_blocks(self._groups) * size
        self.num_saved_tokens += self._num_saved_per_step
        return self._groups


def find_groups(
    tables: Sequence[list[int]], block_size: int, overhead_tokens: int
) -> list[PrefixGroup]:
    """The grouping with the greatest gain of requests with these full blocks, by first member.

    O(R log R) comparisons of lists for R tables, and in a tree of height H another O(R · H).
    """
    # Nobody gains from sharing fewer blocks than these.
    num_least = overhead_tokens // block_size + 1
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, table in enumerate(tables):
        if len(table) >= num_least:
            alike.setdefault(tuple(table[:num_least]), []).append(i)
    groups: list[PrefixGroup] = []
    for indices in alike.values():
        if len(indices) > 1:
            groups += _choose(_tree(tables, indices), block_size, overhead_tokens)
    groups.sort()
    return groups


def num_saved_blocks(groups: Sequence[PrefixGroup]) -> int:
    """Blocks that a step reads once instead of once more for each further member."""
    return sum((len(members) - 1) * num_blocks for members, num_blocks in groups)


def check_groups(step: Step, block_size: int) -> None:
    """Assert what every plan promises of its groups."""
    seen: set[int] = set()
    for members, num_blocks in step.plan.prefix_groups:
        assert len(members) > 1, "a group of one"
        assert num_blocks > 0, "a group that shares nothing"
        assert not seen.intersection(members), "a request in two groups"
        seen.update(members)
        shared = step.requests[members[0]].block_table[:num_blocks]
        for i in members:
            assert step.requests[i].block_table[:num_blocks] == shared, "not shared"
            assert num_blocks * block_size <= step.plan.scheduled[i].start, "not computed before"


class _Node:
    """Requests that share ``depth`` blocks: ``leaves`` nothing more, ``children`` each something.

    ``gains`` maps the depth of the closest group above (0: none) to the greatest gain of the
    requests below this node, and ``opens`` says whether the node is then a group itself.
    """

    __slots__ = ("children", "depth", "gains", "leaves", "opens")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.leaves: list[int] = []
        self.children: list[_Node] = []
        self.gains: dict[int, int] = {0: 0}
        self.opens: dict[int, bool] = {0: False}


def _tree(tables: Sequence[list[int]], indices: list[int]) -> list[_Node]:
    """The nodes at which the tables part, parents after their children: the root is the last."""
    order = sorted(indices, key=tables.__getitem__)
    nodes: list[_Node] = []
    open_nodes = [_Node(0)]
    for place, i in enumerate(order):
        is_last = place + 1 == len(order)
        num_common = 0 if is_last else _num_common(tables[i], tables[order[place + 1]])
        if num_common > open_nodes[-1].depth:
            open_nodes.append(_Node(num_common))
        open_nodes[-1].leaves.append(i)
        while open_nodes[-1].depth > num_common:
            node = open_nodes.pop()
            if open_nodes[-1].depth < num_common:
                open_nodes.append(_Node(num_common))
            open_nodes[-1].children.append(node)
            nodes.append(node)
    return nodes + open_nodes


def _num_common(a: list[int], b: list[int]) -> int:
    """Leading elements that two lists have in common."""
    low, high = 0, min(len(a), len(b)) + 1  # the first ``low`` are equal, the first ``high`` not
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _choose(nodes: list[_Node], block_size: int, overhead_tokens: int) -> list[PrefixGroup]:
    """The groups with the greatest gain in a tree.

    A group costs one reading of its blocks and earns, for each member, the reading that it is
    spared less the overhead. A request that joins none of its own is best off in the closest
    group above, so all that a subtree needs to know of the rest is that group's depth.
    """
    for node in reversed(nodes):
        for child in node.children:
            child.gains = dict.fromkeys((*node.gains, node.depth), 0)
    for node in nodes:
        cost = node.depth * block_size
        for depth in node.gains:
            earned = depth * block_size - overhead_tokens if depth else 0
            closed = len(node.leaves) * earned + sum(c.gains[depth] for c in node.children)
            opened = len(node.leaves) * (cost - overhead_tokens) - cost
            opened += sum(c.gains[node.depth] for c in node.children)
            node.opens[depth] = opened > closed
            node.gains[depth] = max(opened, closed)
    members: dict[int, list[int]] = {}
    depths: dict[int, int] = {}
    above = [(nodes[-1], -1, 0)]  # node, the closest group above it, that group's depth
    while above:
        node, group, depth = above.pop()
        if node.opens[depth]:
            group, depth = len(depths), node.depth
            depths[group] = depth
        if depth:
            members.setdefault(group, []).extend(node.leaves)
        above.extend((child, group, depth) for child in node.children)
    return [PrefixGroup(tuple(sorted(m)), depths[group]) for group, m in members.items()]
