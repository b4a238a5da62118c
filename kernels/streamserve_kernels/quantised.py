"""What a quantised weight is, and the naive twin of every product with one.

A weight [N, K] becomes small integer *codes* and float32 *scales*; `codes * scale` is the weight
from then on:

    int8    codes -128..127, one scale per output (row)
    int4    codes -8..7, one float16 scale per output and 32 inputs; 4.5 bits a weight

The scale is the smallest with which every weight of its row or group lies within half a step of a
code. The code furthest from zero is a negative one, so a scale takes the sign that gives this code
to the larger extreme.

The third kind, `fp8`, has a module of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

IntegerQuantization = Literal["int8", "int4"]
Quantization = Literal["int8", "int4", "fp8"]
# Of integers: what every backend quantises bit for bit alike.
QUANTIZATIONS: tuple[IntegerQuantization, ...] = get_args(IntegerQuantization)
BITS: dict[IntegerQuantization, int] = {"int8": 8, "int4": 4}
INT4_GROUP = 32
# Inputs are padded to whole tiles of the compiled kernels; int4's groups divide them.
TILE_INPUTS = 64
TILE_OUTPUTS = 16
# Outputs and inputs of an fp8 weight are padded to whole multiples, which matrix units ask for; a
# CPU's blocks are of more outputs.
FP8_TILE = 16
FP8_BLOCK = 64
# Elements that are quantised at a time: float32 copies of a large weight would not fit beside it.
_SLICE_ELEMENTS = 2**22


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """Codes [N, Kp] int8, zeros past K, and scales [N, Kp / group] float32; int8 has one group.

    `Kp` is K rounded up to a multiple of `TILE_INPUTS`. int4's scales are float16 values.
    """

    codes: Tensor
    scales: Tensor
    in_features: int

    def dequantise(self) -> Tensor:
        """The weight [N, K] float32."""
        groups = self.codes.view(*self.scales.shape, -1)
        weight = (groups.float() * self.scales[..., None]).view(self.codes.shape)
        return weight[:, : self.in_features]


def quantise(weight: Tensor, quantization: IntegerQuantization) -> QuantisedWeight:
    """Weight [N, K], any float dtype -> its codes and scales. Weights must be finite."""
    out_features, in_features = weight.shape
    padded = -(-in_features // TILE_INPUTS) * TILE_INPUTS
    group = padded if quantization == "int8" else INT4_GROUP
    codes = torch.empty(out_features, padded, dtype=torch.int8, device=weight.device)
    scales = torch.empty(out_features, padded // group, device=weight.device)
    rows = max(1, _SLICE_ELEMENTS // padded)
    for start in range(0, out_features, rows):
        part = F.pad(weight[start : start + rows].float(), (0, padded - in_features))
        groups = part.view(part.shape[0], -1, group)
        scale = _smallest_scale(groups, quantization)
        scales[start : start + rows] = scale
        steps = groups.mul_(torch.where(scale == 0.0, 0.0, 1.0 / scale)[..., None])
        half = 2 ** (BITS[quantization] - 1)
        codes[start : start + rows] = steps.round_().clamp_(-half, half - 1).view(part.shape)
    return QuantisedWeight(codes, scales, in_features)


def _smallest_scale(groups: Tensor, quantization: IntegerQuantization) -> Tensor:
    """Groups [n, G, group] -> scales [n, G]: no weight is further than half a step from a code.

    Codes reach from -h to h - 1, so with half a step on either side they cover 2·h steps: h + 0.5
    on the negative side, h - 0.5 on the other.
    """
    low, high = torch.aminmax(groups, dim=-1)
    below, above = low.clamp(max=0.0).neg(), high.clamp(min=0.0)
    half = 2 ** (BITS[quantization] - 1)
    larger, smaller = torch.maximum(below, above), torch.minimum(below, above)
    step = torch.maximum(larger / (half + 0.5), smaller / (half - 0.5))
    if quantization == "int4":
        narrow = step.half()
        # Rounded up: the next float16 is the next integer.
        too_small = (narrow.float() < step).to(torch.int16)
        step = (narrow.view(torch.int16) + too_small).view(torch.float16).float()
    return torch.where(above > below, -step, step)


def packed_bytes(quantization: Quantization, out_features: int, in_features: int) -> int:
    """Bytes that a quantised weight takes, padding included."""
    if quantization == "fp8":
        outputs = -(-out_features // FP8_BLOCK) * FP8_BLOCK
        inputs = -(-in_features // FP8_TILE) * FP8_TILE
        return outputs * (inputs + torch.float32.itemsize)
    outputs = -(-out_features // TILE_OUTPUTS) * TILE_OUTPUTS
    inputs = -(-in_features // TILE_INPUTS) * TILE_INPUTS
    if quantization == "int8":
        return outputs * (inputs + torch.float32.itemsize)
    return outputs * inputs // 2 + outputs * inputs // INT4_GROUP * torch.float16.itemsize


class NaiveQuantLinear:
    """Codes as they are (int4: two in a byte); every call dequantises the whole weight.

    The product is taken in float32 and rounded once, to the dtype of x.
    """

    __slots__ = (
        "_codes",
        "_scales",
        "bias",
        "dtype",
        "in_features",
        "out_features",
        "quantization",
    )

    def __init__(
        self, weight: Tensor, bias: Tensor | None, quantization: IntegerQuantization
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = bias
        self.quantization: Quantization = quantization
        quantised = quantise(weight, quantization)
        if quantization == "int8":
            self._codes, self._scales = quantised.codes, quantised.scales
        else:
            low, high = (quantised.codes & 15).view(self.out_features, -1, 2).unbind(-1)
            self._codes, self._scales = low | (high << 4), quantised.scales.half()

    @property
    def nbytes(self) -> int:
        bias_bytes = 0 if self.bias is None else self.bias.nbytes
        return self._codes.nbytes + self._scales.nbytes + bias_bytes

    def _rows(self, codes: Tensor, scales: Tensor) -> Tensor:
        if self.quantization == "int4":
            # An arithmetic shift brings the sign back.
            codes = torch.stack((codes << 4 >> 4, codes >> 4), dim=-1).flatten(-2)
        return QuantisedWeight(codes, scales.float(), self.in_features).dequantise()

    def unpack(self) -> Tensor:
        """The weight [N, K] float32 that the codes stand for."""
        return self._rows(self._codes, self._scales)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] of the weight -> [T, K] in `dtype`: a tied embedding."""
        return self._rows(self._codes[ids], self._scales[ids]).to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.unpack(), bias).to(x.dtype)
