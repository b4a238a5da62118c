"""Quantised linear layers on the CPU: tiles of int8 or int4 weights for AVX512-VNNI or AVX2.

The C side is `linear_quant.c`, which describes the tiles. Beyond what `quantised` says a weight
is, activations are quantised to int8 with one scale per row and 64 inputs: an output differs
from the naive twin's by at most

    sum over groups of 64 inputs of (largest |x| of the group / 254) * (sum of |w| of the group)

and the rounding of a few float32 sums. A row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from streamserve_kernels.fp8 import NaiveFp8Linear, quantise_fp8_weight
from streamserve_kernels.huge_pages import Arena
from streamserve_kernels.interface import QuantLinear
from streamserve_kernels.native.execute import Instruction, pack_step, run_at_once
from streamserve_kernels.native.library import why_not
from streamserve_kernels.native.product import Memory, NativeWeight, Product, as_rows, multiply
from streamserve_kernels.native.stored import prepare_stored
from streamserve_kernels.native.symbol import as_symbol
from streamserve_kernels.pool import pool
from streamserve_kernels.quantised import (
    BITS,
    TILE_INPUTS,
    TILE_OUTPUTS,
    IntegerQuantization,
    NaiveQuantLinear,
    QuantisedWeight,
    Quantization,
)
from streamserve_kernels.stored import Float8Weight

# Bytes of a quantised group of activations: values, scale, two sums.
_GROUP_BYTES = TILE_INPUTS + 12
_TILE_BYTES: dict[IntegerQuantization, int] = {"int8": 1024, "int4": 576}
_DTYPES = (torch.bfloat16, torch.float32)

_arena = Arena()


class NativeQuantLinear(NativeWeight):
    """A quantised weight in tiles; x may be bfloat16, float32 or float16, in rows at any stride."""

    __slots__ = (
        "__weakref__",
        "_scales",
        "_tiles",
        "bias",
        "bits",
        "dtype",
        "groups",
        "in_features",
        "out_features",
        "quantization",
    )

    def __init__(
        self, weight: Tensor, bias: Tensor | None, quantization: IntegerQuantization
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.quantization: Quantization = quantization
        self.bits = BITS[quantization]
        self.bias = None if bias is None else bias.float().contiguous()
        self.groups = -(-self.in_features // TILE_INPUTS)
        tiles = -(-self.out_features // TILE_OUTPUTS)
        self._tiles = _arena.empty((tiles, self.groups, _TILE_BYTES[quantization]), torch.uint8)
        self._scales = torch.empty(tiles * TILE_OUTPUTS) if quantization == "int8" else None
        self._fill(weight)

    def _fill(self, weight: Tensor) -> None:
        """Quantises straight into the tiles: no second copy of the weight in any precision."""
        if weight.dtype not in _DTYPES:
            weight = weight.float()
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        args = (
            weight.data_ptr(),
            weight.stride(0),
            int(weight.dtype == torch.float32),
            self.out_features,
            self.in_features,
            self.bits,
            self._tiles.data_ptr(),
            0 if self._scales is None else self._scales.data_ptr(),
        )
        run_at_once([("pack_quant", args)], pack_step(0), pool().threads())

    @property
    def nbytes(self) -> int:
        parts = (self._tiles, self._scales, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    def unpack(self) -> Tensor:
        return _untile(self._tiles, self._scales, self.in_features)[: self.out_features]

    def rows(self, ids: Tensor) -> Tensor:
        if self.quantization != "int8" or self.dtype not in _DTYPES:
            return self.unpack()[ids].to(self.dtype)
        ids = ids.contiguous()
        out = torch.empty(ids.shape[0], self.in_features, dtype=self.dtype)
        is_float32 = self.dtype == torch.float32
        rows = self.embedding(out.data_ptr(), is_float32=is_float32)
        run_at_once([rows], pack_step(ids.shape[0], 0, 0, 0, ids.data_ptr()), 1)
        return out

    def embedding(self, out: int, *, is_float32: bool = False) -> Instruction:
        if self._scales is None:
            return super().embedding(out)
        tiles, scales = self._tiles.data_ptr(), self._scales.data_ptr()
        args = (out, tiles, scales, self.in_features, int(is_float32), self.out_features)
        return "embedding_quant", args

    def instructions(self, product: Product, memory: Memory) -> list[Instruction]:
        """Rows are quantised, and then multiplied."""
        product = product.with_work(memory, self.groups * _GROUP_BYTES)
        args = (
            *product,
            self._tiles.data_ptr(),
            0 if self._scales is None else self._scales.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            self.out_features,
            self.bits,
        )
        return [("quantise", product), ("linear_quant", args)]

    def __call__(self, x: Tensor) -> Tensor:
        if (symbol := as_symbol(x)) is not None:
            return cast(Tensor, symbol.recorder.linear(symbol, self))
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected rows of {self.in_features}, got {x.shape[-1]}")
        if x.dtype not in _DTYPES:
            return self(x.float()).to(x.dtype)
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        multiply(self, self._tiles.nbytes, as_rows(x), y)
        return y


def _untile(tiled: Tensor, scales: Tensor | None, in_features: int) -> Tensor:
    """The weight [n, K] float32 that tiles hold, the padding of outputs left in place."""
    outputs, groups = tiled.shape[:2]
    rows = outputs * TILE_OUTPUTS
    if scales is not None:
        codes = tiled.view(outputs, groups, 16, TILE_OUTPUTS, 4).permute(0, 3, 1, 2, 4)
        codes = (codes.reshape(rows, -1) - 128).view(torch.int8)
        return QuantisedWeight(codes, scales[:, None], in_features).dequantise()
    both = tiled[..., :512].reshape(outputs, groups, 8, TILE_OUTPUTS, 4)
    codes = torch.stack((both & 15, both >> 4), dim=-2).permute(0, 3, 1, 2, 4, 5)
    codes = (codes.reshape(rows, -1) - 8).view(torch.int8)
    halves = tiled[..., 512:].contiguous().view(torch.float16)
    halves = halves.view(outputs, groups, 2, TILE_OUTPUTS).permute(0, 3, 1, 2)
    return QuantisedWeight(codes, halves.reshape(rows, -1).float(), in_features).dequantise()


def prepare_quantised(
    weight: Tensor, bias: Tensor | None, quantization: Quantization
) -> QuantLinear:
    """See `naive.prepare_quantised`; the naive twin itself where the C kernels cannot run.

    A GPU quantises activations for fp8; here the weight alone is quantised.
    """
    if quantization == "fp8":
        if why_not() is not None:
            return NaiveFp8Linear(weight, bias)
        codes, scales = quantise_fp8_weight(weight)
        return prepare_stored(Float8Weight(codes, scales[:, None]), bias, weight.dtype)
    if why_not() is not None:
        return NaiveQuantLinear(weight, bias, quantization)
    return NativeQuantLinear(weight, bias, quantization)


def slow_quantisation() -> str | None:
    """Why products with quantised weights run in plain torch here, or None."""
    return why_not()
