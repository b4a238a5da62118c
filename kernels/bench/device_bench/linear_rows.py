"""Rows of products with weights, plain and quantised, at few rows and at many."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import cast

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from device_bench.row import Bench, Case, CheckError, Rate, Row, check_close
from device_bench.timing import Call, num_copies
from streamserve_kernels import QUANTIZATIONS, PackedLinear, Quantization

KINDS = ("bf16", *QUANTIZATIONS)
_IN_FP8 = ("gate_up", "down")  # whoever asks for fp8 has the head in int8
_ROWS = (1, 4, 16, 64, 256)
# Of a row's norm. The weight that is compared with is the very one that the codes stand for; what
# is left are the activations, which a kernel may quantise too.
_TOLERANCE = {"bf16": 1e-2, "int8": 2e-2, "int4": 2e-2, "fp8": 6e-2}
_TUNING = "streamserve_kernels.triton.tuning"
_TUNING_S = 8.0
_NAMES = ("qkv", "out", "gate_up", "down", "head")


def rows(quick: bool) -> list[Row]:
    """Ordered so that a weight is prepared once for all numbers of rows."""
    counts = (1, 64) if quick else _ROWS
    names = ("gate_up", "down") if quick else _NAMES
    made = [
        Row("linear", f"{name} {kind}, {count} rows", partial(_build, name, kind, count))
        for name in names
        for kind in (KINDS if quick or name not in _IN_FP8 else (*KINDS, "fp8"))
        for count in counts
    ]
    by_head = [
        Row("linear", f"keys by head, {count} rows", partial(_by_head, count)) for count in (1, 64)
    ]
    return made if quick else made + by_head


def _by_head(count: int, bench: Bench) -> Case:
    """What a layer of latents makes of its queries: heads of 128 to 512, and 64 passed on."""
    sizes = bench.sizes
    heads, size = sizes.heads, sizes.head_size
    weight = bench.randn(heads, 4 * size, size) / size**0.5
    x = bench.randn(count, heads, size + size // 2)
    num_bytes = weight.nbytes + x.nbytes + heads * (4 * size + size // 2) * count * x.itemsize
    first = bench.kernels.prepare_by_head(weight)

    def check() -> None:
        expected = bench.naive.prepare_by_head(weight)(x)
        check_close(first(x), expected, _TOLERANCE["bf16"])

    packed = iter([first])

    def make() -> Call:
        heads_linear = next(packed, None) or bench.kernels.prepare_by_head(weight.clone())
        return lambda: heads_linear(x)

    return Case(
        calls=bench.rotated(make, num_bytes),
        check=check,
        num_bytes=num_bytes,
        flops=2 * count * weight.numel(),
    )


@lru_cache(maxsize=1)
def _packed(bench: Bench, name: str, kind: str) -> list[PackedLinear]:
    n, k = bench.sizes.linears()[name]
    weight = bench.randn(n, k) / k**0.5

    def make() -> PackedLinear:
        if kind == "bf16":
            return bench.kernels.prepare_linear(weight)
        return bench.kernels.prepare_quantised(weight, None, cast(Quantization, kind))

    return rotated(bench, make())


def rotated(bench: Bench, first: PackedLinear) -> list[PackedLinear]:
    """Equal weights at different addresses, together more than the caches hold."""
    copies = num_copies(first.nbytes, bench.rotated_bytes)
    return [first, *(copy.deepcopy(first) for _ in range(copies - 1))]


def _tune(bench: Bench, packed: Sequence[PackedLinear], count: int) -> None:
    """Has the backend choose its kernel for so many rows, as a server does before it is ready."""
    is_triton = bench.kernels.name.startswith("triton")
    if is_triton and importlib.util.find_spec(_TUNING) is not None:
        importlib.import_module(_TUNING).tune(packed, [count], seconds=_TUNING_S)


def _build(name: str, kind: str, count: int, bench: Bench) -> Case:
    rate = "float8" if kind == "fp8" else "bfloat16"
    return linear_case(bench, name, _packed(bench, name, kind), count, _TOLERANCE[kind], rate)


def linear_case(
    bench: Bench,
    name: str,
    packed: Sequence[PackedLinear],
    count: int,
    tolerance: float,
    rate: Rate = "bfloat16",
) -> Case:
    """`count` rows times equal weights of the layer `name` in turn."""
    n, k = bench.sizes.linears()[name]
    _tune(bench, packed, count)
    x = bench.randn(count, k)

    def check() -> None:
        if packed[0].in_features != k or packed[0].out_features != n:
            raise CheckError("the packed weight has another shape")
        expected = F.linear(x.float(), packed[0].unpack().float())
        check_close(bench.kernels.linear(x, packed[0]), expected, tolerance)

    def call(one: PackedLinear) -> Call:
        return lambda: bench.kernels.linear(x, one)

    return Case(
        calls=[call(one) for one in packed],
        check=check,
        num_bytes=packed[0].nbytes + (x.numel() + count * n) * x.dtype.itemsize,
        flops=2 * count * n * k,
        rate=rate,
        peers={"F.linear": partial(_plain, bench, name, x)},
    )


def _plain(bench: Bench, name: str, x: Tensor) -> list[Call]:
    """The product of torch itself, unquantised."""
    n, k = bench.sizes.linears()[name]
    copies = num_copies(n * k * x.dtype.itemsize, bench.rotated_bytes)
    return [partial(F.linear, x, bench.randn(n, k)) for _ in range(copies)]
