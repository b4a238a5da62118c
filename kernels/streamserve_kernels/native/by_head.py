"""A product for each head: one instruction for all of them. The C side is in `src/linear.c`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from streamserve_kernels.huge_pages import Arena
from streamserve_kernels.native.execute import Instruction, pack_step, run_at_once
from streamserve_kernels.native.linear import BLOCK, pack_into
from streamserve_kernels.native.symbol import as_symbol
from streamserve_kernels.pool import pool

_arena = Arena()


@dataclass(frozen=True, slots=True, eq=False)
class NativeHeadsLinear:
    """Weights [H, ceil(N / 64), K / 2, 64, 2], each as `NativeLinear` has one of ours."""

    packed: Tensor
    out_features: int

    @property
    def num_heads(self) -> int:
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        return 2 * self.packed.shape[2]

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def instruction(self, y: int, x: int, x_stride: int, num_passed: int) -> Instruction:
        """From rows at x, as wide as what is multiplied and passed on, to adjacent ones at y."""
        sizes = (self.num_heads, self.in_features, num_passed, self.out_features)
        return "by_head", (y, x, x_stride, *sizes, self.packed.data_ptr())

    def __call__(self, x: Tensor) -> Tensor:
        if (symbol := as_symbol(x)) is not None:
            return cast(Tensor, symbol.recorder.by_head(symbol, self))
        num_tokens, num_heads, width = x.shape
        num_passed = width - self.in_features
        if x.dtype != torch.bfloat16 or num_heads != self.num_heads or num_passed < 0:
            raise ValueError(
                f"expected {self.num_heads} heads of {self.in_features} bfloat16 or more, got "
                f"{num_heads} of {width} {x.dtype}"
            )
        if x.stride(2) != 1 or x.stride(1) != width or x.stride(0) % 2 or width % 2:
            raise ValueError("the heads of a token must be adjacent, and of even sizes")
        y = torch.empty(num_tokens, num_heads, num_passed + self.out_features, dtype=x.dtype)
        told = self.instruction(y.data_ptr(), x.data_ptr(), x.stride(0), num_passed)
        run_at_once([told], pack_step(num_tokens), pool().threads())
        return y


def prepare_by_head(weight: Tensor) -> NativeHeadsLinear:
    """Packs weights [H, N, K] bfloat16, of an even K; the caller may release them afterwards."""
    if weight.dtype != torch.bfloat16 or weight.shape[2] % 2:
        raise TypeError(
            f"expected weights of bfloat16 with an even number of inputs, got {weight.shape[2]} of "
            f"{weight.dtype}"
        )
    num_heads, num_outputs, num_inputs = weight.shape
    shape = (num_heads, -(-num_outputs // BLOCK), num_inputs // 2, BLOCK, 2)
    packed = _arena.empty(shape, torch.bfloat16)
    for into, one in zip(packed, weight, strict=True):
        pack_into(into, one)
    return NativeHeadsLinear(packed, num_outputs)
