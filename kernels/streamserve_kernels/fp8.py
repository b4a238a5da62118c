"""What an fp8 product is: weights and activations in float8_e4m3fn, each row with a scale.

A row's scale is its largest magnitude over 448, the largest number of the format; codes are the row
times 448 over that magnitude, rounded to the nearest. Activations are quantised at every call, a
row (token) at a time, so a row's result does not depend on its batch. Codes are multiplied exactly
and summed in float32; the sum is multiplied by both scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamserve_kernels.quantised import Quantization

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# Weights that are quantised at a time.
_SLICE_ELEMENTS = 2**22


def quantise_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, K], any float dtype -> codes [R, K] float8_e4m3fn, scales [R] float32."""
    x = x.float()
    largest = x.abs().amax(-1)
    # A row of zeros has any scale; one that is no number stays none.
    largest = torch.where(largest == 0.0, 1.0, largest)
    # A number over a tensor would be its reciprocal times the number: rounded twice.
    steps = torch.full_like(largest, FP8_MAX) / largest
    codes = (x * steps[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return codes, largest / FP8_MAX


def quantise_fp8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same some rows at a time: float32 copies of a large weight would not fit beside it."""
    codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scales = torch.empty(weight.shape[0], device=weight.device)
    rows = max(1, _SLICE_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        some = slice(start, start + rows)
        codes[some], scales[some] = quantise_fp8(weight[some])
    return codes, scales


class NaiveFp8Linear:
    """Codes as they are; every call makes float32 of the whole weight."""

    __slots__ = ("bias", "codes", "dtype", "in_features", "out_features", "scales")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = bias
        self.codes, self.scales = quantise_fp8_weight(weight)

    @property
    def quantization(self) -> Quantization:
        return "fp8"

    @property
    def nbytes(self) -> int:
        bias_bytes = 0 if self.bias is None else self.bias.nbytes
        return self.codes.nbytes + self.scales.nbytes + bias_bytes

    def unpack(self) -> Tensor:
        """The weight [N, K] float32 that the codes stand for."""
        return self.codes.float() * self.scales[:, None]

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] of the weight -> [T, K] in `dtype`."""
        # Not every device indexes float8; bytes they all do.
        codes = self.codes.view(torch.uint8)[ids].view(FP8).float()
        return (codes * self.scales[ids, None]).to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        codes, scales = quantise_fp8(x.reshape(-1, self.in_features))
        y = codes.float() @ self.codes.float().T * (scales[:, None] * self.scales)
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)
