"""Linear layers on the CPU: bfloat16 weights prepacked for oneDNN, everything else as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from streamserve_kernels.cpu.linear_few import LAYOUT, UNROLL, few_rows_body, packed_width
from streamserve_kernels.cpu.ops import gated_activation
from streamserve_kernels.cpu.pool import pool
from streamserve_kernels.interface import GatedKind, PackedLinear
from streamserve_kernels.naive import NaiveLinear

# oneDNN chooses a layout for a number of rows; the one for 64 costs nothing at few rows and, unlike
# the one for 1, is not reordered again at every call with many.
PACKED_FOR_ROWS = 64
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
            y: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.packed, self.bias, "none", [], ""
            )
            return y
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
    weight = weight.contiguous()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
    out_features, in_features = weight.shape
    bias = None if bias is None else bias.to(torch.bfloat16).contiguous()
    width = packed_width(packed, weight) if in_features % (2 * UNROLL) == 0 else None
    address = 0 if width is None else int(torch.ops.mkldnn.data_ptr(packed))
    if width is not None:
        for row_tile in (1, 4):
            few_rows_kernel(row_tile, width)
    return OneDnnLinear(packed, bias, out_features, in_features, width, address)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """Computes x [..., K] @ weightᵀ + bias -> [..., N]."""
    return packed(x)


def moe(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    top_k: int,
    renormalise: bool,
    kind: GatedKind,
) -> Tensor:
    """See `naive.moe`: visits only the experts that some token chose."""
    weights, chosen = torch.softmax(router_logits.float(), dim=-1).topk(top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    output = torch.zeros(x.shape, dtype=torch.float32)
    # tokens sorted by expert: each expert's rows are one slice
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(gate_up)).tolist()
    start = 0
    for e, count in enumerate(counts):
        if count == 0:
            continue
        slots = order[start : start + count]
        start += count
        rows = slots // top_k
        hidden = gated_activation(linear(x[rows], gate_up[e]), kind)
        part = linear(hidden, down[e]).float() * weights.flatten()[slots, None]
        output.index_add_(0, rows, part)
    return output.to(x.dtype)
