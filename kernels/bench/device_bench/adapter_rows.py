"""Rows of low-rank adapters: what they take beside a product, whose own time is their peer."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from device_bench.row import Bench, Case, Row, check_close, check_equal, tolerance
from device_bench.timing import Call
from streamserve_kernels import Kernels
from streamserve_kernels.adapters import AdapterRows, AdapterTable

_SLOTS = 4
_RANK = 16
_NOBODY = 0


def rows(quick: bool) -> list[Row]:
    """`gate_up` is two products of the checkpoint: two pairs of matrices of that rank."""
    counts = (64,) if quick else (1, 64, 2048)
    return [
        Row("adapters", f"gate_up, {count} rows of {owners}", partial(_build, count, owners))
        for count in counts
        for owners in (_NOBODY, 1, _SLOTS)
    ]


def _build(count: int, owners: int, bench: Bench) -> Case:
    n, k = bench.sizes.linears()["gate_up"]
    count = bench.sizes.tokens(count)
    whose = np.arange(count, dtype=np.int32) % owners if owners else np.full(count, -1, np.int32)
    mine = AdapterRows.of(whose, bench.device, _SLOTS)
    rank = 2 * _RANK
    matrices = [(bench.randn(rank, k) / k**0.5, bench.randn(n, rank)) for _ in range(_SLOTS)]

    def table(kernels: Kernels) -> AdapterTable:
        made = kernels.AdapterTable(_SLOTS, n, k, bench.dtype, bench.device, rank)
        for slot, pair in enumerate(matrices):
            made.set(slot, *pair)
        return made

    def make() -> Call:
        y, x = bench.randn(count, n), bench.randn(count, k)
        return partial(bench.kernels.add_adapters, y, x, table(bench.kernels), mine)

    def check() -> None:
        y, x = bench.randn(count, n), bench.randn(count, k)
        found = bench.kernels.add_adapters(y.clone(), x, table(bench.kernels), mine)
        if not owners:
            check_equal(found, y)
        expected = bench.naive.add_adapters(y.clone(), x, table(bench.naive), mine)
        check_close(found, expected, tolerance(bench.dtype))

    used = min(owners, count)
    size = bench.dtype.itemsize
    num_bytes = (used * rank * (n + k) + (count * (k + 2 * n) if used else 0)) * size
    return Case(
        calls=bench.rotated(make, num_bytes or 1.0),
        check=check,
        num_bytes=num_bytes or 1.0,
        flops=2.0 * count * rank * (n + k) if used else 0.0,
        peers={"the product": lambda: bench.rotated(lambda: _product(bench, count), n * k * size)},
    )


def _product(bench: Bench, count: int) -> Call:
    n, k = bench.sizes.linears()["gate_up"]
    x: Tensor = bench.randn(count, k)
    return partial(F.linear, x, bench.randn(n, k))
