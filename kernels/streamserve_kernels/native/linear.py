"""Linear layers: bfloat16 weights in blocks of 64 outputs, multiplied by `linear.c`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from streamserve_kernels import onednn
from streamserve_kernels.huge_pages import Arena
from streamserve_kernels.interface import NotRecordableError, PackedLinear
from streamserve_kernels.native.execute import Instruction
from streamserve_kernels.native.library import has_matrix_units
from streamserve_kernels.native.product import Memory, NativeWeight, Product, as_rows, multiply
from streamserve_kernels.native.symbol import as_symbol

BLOCK = 64
# On a CPU with matrix units: rows from which on they are faster than the dot-product units.
FEW_ROWS = 8

_arena = Arena()


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class NativeLinear(NativeWeight):
    """Weight [ceil(N / 64), Kp / 2, 64, 2]: two neighbours in k of one output side by side.

    `packed` is ours, or oneDNN's tensor of the same layout on a CPU with matrix units: oneDNN then
    multiplies more than `few_rows` rows.
    """

    packed: Tensor
    address: int
    padded: int  # Kp
    few_rows: int | None
    bias: Tensor | None
    out_features: int
    in_features: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def nbytes(self) -> int:
        blocks = -(-self.out_features // BLOCK)
        bias_bytes = 0 if self.bias is None else self.bias.nbytes
        return 2 * blocks * BLOCK * self.padded + bias_bytes

    def unpack(self) -> Tensor:
        if self.few_rows is not None:
            return self.packed.to_dense()
        rows = self.packed.transpose(1, 2).reshape(-1, self.padded)
        return rows[: self.out_features, : self.in_features].contiguous()

    def instructions(self, product: Product, memory: Memory) -> list[Instruction]:
        """`linear` alone. Raises NotRecordableError for rows that are not padded to an even K."""
        if product.inputs % 2:
            raise NotRecordableError(f"a product with rows of {product.inputs} bfloat16")
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return [("linear", (*product, self.address, bias, self.out_features, self.padded))]

    def __call__(self, x: Tensor) -> Tensor:
        if (symbol := as_symbol(x)) is not None:
            return cast(Tensor, symbol.recorder.linear(symbol, self))
        if x.dtype != torch.bfloat16 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected rows of {self.in_features} bfloat16, got {x.shape[-1]} of {x.dtype}"
            )
        rows = as_rows(x)
        if self.few_rows is not None and rows.shape[0] > self.few_rows:
            return onednn.linear(x, self.packed, self.bias)
        if self.in_features % 2:
            rows = torch.nn.functional.pad(rows, (0, 1))
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=torch.bfloat16)
        multiply(self, self.nbytes, rows, y)
        return y


def prepare_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Packs weight [N, K] bfloat16; the caller may release it afterwards."""
    if weight.dtype != torch.bfloat16:
        raise TypeError(f"the native kernels take bfloat16 weights, got {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"a bias of {tuple(bias.shape)} for {weight.shape[0]} outputs")
    if bias is not None:
        bias = bias.to(torch.bfloat16).contiguous()
    if has_matrix_units():
        packed = onednn.pack(weight)
        if onednn.packed_width(packed, weight) == BLOCK and weight.shape[1] % 2 == 0:
            padded = -(-weight.shape[1] // 32) * 32
            address = onednn.address(packed)
            return NativeLinear(packed, address, padded, FEW_ROWS, bias, *weight.shape)
    packed = _pack(weight)
    return NativeLinear(packed, packed.data_ptr(), 2 * packed.shape[1], None, bias, *weight.shape)


def _pack(weight: Tensor) -> Tensor:
    out_features, in_features = weight.shape
    shape = (-(-out_features // BLOCK), -(-in_features // 2), BLOCK, 2)
    packed = _arena.empty(shape, torch.bfloat16)
    pack_into(packed, weight)
    return packed


def pack_into(packed: Tensor, weight: Tensor) -> None:
    """Writes a weight [N, K] into zeros [ceil(N / 64), ceil(K / 2), 64, 2]."""
    out_features, in_features = weight.shape
    blocks, pairs = packed.shape[:2]
    whole = out_features // BLOCK
    if in_features % 2:
        weight = torch.nn.functional.pad(weight, (0, 1))
    lanes = weight.contiguous().view(out_features, pairs, 2)
    packed[:whole] = lanes[: whole * BLOCK].view(whole, BLOCK, pairs, 2).transpose(1, 2)
    if whole < blocks:
        packed[whole, :, : out_features - whole * BLOCK] = lanes[whole * BLOCK :].transpose(0, 1)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """Computes x [..., K] @ weightᵀ + bias -> [..., N]."""
    return packed(x)
