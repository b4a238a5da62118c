"""The native attention against the naive twin, in bfloat16: ragged, poisoned, on any threads."""

from __future__ import annotations

import contextlib

import pytest
import torch

from streamserve_kernels import Kernels
from streamserve_kernels.interface import PrefixGroups
from tests.kernels.conftest import TOLERANCE, native_args, paged_case, threads
from tests.kernels.test_paged_attention import DECODES, FEATURES, MIXED, features
from tests.kernels.test_prefix_groups import CHUNKS, options_of, shared_case
from tests.kernels.test_prefix_groups import DECODES as SHARED_DECODES

BF16 = torch.bfloat16


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("requests", [DECODES, MIXED], ids=["decode", "mixed"])
def test_attention_is_naive(
    naive: Kernels, native: Kernels, kind: str, requests: list[tuple[int, int]], count: int
) -> None:
    case = paged_case(
        naive, seed=5, dtype=BF16, heads=(9, 3), head_size=64, requests=requests, padding_rows=3
    )
    options = features(kind, 9)
    expected = naive.paged_attention(*case.args, scale=0.125, **options)
    args = native_args(native, case)
    with threads(count):
        out = native.paged_attention(*args, scale=0.125, **options)
    torch.testing.assert_close(out, expected, **TOLERANCE[BF16])
    assert not out[-3:].any()


@pytest.mark.parametrize(
    ("heads", "head_size", "value_size", "block_size"),
    [
        ((14, 2), 64, 64, 32),
        ((32, 8), 128, 128, 16),
        ((71, 1), 64, 64, 16),
        ((65, 1), 8, 16, 16),
        ((130, 2), 20, 48, 32),
        ((4, 4), 80, 80, 48),
        ((16, 1), 96, 96, 32),
        ((4, 2), 256, 256, 16),
        ((6, 3), 192, 128, 16),
        ((5, 1), 64, 112, 48),
        ((3, 1), 2, 16, 64),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_attention_of_other_shapes_is_naive(
    naive: Kernels,
    native: Kernels,
    heads: tuple[int, int],
    head_size: int,
    value_size: int,
    block_size: int,
    kind: str,
) -> None:
    case = paged_case(
        naive,
        seed=7,
        dtype=BF16,
        heads=heads,
        head_size=head_size,
        value_size=value_size,
        block_size=block_size,
        requests=[(40, 1), (300, 70), (7, 7), (65, 3), (129, 1), (90, 0), (31, 16)],
    )
    options = features(kind, heads[0])
    scale = head_size**-0.5
    expected = naive.paged_attention(*case.args, scale=scale, **options)
    out = native.paged_attention(*native_args(native, case), scale=scale, **options)
    torch.testing.assert_close(out, expected, **TOLERANCE[BF16])


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 63, 64, 65, 200])
def test_windows_end_anywhere_in_a_tile(naive: Kernels, native: Kernels, window: int) -> None:
    case = paged_case(
        naive,
        seed=8,
        dtype=BF16,
        heads=(4, 2),
        head_size=32,
        requests=[(300, 150), (129, 1), (64, 64), (15, 2)],
    )
    expected = naive.paged_attention(*case.args, scale=0.2, window=window)
    out = native.paged_attention(*native_args(native, case), scale=0.2, window=window)
    torch.testing.assert_close(out, expected, **TOLERANCE[BF16])


def test_many_requests_and_none(naive: Kernels, native: Kernels) -> None:
    requests = [(1 + 37 * i % 211, 1) for i in range(130)]
    case = paged_case(
        naive, seed=9, dtype=BF16, heads=(4, 2), head_size=32, block_size=16, requests=requests
    )
    expected = naive.paged_attention(*case.args, scale=0.2)
    query, key, value, table, lens, starts = native_args(native, case)
    out = native.paged_attention(query, key, value, table, lens, starts, scale=0.2)
    torch.testing.assert_close(out, expected, **TOLERANCE[BF16])
    padding = native.paged_attention(
        query[:5], key, value, table[:0], lens[:0], starts[:1], scale=0.2
    )
    assert padding.shape == (5, 4, 32)
    assert not padding.any()
    nothing = native.paged_attention(
        query[:0], key, value, table[:0], lens[:0], starts[:1], scale=0.2
    )
    assert nothing.shape == (0, 4, 32)


def test_queries_may_be_views_of_a_fused_projection(naive: Kernels, native: Kernels) -> None:
    case = paged_case(
        naive, seed=10, dtype=BF16, heads=(4, 2), head_size=32, block_size=16, requests=MIXED
    )
    query, *rest = native_args(native, case)
    expected = native.paged_attention(query, *rest, scale=0.2)
    for gap in (1, 64):  # the first leaves rows at odd addresses
        fused = torch.full((query.shape[0], 128 + gap), float("nan"), dtype=BF16)
        view = fused[:, :128].view(-1, 4, 32)
        view.copy_(query)
        assert torch.equal(native.paged_attention(view, *rest, scale=0.2), expected)
    swapped = query.transpose(0, 1).contiguous().transpose(0, 1)  # heads are not adjacent
    assert torch.equal(native.paged_attention(swapped, *rest, scale=0.2), expected)


@pytest.mark.parametrize("scale", [1e-4, 100.0])
def test_extreme_scores_stay_finite(naive: Kernels, native: Kernels, scale: float) -> None:
    case = paged_case(
        naive, seed=11, dtype=BF16, heads=(4, 2), head_size=32, block_size=16, requests=MIXED
    )
    sinks = torch.tensor([-1e4, 1e4, 0.0, 30.0])
    for options in ({}, {"sinks": sinks}, {"soft_cap": 5.0}):
        expected = naive.paged_attention(*case.args, scale=scale, **options)
        out = native.paged_attention(*native_args(native, case), scale=scale, **options)
        torch.testing.assert_close(out, expected, **TOLERANCE[BF16])


GROUPS = [((5, 1), 60), ((0, 4, 2), 33)]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 8.0])
def test_maxima_that_grow_from_tile_to_tile(
    naive: Kernels, native: Kernels, scale: float, count: int
) -> None:
    """Between scores that never move what exponents are taken from and such that often do."""
    case = paged_case(
        naive,
        seed=8,
        dtype=BF16,
        heads=(14, 2),
        head_size=64,
        requests=[*MIXED, (700, 1), (900, 40)],
    )
    expected = naive.paged_attention(*case.args, scale=scale)
    args = native_args(native, case)
    with threads(count):
        out = native.paged_attention(*args, scale=scale)
    torch.testing.assert_close(out, expected, **TOLERANCE[BF16])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", FEATURES)
def test_a_query_that_is_not_a_number_stays_one_and_alone(
    naive: Kernels, native: Kernels, kind: str, count: int
) -> None:
    requests = [(40, 1), (700, 1), (300, 130), (7, 7)]
    case = paged_case(
        naive, seed=9, dtype=BF16, heads=(6, 2), head_size=32, block_size=16, requests=requests
    )
    args = native_args(native, case)
    options = features(kind, 6)
    with threads(count):
        expected = native.paged_attention(*args, scale=0.2, **options)
        poisoned = [1, 60, 138]
        args[0][poisoned, 2] = float("nan")
        out = native.paged_attention(*args, scale=0.2, **options)
    assert out[poisoned, 2].isnan().all()
    expected[poisoned, 2] = out[poisoned, 2]
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", ["plain", "wide window", "alibi", "soft cap", "sinks", "all"])
@pytest.mark.parametrize("requests", [SHARED_DECODES, CHUNKS], ids=["decode", "chunks"])
def test_grouped_is_naive(
    naive: Kernels, native: Kernels, requests: list[tuple[int, int]], kind: str, count: int
) -> None:
    case, groups = shared_case(
        naive, requests, GROUPS, heads=(9, 3), head_size=64, dtype=BF16, padding_rows=2
    )
    options = options_of(kind, 9)
    expected = naive.paged_attention(*case.args, scale=0.125, **options)
    args = native_args(native, case)
    with threads(count):
        out = native.paged_attention(*args, scale=0.125, prefix_groups=groups, **options)
    torch.testing.assert_close(out, expected, **TOLERANCE[BF16])
    assert not out[-2:].any()


@pytest.mark.parametrize("heads", [(4, 2), (71, 1)])
def test_a_group_larger_than_an_item(
    naive: Kernels, native: Kernels, heads: tuple[int, int]
) -> None:
    requests = [(640 + i, 1 + i % 3) for i in range(70)]
    case, groups = shared_case(
        naive,
        requests,
        [(tuple(range(0, 70, 2)), 600), (tuple(range(1, 70, 2)), 320)],
        heads=heads,
        dtype=BF16,
    )
    expected = naive.paged_attention(*case.args, scale=0.2)
    args = native_args(native, case)
    for count in (1, 2, 3):
        with threads(count):
            out = native.paged_attention(*args, scale=0.2, prefix_groups=groups)
        torch.testing.assert_close(out, expected, **TOLERANCE[BF16])


def test_the_shared_part_is_read_through_one_member(naive: Kernels, native: Kernels) -> None:
    case, groups = shared_case(naive, SHARED_DECODES, GROUPS, dtype=BF16)
    query, key, value, table, lens, starts = native_args(native, case)
    rest = query, key, value, table, lens, starts
    expected = native.paged_attention(*rest, scale=0.2, prefix_groups=groups)
    assert expected[:-3].isfinite().all()
    empty = next(b for b in range(key.shape[0]) if key[b].isnan().all())
    for (members, _), num_blocks in zip(GROUPS, groups.num_blocks.tolist(), strict=True):
        assert num_blocks > 1
        table[list(members[1:]), :num_blocks] = empty
    out = native.paged_attention(*rest, scale=0.2, prefix_groups=groups)
    assert torch.equal(out, expected)


def test_a_window_that_cuts_a_shared_prefix_reads_it_for_each(
    naive: Kernels, native: Kernels
) -> None:
    """The models pass no groups then; a recorded program leaves it to the instruction."""
    case, groups = shared_case(naive, SHARED_DECODES, GROUPS, dtype=BF16)
    args = native_args(native, case)
    for window in (7, 64, 199):
        expected = naive.paged_attention(*case.args, scale=0.2, window=window)
        out = native.paged_attention(*args, scale=0.2, window=window, prefix_groups=groups)
        torch.testing.assert_close(out, expected, **TOLERANCE[BF16])


def test_what_attention_cannot_take_is_refused(naive: Kernels, native: Kernels) -> None:
    case = paged_case(
        naive, seed=12, dtype=BF16, heads=(4, 2), head_size=32, block_size=16, requests=[(20, 1)]
    )
    query, key, value, table, lens, starts = native_args(native, case)
    attend = native.paged_attention
    with pytest.raises(TypeError, match=r"must be bfloat16, got torch\.float32"):
        attend(query.float(), key, value, table, lens, starts, scale=1.0)
    with pytest.raises(TypeError, match=r"block_table must be contiguous torch\.int32"):
        attend(query, key, value, table.long(), lens, starts, scale=1.0)
    with pytest.raises(TypeError, match="seq_lens"):
        attend(query, key, value, table, lens.long(), starts, scale=1.0)
    with pytest.raises(TypeError, match="query_start_loc"):
        attend(query, key, value, table, lens, starts.expand(2, 2).T[0], scale=1.0)
    with pytest.raises(TypeError, match="caches must be contiguous"):
        attend(query, key.transpose(0, 1), value, table, lens, starts, scale=1.0)
    with pytest.raises(ValueError, match="got 16, 32, 24"):
        attend(query, key, value[..., :24].contiguous(), table, lens, starts, scale=1.0)
    with pytest.raises(ValueError, match="got 16, 31, 32"):
        attend(query[..., :31], key[..., :31].contiguous(), value, table, lens, starts, scale=1.0)
    with pytest.raises(ValueError, match="got 12, 32, 32"):
        attend(
            query,
            key[:, :, :12].contiguous(),
            value[:, :, :12].contiguous(),
            table,
            lens,
            starts,
            scale=1.0,
        )


PLAN: dict[str, list[int] | list[list[int]]] = {
    "block_table": [[0, 1, 2], [3, 4, 0]],
    "seq_lens": [40, 17],
    "query_start_loc": [0, 1, 3],
}
SHARED = ([0, 1], [0, 2], [1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_table": [[0, 1, 5], [3, 4, 0]]},
        {"block_table": [[0, 1, 2], [-1, 4, 0]]},
        {"seq_lens": [49, 17]},
        {"seq_lens": [40, 1]},  # fewer than it asks with
        {"query_start_loc": [0, 2, 1]},
        {"query_start_loc": [1, 1, 3]},
        {"query_start_loc": [0, 1, 4]},
        {"groups": ([0, 2], [0, 2], [1])},
        {"groups": ([0, 1], [0, 3], [1])},
        {"groups": ([0, 1], [0, 2], [2])},  # more than the second has
    ],
    ids=str,
)
def test_a_plan_that_names_what_is_not_there_does_not_run(native: Kernels, wrong: dict) -> None:
    caches = [torch.zeros(5, 2, 16, 64, dtype=torch.bfloat16) for _ in range(2)]
    query = torch.zeros(3, 4, 64, dtype=torch.bfloat16)
    for given, fits in (({}, True), (wrong, False), ({}, True)):
        plan = {**PLAN, "groups": SHARED, **given}
        groups = PrefixGroups(*(torch.tensor(x, dtype=torch.int32) for x in plan.pop("groups")))
        tensors = {name: torch.tensor(x, dtype=torch.int32) for name, x in plan.items()}
        with contextlib.nullcontext() if fits else pytest.raises(IndexError, match="not there"):
            native.paged_attention(query, *caches, **tensors, scale=1.0, prefix_groups=groups)
