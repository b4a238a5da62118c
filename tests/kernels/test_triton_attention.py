"""Triton's paged attention against the naive twin: under the interpreter, or on a GPU."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from streamserve_kernels import Kernels, PrefixGroups
from tests.kernels.conftest import TOLERANCE, Paged, dtype_on, paged_case
from tests.kernels.pretended_gpu import IS_PRETENDED, capture
from tests.kernels.test_paged_attention import DECODES, FEATURES, features
from tests.kernels.test_prefix_groups import KINDS, options_of, share

pytest.importorskip("triton")

from triton import language

from streamserve_kernels.triton import (
    attention,
    attention_merge,
    attention_plan,
    attention_split,
    attention_work,
)

LONG = [(4100, 1), (1, 1), (700, 1), (64, 1), (65, 1), (1000, 2)]
PREFIXED = [(100, 1), (97, 1), (64, 1), (150, 1), (65, 1), (200, 1), (5, 1)]
PREFIXED_MIXED = [(100, 2), (97, 1), (130, 20), (33, 33), (70, 2), (200, 1), (90, 0), (103, 2)]
CHUNKS = [(140, 1), (130, 33), (7, 7), (65, 3), (90, 0), (31, 1)]
# Drafts to verify: more rows of a group than a tile has, and fewer queries than the most there are.
PREFIXED_DRAFTS = [(100, 3), (97, 1), (130, 2), (70, 3), (99, 3), (200, 2), (150, 3)]
GROUPS = [((0, 4, 2), 33), ((5, 1), 60)]


def case_on(naive: Kernels, device: torch.device, **shape: object) -> Paged:
    """Of a size that the interpreter can do, or a GPU's."""
    sizes = {"dtype": dtype_on(device), "head_size": 64 if device.type == "cuda" else 16}
    return paged_case(naive, **{**sizes, **shape})


def only_interpreted(device: torch.device) -> None:
    """Each set of features is a kernel of its own: a GPU compiles some of them, seconds each."""
    if device.type == "cuda":
        pytest.skip("the interpreter tries this")


def not_in_float16(dtype: torch.dtype, kind: str) -> None:
    if dtype == torch.float16 and kind not in {"plain", "all"}:
        pytest.skip("bfloat16 tries this")


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """In float32 exponentials are of base 2: a rounding of the exponent more."""
    return TOLERANCE[dtype] if dtype != torch.float32 else {"atol": 4e-6, "rtol": 2e-5}


def moved(value, device: torch.device):
    """Tensors, or tuples and dicts of them, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, PrefixGroups):
        return PrefixGroups(*(tensor.to(device) for tensor in value))
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    return tuple(moved(item, device) for item in value) if isinstance(value, tuple) else value


def compare(
    naive: Kernels,
    case: Paged,
    device: torch.device,
    *,
    max_query_len: int | None = None,
    prefix_groups: PrefixGroups | None = None,
    scale: float = 0.125,
    **options: object,
) -> None:
    """Naive without groups is what the output must be, with or without them."""
    dtype = case.args[0].dtype
    expected = naive.paged_attention(*case.args, scale=scale, **options)
    out = attention.paged_attention(
        *moved(case.args, device),
        scale=scale,
        max_query_len=max_query_len,
        prefix_groups=moved(prefix_groups, device),
        **moved(options, device),
    )
    torch.testing.assert_close(out.cpu(), expected, **tolerance(dtype))
    assert not out[int(case.args[5][-1]) :].any()
    assert not any(counters.any() for counters in attention._counters.values())


def padded(case: Paged, requests: int, rows: int) -> Paged:
    """As a CUDA graph pads: requests without queries or keys, and rows of no request."""
    query, key_cache, value_cache, table, lens, starts = case.args
    return dataclasses.replace(
        case,
        args=(
            torch.cat([query, query.new_full((rows, *query.shape[1:]), float("nan"))]),
            key_cache,
            value_cache,
            torch.cat([table, table.new_full((requests, table.shape[1]), -1)]),
            torch.cat([lens, lens.new_zeros(requests)]),
            torch.cat([starts, starts[-1:].expand(requests)]),
        ),
    )


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """What is read many at a time is read in several turns in small cases too."""
    if device.type != "cpu":
        return
    for module, names in (
        (attention_work, ("REQUESTS", "REQUESTS_WITH_GROUPS", "GROUPS", "MEMBERS")),
        (attention_merge, ("REQUESTS", "PARTS", "PART_ROWS")),
    ):
        for name in names:
            size = {"PARTS": 2, "PART_ROWS": 16}.get(name, 4)
            monkeypatch.setattr(module, name, language.constexpr(size))


def change_plans(monkeypatch: pytest.MonkeyPatch, device: torch.device, **changes: object) -> None:
    """Of small tiles for many programs, so that small cases are cut in many places; and more."""
    plan = attention_plan.plan
    if device.type == "cpu":
        tiles, taller = attention_plan.Tiles(16, 16), attention_plan.Tiles(32, 16)
        changes |= {"split": tiles, "chunk": taller, "shared": taller, "programs_per_processor": 3}
        monkeypatch.setattr(attention_plan, "FEW_ROWS", 0)
    monkeypatch.setattr(
        attention, "plan", lambda *args: dataclasses.replace(plan(*args), **changes)
    )


def shuffle_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs a launch's programs one by one: in another order each time."""
    from triton.runtime.interpreter import InterpreterBuilder

    choose = InterpreterBuilder.set_grid_idx
    drawn = random.Random(1)
    order: list[int] = []

    def set_grid_idx(builder: InterpreterBuilder, x: int, y: int, z: int) -> None:
        if (x, y, z) == (0, 0, 0):
            order[:] = drawn.sample(range(builder.grid_dim[0]), builder.grid_dim[0])
        choose(builder, order[x], y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, device: torch.device, few_at_a_time: None) -> None:
    """See `change_plans` and `shuffle_programs`."""
    change_plans(monkeypatch, device)
    if device.type == "cpu":
        shuffle_programs(monkeypatch)


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("requests", [DECODES, CHUNKS], ids=["decode", "mixed"])
def test_features(naive: Kernels, device, dtype, kind, requests, monkeypatch) -> None:
    if requests is CHUNKS and kind not in {"plain", "window", "all"}:
        only_interpreted(device)
    not_in_float16(dtype, kind)
    monkeypatch.setattr(attention_plan, "FEW_ROWS", 0)
    case = case_on(
        naive, device, seed=5, heads=(6, 2), requests=requests, dtype=dtype, padding_rows=3
    )
    most = max(count for _, count in requests)
    compare(naive, case, device, max_query_len=most, **features(kind, 6))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("requests", [DECODES, CHUNKS], ids=["decode", "mixed"])
def test_cut_in_many_places(naive: Kernels, device, kind, requests) -> None:
    case = case_on(naive, device, seed=6, heads=(6, 2), requests=requests)
    case = padded(case, requests=5, rows=7)
    compare(
        naive,
        case,
        device,
        max_query_len=1 if requests is DECODES else 33,
        **features(kind, 6),
    )


@pytest.mark.usefixtures("small")
def test_all_programs_at_one_request(naive: Kernels, device) -> None:
    """More parts of a row than are put together at once."""
    case = case_on(naive, device, seed=27, heads=(3, 1), requests=[(400, 1)], value_size=12)
    compare(naive, case, device, max_query_len=1, scale=1.0)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("block_size", [16, 32])
def test_what_is_asked_for_ahead_is_a_programs_first_tile(naive, device, block_size, monkeypatch):
    only_interpreted(device)
    from triton.runtime.interpreter import interpreter_builder

    asked, loaded = defaultdict(list), defaultdict(list)
    load = interpreter_builder.create_masked_load
    monkeypatch.setattr(
        attention_split,
        "bring_to_l2",
        lambda pointers: asked[interpreter_builder.grid_idx].append(set(pointers.handle.data.flat)),
    )

    def kept(pointers, *how):
        loaded[interpreter_builder.grid_idx].append(set(pointers.data.flat))
        return load(pointers, *how)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", kept)
    case = case_on(
        naive, device, seed=29, heads=(6, 2), requests=[(140, 1), (90, 1)], block_size=block_size
    )
    compare(naive, case, device, max_query_len=1, window=60)
    assert len(asked) > 4
    for program, (keys, values) in asked.items():
        tiles = [rows for rows in loaded[program] if len(rows) == 16 * 16]
        assert len(keys) == len(values) == 16
        assert keys < tiles[1]
        assert values < tiles[2]


@pytest.mark.parametrize("max_query_len", [None, 3, 9])
def test_a_few_queries_each(naive: Kernels, device, max_query_len) -> None:
    """Drafts to verify, or a step that is small as a whole: all requests are split."""
    # One of the requests sees key 63 last.
    case = case_on(
        naive,
        device,
        seed=7,
        heads=(14, 2),
        requests=[(102, 3), (70, 1), (3, 3), (90, 2), (33, 0), (17, 2)],
        padding_rows=2,
    )
    compare(naive, case, device, max_query_len=max_query_len, window=37)


@pytest.mark.parametrize(
    ("heads", "head_size", "value_size", "block_size"),
    [
        ((16, 1), 64, 64, 32),
        ((71, 1), 64, 64, 16),
        ((4, 4), 80, 80, 16),
        ((10, 2), 96, 96, 64),
        ((4, 2), 128, 128, 64),
        ((8, 1), 256, 256, 64),
        ((4, 2), 64, 48, 16),
        ((3, 1), 20, 20, 48),
        ((20, 1), 288, 272, 16),  # latents
    ],
)
def test_shapes(
    naive: Kernels, device, heads, head_size, value_size, block_size, monkeypatch
) -> None:
    monkeypatch.setattr(attention_plan, "FEW_ROWS", 0)
    seen_elsewhere = {(64, 64), (80, 80), (20, 20)}  # a kernel's compilation takes seconds
    decodes, mixed = [(70, 1), (33, 1), (1, 1)], [(70, 1), (150, 17), (33, 2)]
    for requests, most in ((decodes, 1), (mixed, None)):
        if (
            requests is mixed
            and device.type == "cuda"
            and (head_size, value_size) in seen_elsewhere
        ):
            continue
        case = paged_case(
            naive,
            seed=8,
            dtype=dtype_on(device),
            heads=heads,
            head_size=head_size,
            block_size=block_size,
            requests=requests,
            value_size=value_size,
        )
        compare(naive, case, device, max_query_len=most, scale=head_size**-0.5)


@pytest.mark.parametrize(
    ("requests", "group_padding", "kind"),
    [
        *((PREFIXED, 3, kind) for kind in KINDS),
        (PREFIXED_DRAFTS, 0, "all"),
        *((PREFIXED_MIXED, 3, kind) for kind in ("plain", "all")),
    ],
    ids=[*(f"decode-{kind}" for kind in KINDS), "drafts-all", "mixed-plain", "mixed-all"],
)
@pytest.mark.usefixtures("small")
def test_groups(naive: Kernels, device, dtype, requests, group_padding, kind) -> None:
    if kind not in {"plain", "all"}:
        only_interpreted(device)
    not_in_float16(dtype, kind)
    case = case_on(
        naive, device, seed=21, heads=(4, 2), requests=requests, dtype=dtype, padding_rows=3
    )
    drafts = [((1, 4, 2, 6, 3, 0), 60)]
    groups = padded_groups(
        share(case, drafts if requests is PREFIXED_DRAFTS else GROUPS), group_padding
    )
    compare(
        naive,
        case,
        device,
        max_query_len=64 if requests is PREFIXED_MIXED else max(count for _, count in requests),
        prefix_groups=groups,
        **options_of(kind, 4),
    )


def padded_groups(groups: PrefixGroups, count: int) -> PrefixGroups:
    members, starts, num_blocks = groups
    return PrefixGroups(
        torch.cat([members, members.new_zeros(count)]),
        torch.cat([starts, starts[-1:].expand(count)]),
        torch.cat([num_blocks, num_blocks.new_zeros(count)]),
    )


@pytest.mark.usefixtures("few_at_a_time")
def test_groups_whose_members_are_not_cut(naive: Kernels, device, monkeypatch) -> None:
    """Beside chunks, a member of a few queries attends to all of its keys in one program."""
    monkeypatch.setattr(attention_plan, "FEW_ROWS", 0)
    case = case_on(naive, device, seed=23, heads=(4, 2), requests=PREFIXED_MIXED)
    compare(naive, case, device, max_query_len=64, prefix_groups=share(case, GROUPS))


@pytest.mark.usefixtures("small")
def test_rows_of_a_group_that_nobody_has_are_not_the_first_requests(naive: Kernels, device) -> None:
    """It is in the first group; one program has all of the second's keys, and writes for itself."""
    case = paged_case(
        naive,
        seed=24,
        dtype=dtype_on(device),
        heads=(4, 2),
        head_size=64 if device.type == "cuda" else 16,
        block_size=16,
        requests=PREFIXED,
    )
    groups = share(case, [((0, 4, 2), 33), ((5, 1), 16)])
    compare(naive, case, device, max_query_len=1, prefix_groups=groups)


@pytest.mark.usefixtures("small")
def test_programs_divide_the_row_tiles_of_a_group(naive: Kernels, device) -> None:
    """Six items of three tiles of keys among four programs: nearly all are put together."""
    case = paged_case(
        naive,
        seed=25,
        dtype=dtype_on(device),
        heads=(6, 3),
        head_size=64 if device.type == "cuda" else 16,
        block_size=16,
        requests=PREFIXED_DRAFTS,
    )
    groups = share(case, [((1, 4, 2, 6, 3, 0), 60)])
    compare(naive, case, device, max_query_len=3, prefix_groups=groups)


def test_members_read_a_prefix_through_the_first(naive: Kernels, device) -> None:
    case = case_on(
        naive, device, seed=22, heads=(6, 2), requests=[(100, 2), (97, 1), (130, 2), (150, 1)]
    )
    groups = share(case, [((3, 1, 0, 2), 96)])
    expected = naive.paged_attention(*case.args, scale=0.2)
    case.args[3][:3, : int(groups.num_blocks[0])] = 1  # NaN, mostly
    out = attention.paged_attention(
        *moved(case.args, device),
        scale=0.2,
        prefix_groups=moved(groups, device),
        max_query_len=2,
    )
    torch.testing.assert_close(out.cpu(), expected, **tolerance(expected.dtype))


@pytest.mark.parametrize("scale", [1e-4, 100.0])
def test_extreme_scores_stay_finite(naive: Kernels, device, scale) -> None:
    case = paged_case(
        naive,
        seed=11,
        dtype=torch.float32,
        heads=(4, 2),
        head_size=16,
        requests=[(100, 1), (90, 40)],
    )
    expected = naive.paged_attention(*case.args, scale=scale)
    out = attention.paged_attention(*moved(case.args, device), scale=scale)
    torch.testing.assert_close(out.cpu(), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("requests", [DECODES, CHUNKS], ids=["decode", "mixed"])
def test_float8_caches(naive: Kernels, device, dtype, requests) -> None:
    case = case_on(
        naive, device, seed=12, heads=(4, 2), requests=requests, dtype=dtype, block_size=32
    )
    query, key_cache, value_cache, *rest = case.args
    caches = [cache.to(torch.float8_e4m3fn) for cache in (key_cache, value_cache)]
    read = [cache.to(query.dtype) for cache in caches]
    expected = naive.paged_attention(query, *read, *rest, scale=0.2)
    out = attention.paged_attention(*moved((query, *caches, *rest), device), scale=0.2)
    torch.testing.assert_close(out.cpu(), expected, **tolerance(query.dtype))


@pytest.mark.parametrize("requests", [DECODES, CHUNKS], ids=["decode", "mixed"])
def test_queries_beyond_float16_beside_float8_caches(naive: Kernels, device, requests) -> None:
    """They are multiplied as float16: what is too large is the largest, and NaN is NaN."""
    case = case_on(
        naive, device, seed=15, heads=(4, 2), requests=requests, dtype=torch.bfloat16, block_size=32
    )
    query, key_cache, value_cache, *rest = case.args
    caches = [cache.to(torch.float8_e4m3fn) for cache in (key_cache, value_cache)]
    query[:, :2, 0], query[:, 2:, 0] = 1e5, -1e5
    if requests is DECODES:  # of a chunk's rows the interpreter warns
        query[1, 3, 2] = float("nan")
    expected = naive.paged_attention(
        query, *(cache.to(query.dtype) for cache in caches), *rest, scale=0.2
    )
    out = attention.paged_attention(*moved((query, *caches, *rest), device), scale=0.2)
    assert expected.isnan().any(2).sum() == (requests is DECODES)
    # Scores of 10,000 are known to a few thousandths.
    torch.testing.assert_close(out.cpu(), expected, equal_nan=True, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("cache_bytes", [1, 2])
@pytest.mark.parametrize(("tokens", "groups"), [(1, False), (64, False), (64, True)])
def test_a_processors_programs_have_as_much_on_their_way(head_size, cache_bytes, tokens, groups):
    plan = attention_plan.plan(4, head_size, tokens, 1, groups, cache_bytes)
    programs = plan.programs_per_processor + groups
    tile = 2 * plan.split.keys * attention_plan.power_of_two(head_size) * cache_bytes
    on_the_way = programs * (plan.stages - 1) * tile
    assert on_the_way <= attention_plan.ON_THE_WAY
    assert on_the_way == attention_plan.ON_THE_WAY or plan.stages == 6
    # Beside what is in use, queries and weights, they have room (227 KiB).
    assert on_the_way + programs * (tile + 8 * 1024) <= 227 * 1024


@pytest.mark.parametrize(
    ("queries", "groups", "launches"), [(1, False, 1), (16, False, 1), (17, False, 2), (1, True, 2)]
)
def test_who_comes_last_merges(naive: Kernels, device, queries, groups, launches, monkeypatch):
    """But for many rows, or with a group, whose prefix is another program's."""
    only_interpreted(device)
    requests = [(100, queries), (70, 1), (65, queries)]
    case = case_on(naive, device, seed=26, heads=(2, 2), requests=requests)
    shared = share(case, [((0, 2), 60)]) if groups else None
    made = []
    for kernel in (attention.attention_kernel, attention.merge_kernel):
        run = kernel.run

        def counted(*args: object, run=run, **options: object) -> object:
            made.append(run)
            return run(*args, **options)

        monkeypatch.setattr(kernel, "run", counted)
    compare(naive, case, device, max_query_len=queries, prefix_groups=shared)
    assert len(made) == launches


def test_views_of_a_fused_projection(naive: Kernels, device) -> None:
    case = paged_case(
        naive,
        seed=13,
        dtype=dtype_on(device),
        heads=(4, 2),
        head_size=20,  # what pads it to 32 is another head, or NaN
        requests=DECODES,
    )
    query, *rest = case.args
    fused = torch.cat([query, query.new_full((len(query), 3, query.shape[2]), float("nan"))], dim=1)
    view = dataclasses.replace(case, args=(fused.to(device)[:, :4], *rest))
    expected = naive.paged_attention(*case.args, scale=0.2)
    out = attention.paged_attention(view.args[0], *moved(tuple(rest), device), scale=0.2)
    torch.testing.assert_close(out.cpu(), expected, **tolerance(query.dtype))


def test_nothing_to_do(naive: Kernels, device) -> None:
    case = paged_case(
        naive,
        seed=14,
        dtype=dtype_on(device),
        heads=(4, 2),
        head_size=16,
        requests=[(5, 1)],
        padding_rows=2,
    )
    query, key_cache, value_cache, table, lens, starts = moved(case.args, device)
    none = attention.paged_attention(
        query[:0], key_cache, value_cache, table, lens, starts * 0, scale=1.0
    )
    assert none.shape == (0, 4, 16)
    for rows in (query, query[:1]):
        idle = attention.paged_attention(
            rows, key_cache, value_cache, table, lens * 0, starts, scale=1.0, max_query_len=1
        )
        assert not idle.any()
    rows = attention.paged_attention(
        query, key_cache, value_cache, table[:0], lens[:0], starts[:1], scale=1.0
    )
    assert not rows.any()


def test_counters_belong_to_a_cache(naive: Kernels, device, monkeypatch) -> None:
    """No graph makes them: it would zero them at each replay, and not when it is captured."""
    case = case_on(naive, device, seed=28, heads=(4, 2), requests=DECODES)
    query, key_cache, *rest = moved(case.args, device)
    known = dict(attention._counters)
    attention.paged_attention(query, key_cache, *rest, scale=0.2, max_query_len=1)
    assert set(attention._counters) - set(known) == {key_cache.data_ptr()}
    del key_cache, case
    assert set(attention._counters) == set(known)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    unmet = SimpleNamespace(device=torch.device("cpu"), is_cuda=True, data_ptr=lambda: -1)
    with pytest.raises(RuntimeError, match="before its capture"):
        attention._counters_of(unmet, 4)


def test_wrong_kinds_of_tensors_are_refused(naive: Kernels, device) -> None:
    case = paged_case(
        naive, seed=15, dtype=torch.float32, heads=(2, 1), head_size=16, requests=[(20, 1)]
    )
    args = moved(case.args, device)
    for index, name in ((3, "block_table"), (4, "seq_lens"), (5, "query_start_loc")):
        wrong = [*args[:index], args[index].long(), *args[index + 1 :]]
        with pytest.raises(TypeError, match=name):
            attention.paged_attention(*wrong, scale=0.1)
    with pytest.raises(TypeError, match="caches"):
        attention.paged_attention(args[0].half(), *args[1:], scale=0.1)
    odd = [cache[:, :, :10] for cache in args[1:3]]
    with pytest.raises(ValueError, match="multiple of 16"):
        attention.paged_attention(args[0], *odd, *args[3:], scale=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("requests", "most"),
    [(LONG, 2), ([(9000, 1), (3000, 1000), (700, 700), (40, 1)], None)],
    ids=["decode", "mixed"],
)
def test_realistic(naive: Kernels, device, requests, most) -> None:
    for dtype, block_size in (
        (torch.bfloat16, 16),
        (torch.bfloat16, 64),
        (torch.float16, 64),
    ):
        case = paged_case(
            naive,
            seed=16,
            dtype=dtype,
            heads=(32, 8),
            head_size=128,
            block_size=block_size,
            requests=requests,
        )
        compare(naive, case, device, max_query_len=most, scale=128**-0.5)


def test_captured_once_and_replayed_for_other_lengths(naive: Kernels, device, dtype) -> None:
    size, longest = (16, 300) if device.type == "cpu" else (128, 3000)
    shape = {"heads": (4, 2), "head_size": size, "block_size": 64, "dtype": dtype}
    many = [(longest - 100, 1), (64, 1), (65, 1), (longest, 1)]
    first = moved(paged_case(naive, seed=17, requests=many, **shape).args, device)

    def attend() -> torch.Tensor:
        return attention.paged_attention(*first, scale=0.1, max_query_len=1)

    attend()
    replay, out = capture(attend)
    few = padded(paged_case(naive, seed=18, requests=[(longest, 1), (17, 1)], **shape), 2, 2)
    expected = naive.paged_attention(*few.args, scale=0.1)
    for old, new in zip(first, few.args, strict=True):
        old[tuple(slice(size) for size in new.shape)].copy_(new)
    replay()
    torch.testing.assert_close(out.cpu(), expected, **tolerance(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(IS_PRETENDED, reason="there is nothing to wait for")
@pytest.mark.parametrize("grouped", [True, False])
def test_launches_that_overlap_wait_for_each_other(naive: Kernels, device, grouped) -> None:
    """All of an attention overlap, and its queries are what the attention before has left."""
    shape = {"heads": (32, 8), "head_size": 128, "block_size": 64, "dtype": torch.bfloat16}
    case = paged_case(naive, seed=19, requests=[(2048 + 64 * r, 1) for r in range(1, 25)], **shape)
    groups = moved(share(case, [(tuple(range(24)), 2048)]), device) if grouped else None
    query, *rest = moved(case.args, device)

    def chain(between: Callable[[], object]) -> torch.Tensor:
        out = query
        for _ in range(20):
            out = attention.paged_attention(
                out, *rest, scale=1.0, prefix_groups=groups, max_query_len=1
            )
            between()
        return out

    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(lambda: None)
    for _ in range(3):
        graph.replay()
        assert out.equal(expected)
        out.zero_()
