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
from streamserve_kernels.native.execute import done_flags, double_bits, eager, pack_step
from streamserve_kernels.native.library import why_not
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

# Weight bytes below which one thread is enough.
_PARALLEL_BYTES = 65536
# Most rows that every thread quantises for itself.
_OWN_ROWS = 4
# Bytes of a quantised group of activations: values, scale, two sums.
_GROUP_BYTES = TILE_INPUTS + 12
_LINE = 64
_TILE_BYTES: dict[IntegerQuantization, int] = {"int8": 1024, "int4": 576}
_DTYPES = (torch.bfloat16, torch.float32)

_arena = Arena()


class Scratch:
    """Memory for quantised activations: all rows of a step, and for each thread a few of its own.

    Shared by instructions that run one after the other. Not for two threads at a time.
    """

    def __init__(self, rows: int, groups: int) -> None:
        self.own_stride = -(-_OWN_ROWS * groups * _GROUP_BYTES // _LINE) * _LINE
        self.work = torch.empty(rows * groups * _GROUP_BYTES, dtype=torch.uint8)
        self.own = torch.empty(pool().threads() * self.own_stride, dtype=torch.uint8)
        self.address = self.work.data_ptr()


class NativeQuantLinear:
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
        executable = eager(1)
        executable.set(
            0,
            "pack_quant",
            weight.data_ptr(),
            weight.stride(0),
            int(weight.dtype == torch.float32),
            self.out_features,
            self.in_features,
            self.bits,
            self._tiles.data_ptr(),
            0 if self._scales is None else self._scales.data_ptr(),
        )
        executable.run(pack_step(0), pool().threads())

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
        executable = eager(1)
        executable.set(0, "embedding_quant", *self.embedding_arguments(out.data_ptr()))
        executable.run(pack_step(ids.shape[0], 0, 0, 0, ids.data_ptr()), 1)
        return out

    def embedding_arguments(self, out: int) -> tuple[int, ...]:
        """What `embedding_quant` takes: the address of its result, in `dtype`, and the rows."""
        assert self._scales is not None
        is_float32 = int(self.dtype == torch.float32)
        return (
            out,
            self._tiles.data_ptr(),
            self._scales.data_ptr(),
            self.in_features,
            is_float32,
            self.out_features,
        )

    def arguments(
        self,
        y: int,
        x: int,
        x_stride: int,
        scratch: Scratch | None,
        done: Tensor | None,
        *,
        x_float32: bool = False,
        rows_kind: int = 0,
        is_float32: bool = False,
        best: int = 0,
        scale: float = 1.0,
        cap: float = 0.0,
    ) -> tuple[int, ...]:
        """What `quantise` and then `linear_quant` take: see linear_quant.c.

        `done` are flags that no other instruction of the program has; without them no thread
        quantises rows for itself. `scratch` is given, or its address filled in later.
        """
        return (
            y,
            x,
            x_stride,
            int(x_float32),
            self.in_features,
            rows_kind,
            0 if scratch is None else scratch.address,
            0 if scratch is None else scratch.own.data_ptr(),
            0 if scratch is None else scratch.own_stride,
            0 if done is None else done.data_ptr(),
            self._tiles.data_ptr(),
            0 if self._scales is None else self._scales.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            self.out_features,
            self.bits,
            int(is_float32),
            best,
            double_bits(scale),
            double_bits(cap),
        )

    def __call__(self, x: Tensor) -> Tensor:
        if (symbol := as_symbol(x)) is not None:
            return cast(Tensor, symbol.recorder.linear(symbol, self))
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected rows of {self.in_features}, got {x.shape[-1]}")
        if x.dtype not in _DTYPES:
            return self(x.float()).to(x.dtype)
        rows = x.reshape(-1, self.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        is_float32 = x.dtype == torch.float32
        # Kept until the run is over.
        scratch, done = Scratch(rows.shape[0], self.groups), done_flags()
        args = self.arguments(
            y.data_ptr(),
            rows.data_ptr(),
            rows.stride(0),
            scratch,
            done,
            x_float32=is_float32,
            is_float32=is_float32,
        )
        executable = eager(2)
        executable.set(0, "quantise", *args)
        executable.set(1, "linear_quant", *args)
        threads = 1 if self._tiles.nbytes < _PARALLEL_BYTES else pool().threads()
        executable.run(pack_step(rows.shape[0]), threads)
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
