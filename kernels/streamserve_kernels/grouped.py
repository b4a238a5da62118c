"""Weights that were quantised elsewhere: AWQ's and GPTQ's layouts, and the naive product.

Both store `(code - zero) * scale` with unsigned codes of 4 (GPTQ: or 8) bits, float16 scales and
integer zero points that a group of inputs shares (Lin et al. 2023, Frantar et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from streamserve_kernels.quantised import Quantization

# Place in a word of AWQ -> the output among eight that lies there.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """Codes [N, K] uint8, scales [N, G] float16 and zeros [N, G] int16 of G groups of inputs.

    Input `columns[i]` ([K] int64) of the layer is input i of the weight; None: they are the same.
    Groups are runs of `group_size` of the weight's inputs.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    bits: int
    columns: Tensor | None = None

    def dequantise(self) -> Tensor:
        """The weight [N, K] float32, inputs in the layer's order."""
        group = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size
        codes = self.codes.to(torch.int16) - self.zeros[:, group]
        weight: Tensor = codes.float() * self.scales.float()[:, group]
        if self.columns is None:
            return weight
        ordered: Tensor = torch.empty_like(weight)
        ordered[:, self.columns] = weight
        return ordered


def _fields(words: Tensor, bits: int) -> Tensor:
    """Words [A, B] int32 -> their fields [A, B, 32 / bits] uint8, lowest first."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    fields: Tensor = (words[..., None] >> shifts) & (2**bits - 1)
    return fields.to(torch.uint8)


def unpack_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> GroupedWeight:
    """AWQ: qweight [K, N / 8] and qzeros [G, N / 8] int32, scales [G, N] float16.

    A word holds eight adjacent outputs in the order `AWQ_ORDER`. `group_size` -1 is the whole row.
    """
    in_features = qweight.shape[0]
    group_size = in_features if group_size == -1 else group_size
    if scales.shape[0] * group_size != in_features:
        raise ValueError(f"{scales.shape[0]} groups of {group_size} are not {in_features} inputs")
    place = torch.tensor(AWQ_ORDER, device=qweight.device).argsort()
    codes = _fields(qweight, 4)[..., place].flatten(-2)
    zeros = _fields(qzeros, 4)[..., place].flatten(-2)
    return GroupedWeight(
        codes.t().contiguous(), scales.t(), zeros.t().to(torch.int16), group_size, bits=4
    )


def unpack_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    bits: int = 4,
    zero_offset: int = 1,
) -> GroupedWeight:
    """GPTQ: qweight [K·bits / 32, N] and qzeros [G, N·bits / 32] int32, scales [G, N] float16.

    Words hold adjacent inputs (of qzeros: outputs), lowest first. What is stored is the zero point
    less `zero_offset`: 1, or 0 in version 2 of the format. `g_idx` [K] is each input's group, where
    inputs were quantised in another order than they are stored in ("act-order").
    """
    if bits not in (4, 8):
        raise ValueError(f"GPTQ weights of 4 or 8 bits are known, not of {bits}")
    codes = _fields(qweight, bits).permute(1, 0, 2).flatten(1)
    zeros = _fields(qzeros, bits).flatten(1).t().to(torch.int16) + zero_offset
    in_features, groups = codes.shape[1], scales.shape[0]
    group_size = -(-in_features // groups)
    columns = None
    if g_idx is not None:
        columns = g_idx.long().argsort(stable=True)
        in_order = torch.arange(in_features, device=g_idx.device)
        if not g_idx[columns].equal((in_order // group_size).to(g_idx.dtype)):
            raise ValueError(f"g_idx does not make {groups} groups of {group_size} inputs")
        if columns.equal(in_order):
            columns = None
        else:
            codes = codes[:, columns]
    return GroupedWeight(codes.contiguous(), scales.t(), zeros, group_size, bits, columns)


class NaiveGroupedLinear:
    """The product in float32 of a weight that is dequantised at every call."""

    __slots__ = ("bias", "dtype", "weight")

    def __init__(
        self, weight: GroupedWeight, bias: Tensor | None, dtype: torch.dtype = torch.float16
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.dtype = dtype

    @property
    def quantization(self) -> Quantization:
        return "int4" if self.weight.bits == 4 else "int8"

    @property
    def out_features(self) -> int:
        return self.weight.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.codes.shape[1]

    @property
    def nbytes(self) -> int:
        weight = self.weight
        parts = (weight.codes, weight.scales, weight.zeros, weight.columns, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    def unpack(self) -> Tensor:
        return self.weight.dequantise()

    def rows(self, ids: Tensor) -> Tensor:
        return self.unpack()[ids].to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.unpack(), bias).to(x.dtype)
