"""Linear layers on the CPU: bfloat16 weights prepacked for oneDNN, everything else as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from streamserve_kernels import onednn
from streamserve_kernels.cpu.linear_few import LAYOUT, UNROLL, few_rows_body
from streamserve_kernels.interface import PackedLinear
from streamserve_kernels.naive import NaiveLinear
from streamserve_kernels.pool import pool

# Most rows for the compiled kernel: one pass over the weight. From 5 rows on, oneDNN's matrix units
# win (one core, 3072 x 576: 1.25x faster at 1 row, 1.12x at 4, 0.77x at 6).
FEW_ROWS = 4
# Weight bytes below which one thread is enough.
PARALLEL_BYTES = 65536


@lru_cache(maxsize=16)
def few_rows_kernel(row_tile: int, width: int) -> Callable[..., None]:
    return pool().kernel(few_rows_body(row_tile, width), LAYOUT)


@dataclass(frozen=True, slots=True)
class OneDnnLinear:
    """A bfloat16 weight in oneDNN's blocked layout: no reorder on each call.

    `width` is the width of a block where the layout is the one that `linear_few` reads, else None.
    """

    packed: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int
    width: int | None
    address: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def nbytes(self) -> int:
        weight_bytes = 2 * self.out_features * self.in_features
        return weight_bytes + (0 if self.bias is None else self.bias.nbytes)

    def unpack(self) -> Tensor:
        return self.packed.to_dense()

    def __call__(self, x: Tensor) -> Tensor:
        width, rows = self.width, x.shape[0]
        if width is None or x.dim() != 2 or not 0 < rows <= FEW_ROWS or x.stride(1) != 1:
            return onednn.linear(x, self.packed, self.bias)
        out_features, in_features = self.out_features, self.in_features
        if x.shape[1] != in_features or x.dtype != torch.bfloat16:
            raise ValueError(
                f"expected rows of {in_features} bfloat16, got {x.shape[1]} of {x.dtype}"
            )
        y = torch.empty(rows, out_features, dtype=torch.bfloat16)
        threads = 1 if out_features * in_features * 2 < PARALLEL_BYTES else pool().threads()
        few_rows_kernel(1 if rows == 1 else 4, width)(
            threads,
            y.data_ptr(),
            x.data_ptr(),
            self.address,
            0 if self.bias is None else self.bias.data_ptr(),
            rows,
            out_features,
            in_features,
            -(-in_features // 32) * 32,
            x.stride(0),
        )
        return y


def prepare_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Packs weight [N, K]; the caller may release it afterwards."""
    if weight.dtype != torch.bfloat16 or not torch._C._has_mkldnn:
        return NaiveLinear(weight, bias)
    packed = onednn.pack(weight)
    out_features, in_features = weight.shape
    bias = None if bias is None else bias.to(torch.bfloat16).contiguous()
    width = onednn.packed_width(packed, weight) if in_features % (2 * UNROLL) == 0 else None
    address = 0 if width is None else onednn.address(packed)
    if width is not None:
        for row_tile in (1, 4):
            few_rows_kernel(row_tile, width)
    return OneDnnLinear(packed, bias, out_features, in_features, width, address)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """Computes x [..., K] @ weightᵀ + bias -> [..., N]."""
    return packed(x)
