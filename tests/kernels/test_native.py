"""The native backend against the naive twin, in bfloat16: ragged, poisoned, on any threads."""

from __future__ import annotations

import pytest
import torch

from streamserve_kernels import Kernels, load
from streamserve_kernels.native.library import why_not
from tests.kernels.conftest import TOLERANCE, Paged, paged_case
from tests.kernels.test_paged_attention import DECODES, FEATURES, MIXED, features

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def native() -> Kernels:
    return load("cpu", "native")


def native_args(native: Kernels, case: Paged) -> tuple[torch.Tensor, ...]:
    """The arguments of a case with its caches in the native order; unused slots hold NaN."""
    query, key_cache, value_cache, table, lens, starts = case.args
    key, value = (torch.full_like(cache, float("nan")) for cache in (key_cache, value_cache))
    size = key_cache.shape[2]
    for r, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        j = torch.arange(keys.shape[0])
        native.write_kv(keys, values, key, value, table[r, j // size].long() * size + j % size)
    return query, key, value, table, lens, starts


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("requests", [DECODES, MIXED], ids=["decode", "mixed"])
def test_attention_is_naive(
    naive: Kernels, native: Kernels, kind: str, requests: list[tuple[int, int]], threads: int
) -> None:
    case = paged_case(
        naive,
        seed=5,
        dtype=BF16,
        heads=(9, 3),
        head_size=64,
        block_size=16,
        requests=requests,
        padding_rows=3,
    )
    options = features(kind, 9)
    expected = naive.paged_attention(*case.args, scale=0.125, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = native.paged_attention(*native_args(native, case), scale=0.125, **options)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out, expected, **TOLERANCE[BF16])
