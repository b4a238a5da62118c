"""Rows of products with weights that a checkpoint holds quantised, kind by kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch

from device_bench.linear_rows import linear_case, rotated
from device_bench.row import Bench, Case, Row
from stored_weights import STORED
from streamserve_kernels import PackedLinear
from streamserve_kernels.stored import GroupedWeight, StoredWeight, TableWeight

_TOLERANCE = 2e-2
_QUICK = ("gptq 4", "Q4_K")


def _act_order(n: int, k: int) -> StoredWeight:
    weight = STORED["gptq 4"](n, k)
    assert isinstance(weight, GroupedWeight)
    return GroupedWeight(
        weight.codes, weight.bits, weight.scales, weight.zeros, weight.group, torch.randperm(k)
    )


def _tables(n: int, k: int) -> StoredWeight:
    """As SqueezeLLM's: each output's own table, and a few values beside it."""
    count = n * k // 256
    at = torch.randint(n * k, (count,)).unique()
    codes = torch.randint(16, (n, k), dtype=torch.uint8)
    table = (torch.randn(n, 16) / k**0.5).half().float()
    return TableWeight(codes, table, 4, sparse=(at // k, at % k, torch.randn(len(at)) / k**0.5))


KINDS: dict[str, Callable[[int, int], StoredWeight]] = {
    **STORED,
    "gptq 4, act-order": _act_order,
    "a table an output": _tables,
}


def rows(quick: bool) -> list[Row]:
    """Ordered so that a weight is prepared once for all numbers of rows."""
    return [
        Row("stored", f"down {kind}, {count} rows", partial(_build, kind, count))
        for kind in (_QUICK if quick else KINDS)
        for count in (1, 64)
    ]


@lru_cache(maxsize=1)
def _packed(bench: Bench, kind: str) -> list[PackedLinear]:
    stored = KINDS[kind](*bench.sizes.linears()["down"]).to(bench.device)
    return rotated(bench, bench.kernels.prepare_stored(stored, None, bench.dtype))


def _build(kind: str, count: int, bench: Bench) -> Case:
    return linear_case(bench, "down", _packed(bench, kind), count, _TOLERANCE)
