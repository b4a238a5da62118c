"""Stored weights of every kind and size, drawn at random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from streamserve_kernels.stored import (
    FactoredNumbers,
    Float8Weight,
    GroupedWeight,
    StoredWeight,
    TableWeight,
)

NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0)
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _codes(n: int, k: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)


def _scales(n: int, k: int, group: int, *, half: bool = True) -> Tensor:
    scales = (torch.rand(n, -(-k // group)) + 0.5) * 0.02
    return scales.half().float() if half else scales


def grouped(bits: int, group: int, zeros: str, *, half: bool = True) -> Callable[..., StoredWeight]:
    """Zeros are one for `all`, one a `group`, or the group's `minimum` stands in their place."""

    def make(n: int, k: int) -> StoredWeight:
        size = group or k
        scales = _scales(n, k, size, half=half)
        if zeros == "minimum":
            minimums = scales * torch.randint(0, 2**bits, scales.shape)
            return GroupedWeight(_codes(n, k, bits), bits, scales, None, size, None, minimums)
        zero: Tensor | float = 2.0 ** (bits - 1)
        if zeros == "group":
            zero = torch.randint(0, 2**bits + 1, scales.shape).float()
        return GroupedWeight(_codes(n, k, bits), bits, scales, zero, size)

    return make


def act_order(n: int, k: int) -> StoredWeight:
    plain = grouped(4, 32, "group")(n, k)
    assert isinstance(plain, GroupedWeight)
    inputs = torch.randperm(k)
    return GroupedWeight(plain.codes, 4, plain.scales, plain.zeros, plain.group, inputs)


def _factored(n: int, count: int, per: int, low: int, high: int) -> FactoredNumbers:
    codes = torch.randint(low, high, (n, count), dtype=torch.int8)
    units = (torch.rand(n, -(-count // per)) * 1e-3).half().float()
    return FactoredNumbers(codes, units, per)


def q4_k(n: int, k: int, per: int = 8) -> StoredWeight:
    """As GGUF's Q4_K: 32 inputs share a 6-bit scale and minimum, 256 the units of both."""
    count = -(-k // 32)
    minimums = _factored(n, count, per, 0, 64)
    return GroupedWeight(
        _codes(n, k, 4), 4, _factored(n, count, per, 0, 64), None, 32, None, minimums
    )


def q6_k(n: int, k: int) -> StoredWeight:
    """As GGUF's Q6_K: 16 inputs share an 8-bit scale, 256 its unit."""
    count = -(-k // 16)
    return GroupedWeight(_codes(n, k, 6), 6, _factored(n, count, 16, -128, 128), 32.0, 16)


def nf4(n: int, k: int) -> StoredWeight:
    scales = _scales(n, k, 64, half=False)
    return TableWeight(_codes(n, k, 4), torch.tensor([NF4]), 4, scales, 64)


def mxfp4(n: int, k: int) -> StoredWeight:
    scales = 2.0 ** torch.randint(-8, -2, (n, -(-k // 32)))
    return TableWeight(_codes(n, k, 4), torch.tensor([MXFP4]), 4, scales, 32)


def squeezed(bits: int, *, sparse: bool) -> Callable[..., StoredWeight]:
    def make(n: int, k: int) -> StoredWeight:
        table = (torch.randn(n, 2**bits) * 0.05).half().float()
        beside = None
        if sparse:
            count = max(1, n * k // 200)
            at = torch.randperm(n * k)[:count]
            beside = at // k, at % k, torch.randn(count)
        return TableWeight(_codes(n, k, bits), table, bits, sparse=beside)

    return make


def float8(scales: str) -> Callable[..., StoredWeight]:
    def make(n: int, k: int) -> StoredWeight:
        values = (torch.randn(n, k) * 4).to(torch.float8_e4m3fn)
        values[0, 0] = 2.0**-9  # the smallest there is
        shapes = {"rows": (n, 1), "one": (1, 1), "blocks": (-(-n // 128), -(-k // 128))}
        numbers = torch.rand(shapes[scales]) * 0.01
        return Float8Weight(values, numbers, (128, 128) if scales == "blocks" else None)

    return make


CASES: dict[str, Callable[[int, int], StoredWeight]] = {
    "gptq2": grouped(2, 64, "group"),
    "gptq3": grouped(3, 128, "group"),
    "gptq4": grouped(4, 128, "group"),
    "gptq4-symmetric": grouped(4, 128, "all"),
    "gptq4-rows": grouped(4, 0, "group"),
    "gptq8": grouped(8, 32, "group"),
    "act-order": act_order,
    "q4_0": grouped(4, 32, "all"),
    "q4_1": grouped(4, 32, "minimum"),
    "q5_0": grouped(5, 32, "all"),
    "q8_0": grouped(8, 32, "all"),
    "int8-float32": grouped(8, 0, "all", half=False),
    "q4_k": q4_k,
    "q6_k": q6_k,
    "nf4": nf4,
    "mxfp4": mxfp4,
    "squeezed4": squeezed(4, sparse=False),
    "squeezed3": squeezed(3, sparse=True),
    "fp8-rows": float8("rows"),
    "fp8-one": float8("one"),
    "fp8-blocks": float8("blocks"),
}
