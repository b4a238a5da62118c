"""Linear layers on the CPU: bfloat16 weights prepacked for oneDNN, everything else as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamserve_kernels.cpu.ops import gated_activation
from streamserve_kernels.interface import GatedKind, PackedLinear
from streamserve_kernels.naive import NaiveLinear


@dataclass(frozen=True, slots=True)
class OneDnnLinear:
    """A bfloat16 weight in oneDNN's blocked layout: no reorder on each call."""

    packed: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int

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
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def prepare_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Packs weight [N, K]; the caller may release it afterwards."""
    if weight.dtype == torch.bfloat16 and torch._C._has_mkldnn:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        return OneDnnLinear(packed, bias, weight.shape[0], weight.shape[1])
    return NaiveLinear(weight, bias)


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
