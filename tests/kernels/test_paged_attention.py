"""Paged attention: the specification against torch's SDPA, the compiled kernel against it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamserve_kernels import Kernels
from tests.kernels.conftest import TOLERANCE, paged_case

DECODES = [(1, 1), (16, 1), (17, 1), (33, 1), (200, 1), (5, 1)]
OTHERS = [(70, 1), (65, 65), (33, 2), (1, 1), (200, 1)]
MIXED = [(40, 1), (300, 130), (7, 7), (65, 3), (129, 1), (150, 100), (90, 0), (31, 16)]
FEATURES = ["plain", "window", "wide window", "alibi", "soft cap", "sinks", "all"]


def features(kind: str, num_heads: int) -> dict[str, object]:
    random = torch.Generator().manual_seed(3)
    slopes = 2.0 ** -(8.0 * torch.arange(1, num_heads + 1) / num_heads)
    sinks = torch.randn(num_heads, generator=random)
    return {
        "plain": {},
        "window": {"window": 19},
        "wide window": {"window": 128},
        "alibi": {"alibi_slopes": slopes},
        "soft cap": {"soft_cap": 2.0},
        "sinks": {"sinks": sinks},
        "all": {"window": 50, "alibi_slopes": slopes, "soft_cap": 3.0, "sinks": sinks},
    }[kind]


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
) -> Tensor:
    """Torch's SDPA in float64 with an explicit mask: what the naive twin must mean."""
    queries, num_heads, _ = query.shape
    length, num_kv_heads, _ = key.shape
    i = torch.arange(length - queries, length)[:, None]
    j = torch.arange(length)
    visible = (j <= i) & (i - j < (window or length))
    bias = torch.zeros(num_heads, queries, length, dtype=torch.float64)
    if slopes is not None:
        bias += slopes.double()[:, None, None] * (j - i)
    bias.masked_fill_(~visible, float("-inf"))
    group = num_heads // num_kv_heads
    k, v = (x.double().repeat_interleave(group, dim=1).transpose(0, 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query.double().transpose(0, 1)[None], k[None], v[None], attn_mask=bias[None], scale=scale
    )
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("kind", ["plain", "window", "wide window", "alibi"])
def test_naive_is_masked_sdpa(naive: Kernels, kind: str) -> None:
    case = paged_case(
        naive, seed=1, dtype=torch.float32, heads=(6, 2), head_size=32, requests=MIXED
    )
    options = features(kind, 6)
    out = naive.paged_attention(*case.args, scale=0.2, **options)
    expected = torch.cat(
        [
            dense_attention(q, k, v, 0.2, options.get("window"), options.get("alibi_slopes"))
            for q, k, v in zip(case.queries, case.keys, case.values, strict=True)
        ]
    )
    torch.testing.assert_close(out, expected.float(), atol=2e-6, rtol=1e-5)


def test_naive_sink_is_one_more_logit_and_cap_comes_first(naive: Kernels) -> None:
    case = paged_case(
        naive, seed=2, dtype=torch.float32, heads=(2, 1), head_size=8, requests=[(20, 1)]
    )
    sinks = torch.tensor([0.3, -1.0])
    out = naive.paged_attention(*case.args, scale=1.0, soft_cap=2.0, sinks=sinks)
    scores = 2.0 * torch.tanh(case.queries[0][0] @ case.keys[0][:, 0].T / 2.0)  # [Hq, L]
    weights = torch.cat([scores, sinks[:, None]], dim=1).softmax(-1)[:, :-1]
    torch.testing.assert_close(out[0], weights @ case.values[0][:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("requests", [DECODES, MIXED], ids=["decode", "mixed"])
def test_cpu_is_naive(
    naive: Kernels,
    cpu: Kernels,
    dtype: torch.dtype,
    kind: str,
    requests: list[tuple[int, int]],
) -> None:
    case = paged_case(
        naive, seed=5, dtype=dtype, heads=(9, 3), head_size=64, requests=requests, padding_rows=3
    )
    options = features(kind, 9)
    expected = naive.paged_attention(*case.args, scale=0.125, **options)
    out = cpu.paged_attention(*case.args, scale=0.125, **options)
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
    assert not expected[-3:].any()


@pytest.mark.parametrize(
    ("heads", "head_size", "block_size", "dtype"),
    [
        ((14, 2), 128, 7, torch.bfloat16),
        ((32, 8), 64, 16, torch.bfloat16),
        ((71, 1), 64, 16, torch.bfloat16),
        ((4, 2), 256, 16, torch.bfloat16),
        ((4, 2), 20, 16, torch.float32),
        ((9, 3), 64, 16, torch.float16),
    ],
)
def test_cpu_is_naive_for_other_shapes(
    naive: Kernels,
    cpu: Kernels,
    heads: tuple[int, int],
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    case = paged_case(
        naive,
        seed=7,
        dtype=dtype,
        heads=heads,
        head_size=head_size,
        block_size=block_size,
        requests=OTHERS,
    )
    expected = naive.paged_attention(*case.args, scale=head_size**-0.5)
    out = cpu.paged_attention(*case.args, scale=head_size**-0.5)
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("requests", [[(200, 1), (31, 1)], [(200, 150)], OTHERS])
def test_value_heads_of_another_size(
    naive: Kernels, cpu: Kernels, requests: list[tuple[int, int]]
) -> None:
    case = paged_case(
        naive,
        seed=8,
        dtype=torch.float32,
        heads=(16, 1),
        head_size=80,
        block_size=32,
        requests=requests,
        value_size=48,
    )
    expected = naive.paged_attention(*case.args, scale=0.125)
    assert expected.shape[2] == 48
    torch.testing.assert_close(
        cpu.paged_attention(*case.args, scale=0.125), expected, **TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_one_long_sequence_is_cut_between_any_number_of_threads(
    naive: Kernels, cpu: Kernels, threads: int
) -> None:
    case = paged_case(
        naive, seed=9, dtype=torch.float32, heads=(4, 2), head_size=64, requests=[(333, 1), (18, 2)]
    )
    sinks = torch.tensor([0.5, 0.0, 4.0, -3.0])
    expected = naive.paged_attention(*case.args, scale=0.125, window=300, sinks=sinks)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = cpu.paged_attention(*case.args, scale=0.125, window=300, sinks=sinks)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out, expected, **TOLERANCE[torch.float32])


def test_prompt_longer_than_a_segment(naive: Kernels, cpu: Kernels) -> None:
    case = paged_case(
        naive, seed=10, dtype=torch.float32, heads=(2, 1), head_size=64, requests=[(5000, 300)]
    )
    for options in ({}, {"alibi_slopes": torch.tensor([0.01, 0.3])}, {"soft_cap": 5.0}):
        expected = naive.paged_attention(*case.args, scale=0.125, **options)
        out = cpu.paged_attention(*case.args, scale=0.125, **options)
        torch.testing.assert_close(out, expected, atol=4e-6, rtol=1e-5)


def test_extreme_scores_stay_finite(naive: Kernels, cpu: Kernels) -> None:
    case = paged_case(
        naive,
        seed=11,
        dtype=torch.float32,
        heads=(4, 2),
        head_size=64,
        requests=[(100, 1), (300, 200)],
    )
    for scale in (1e-4, 100.0):
        expected = naive.paged_attention(*case.args, scale=scale)
        out = cpu.paged_attention(*case.args, scale=scale)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_batching_and_chunking_hardly_change_float32(naive: Kernels, cpu: Kernels) -> None:
    case = paged_case(
        naive,
        seed=12,
        dtype=torch.float32,
        heads=(9, 3),
        head_size=64,
        requests=[(120, 120), (64, 1)],
    )
    query, key_cache, value_cache, table, lens, _ = case.args
    whole = cpu.paged_attention(*case.args, scale=0.125)[:120]
    for step in (1, 7, 50):
        parts = []
        for start in range(0, 120, step):
            end = min(start + step, 120)
            parts.append(
                cpu.paged_attention(
                    query[start:end],
                    key_cache,
                    value_cache,
                    table[:1],
                    torch.tensor([end], dtype=torch.int32),
                    torch.tensor([0, end - start], dtype=torch.int32),
                    scale=0.125,
                )
            )
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-5)
    assert lens[0] == 120


def test_wrong_kinds_of_tensors_are_refused(naive: Kernels, cpu: Kernels) -> None:
    """Compiled kernels read by address: a wrong dtype must not become a wrong answer."""
    case = paged_case(
        naive, seed=13, dtype=torch.float32, heads=(2, 1), head_size=64, requests=[(20, 1)]
    )
    for index, name in ((3, "block_table"), (4, "seq_lens"), (5, "query_start_loc")):
        args = list(case.args)
        args[index] = args[index].long()
        with pytest.raises(TypeError, match=name):
            cpu.paged_attention(*args, scale=0.1)
    with pytest.raises(TypeError, match="caches"):
        cpu.paged_attention(case.args[0].bfloat16(), *case.args[1:], scale=0.1)
    key = torch.zeros(1, 1, 64)
    with pytest.raises(TypeError, match="slot_mapping"):
        cpu.write_kv(key, key, *case.args[1:3], torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="does not fit"):
        cpu.write_kv(key.view(1, 2, 32), key, *case.args[1:3], torch.zeros(1, dtype=torch.int64))
