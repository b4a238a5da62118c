"""Attention over a shared prefix, once for all: the same as each request reading it for itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from streamserve_kernels import Kernels, PrefixGroups
from tests.kernels.conftest import TOLERANCE, Paged, paged_case
from tests.kernels.test_paged_attention import dense_attention, features

DECODES = [(100, 1), (97, 1), (64, 1), (150, 1), (65, 1), (200, 1), (5, 1)]
CHUNKS = [(100, 3), (97, 1), (130, 40), (64, 64), (70, 5), (200, 1), (90, 0), (203, 2)]
# Each group: its members, and the tokens that they share at most.
ONE_GROUP = [((0, 1, 3), 80)]
GROUPS = [((5, 1), 60), ((0, 4, 2), 33)]
KINDS = ["plain", "wide window", "alibi", "soft cap", "sinks", "all"]


def options_of(kind: str, num_heads: int) -> dict[str, object]:
    """As for plain attention, but no window cuts a prefix."""
    options = features(kind, num_heads)
    return options | {"window": 256} if "window" in options else options


def share(case: Paged, groups: list[tuple[tuple[int, ...], int]]) -> PrefixGroups:
    """Lets the members of each group read the first one's leading blocks, and tells so."""
    _, key_cache, value_cache, table, lengths, starts = case.args
    block_size = key_cache.shape[2]
    counts = [end - start for start, end in pairwise(starts.tolist())]
    members, ends, num_blocks = [], [0], []
    for group, num_tokens in groups:
        before = [int(lengths[r]) - counts[r] for r in group]
        shared = min(num_tokens, *before) // block_size
        leader = group[0]
        for r in group[1:]:
            old = table[r, :shared].long()
            key_cache[old] = value_cache[old] = float("nan")
            table[r, :shared] = table[leader, :shared]
            case.keys[r][: shared * block_size] = case.keys[leader][: shared * block_size]
            case.values[r][: shared * block_size] = case.values[leader][: shared * block_size]
        members += group
        ends.append(len(members))
        num_blocks.append(shared)
    return PrefixGroups(*(torch.tensor(x, dtype=torch.int32) for x in (members, ends, num_blocks)))


def shared_case(naive: Kernels, requests, groups, **shape) -> tuple[Paged, PrefixGroups]:
    defaults = {
        "seed": 21,
        "dtype": torch.float32,
        "heads": (6, 2),
        "head_size": 32,
        "block_size": 16,
        "padding_rows": 3,
    }
    case = paged_case(naive, requests=requests, **(defaults | shape))
    return case, share(case, groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [ONE_GROUP, GROUPS], ids=["one", "two"])
@pytest.mark.parametrize("requests", [DECODES, CHUNKS], ids=["decode", "chunks"])
def test_grouped_is_plain(naive: Kernels, requests, groups, kind, dtype) -> None:
    if requests is CHUNKS:  # one whose queries begin at 0 shares nothing
        groups = [(tuple(r for r in group if r != 3), tokens) for group, tokens in groups]
    case, prefix_groups = shared_case(naive, requests, groups, dtype=dtype)
    options = options_of(kind, 6)
    expected = naive.paged_attention(*case.args, scale=0.2, **options)
    out = naive.paged_attention(*case.args, scale=0.2, prefix_groups=prefix_groups, **options)
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
    assert not out[-3:].any()


@pytest.mark.parametrize(
    ("heads", "head_size", "value_size", "block_size"),
    [
        ((9, 3), 64, 64, 32),
        ((14, 2), 64, 64, 7),
        ((4, 4), 80, 80, 16),
        ((8, 1), 32, 48, 13),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "alibi"])
def test_grouped_is_masked_sdpa(
    naive: Kernels, heads, head_size, value_size, block_size, kind
) -> None:
    case, prefix_groups = shared_case(
        naive,
        DECODES,
        GROUPS,
        heads=heads,
        head_size=head_size,
        value_size=value_size,
        block_size=block_size,
        padding_rows=0,
    )
    options = features(kind, heads[0])
    out = naive.paged_attention(*case.args, scale=0.2, prefix_groups=prefix_groups, **options)
    expected = torch.cat(
        [
            dense_attention(q, k, v, 0.2, None, options.get("alibi_slopes"))
            for q, k, v in zip(case.queries, case.keys, case.values, strict=True)
        ]
    )
    torch.testing.assert_close(out, expected.float(), **TOLERANCE[torch.float32])


def test_the_shared_part_is_read_through_one_member(naive: Kernels) -> None:
    case, prefix_groups = shared_case(naive, DECODES, GROUPS)
    expected = naive.paged_attention(*case.args, scale=0.2)
    table = case.args[3]
    for group, num_blocks in zip(GROUPS, prefix_groups.num_blocks.tolist(), strict=True):
        assert num_blocks > 1
        table[list(group[0][1:]), :num_blocks] = 10**6
    out = naive.paged_attention(*case.args, scale=0.2, prefix_groups=prefix_groups)
    torch.testing.assert_close(out, expected, **TOLERANCE[torch.float32])


def test_extreme_scores_stay_finite(naive: Kernels) -> None:
    case, prefix_groups = shared_case(naive, CHUNKS, [((0, 2, 7), 48)])
    for scale in (1e-4, 100.0):
        expected = naive.paged_attention(*case.args, scale=scale)
        out = naive.paged_attention(*case.args, scale=scale, prefix_groups=prefix_groups)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_a_sink_above_all_scores_counts_once(naive: Kernels) -> None:
    case, prefix_groups = shared_case(naive, DECODES, ONE_GROUP)
    sinks = torch.tensor([9.0, 20.0, -30.0, 0.0, 5.0, 12.0])
    expected = naive.paged_attention(*case.args, scale=0.2, sinks=sinks)
    out = naive.paged_attention(*case.args, scale=0.2, sinks=sinks, prefix_groups=prefix_groups)
    torch.testing.assert_close(out, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("requests", [DECODES, CHUNKS], ids=["decode", "chunks"])
def test_cpu_is_naive(naive: Kernels, cpu: Kernels, requests, kind, dtype) -> None:
    """A backend may ignore the groups; it may not give anything else for them."""
    case, prefix_groups = shared_case(
        naive, requests, [((5, 1), 60), ((0, 4, 2), 33)], heads=(9, 3), head_size=64, dtype=dtype
    )
    options = options_of(kind, 9)
    expected = naive.paged_attention(*case.args, scale=0.125, **options)
    out = cpu.paged_attention(*case.args, scale=0.125, prefix_groups=prefix_groups, **options)
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
