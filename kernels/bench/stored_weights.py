"""Random weights of the kinds that checkpoints hold, for the benches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from streamserve_kernels.stored import (
    FactoredNumbers,
    Float8Weight,
    GroupedWeight,
    StoredWeight,
    TableWeight,
)


def _codes(n: int, k: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)


def _scales(n: int, k: int, group: int) -> torch.Tensor:
    return (torch.rand(n, k // group) / k**0.5).half().float()


def _factored(n: int, count: int, per: int) -> FactoredNumbers:
    codes = torch.randint(0, 64, (n, count), dtype=torch.int8)
    return FactoredNumbers(codes, (torch.rand(n, -(-count // per)) / 4096).half().float(), per)


def _gptq(n: int, k: int, bits: int) -> StoredWeight:
    scales = _scales(n, k, 128)
    zeros = torch.randint(1, 2**bits, scales.shape).float()
    return GroupedWeight(_codes(n, k, bits), bits, scales, zeros, 128)


def _q4_k(n: int, k: int) -> StoredWeight:
    scales, minimums = (_factored(n, k // 32, 8) for _ in range(2))
    return GroupedWeight(_codes(n, k, 4), 4, scales, None, 32, None, minimums)


STORED: dict[str, Callable[[int, int], StoredWeight]] = {
    "gptq 3": lambda n, k: _gptq(n, k, 3),
    "gptq 4": lambda n, k: _gptq(n, k, 4),
    "Q4_0": lambda n, k: GroupedWeight(_codes(n, k, 4), 4, _scales(n, k, 32), 8.0, 32),
    "Q4_K": _q4_k,
    "Q6_K": lambda n, k: GroupedWeight(_codes(n, k, 6), 6, _factored(n, k // 16, 16), 32.0, 16),
    "Q8_0": lambda n, k: GroupedWeight(_codes(n, k, 8), 8, _scales(n, k, 32), 128.0, 32),
    "NF4": lambda n, k: TableWeight(
        _codes(n, k, 4), torch.linspace(-1, 1, 16)[None], 4, _scales(n, k, 64), 64
    ),
    "fp8": lambda n, k: Float8Weight(
        torch.randn(n, k).to(torch.float8_e4m3fn), torch.rand(n, 1) / k**0.5
    ),
}
