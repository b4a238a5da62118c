"""Linear layers on the GPU: which kernel multiplies how many rows, and what the weights look like.

Unquantised weights stay row-major, as they were given. Few rows are a matter of reading the weight
once (`gemv`), and so are tens (`split`); many are cuBLAS's. Integer weights are held as `packed`
describes and dequantised in registers up to a few hundred rows, past that piece by piece into a
scratch for cuBLAS.

Every launch is fit for CUDA graphs: its shape depends on shapes alone. Which of the candidates is
best for a shape, `tuning.tune` measures before any graph is captured; without it the first is used.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from streamserve_kernels.interface import PackedLinear, QuantLinear
from streamserve_kernels.quantised import Quantization, quantise
from streamserve_kernels.triton.fp8 import Fp8Linear
from streamserve_kernels.triton.gemv import ALIGNMENT, gemv, skinny_kernel
from streamserve_kernels.triton.packed import WHOLE_ROW, PackedWeight, pack
from streamserve_kernels.triton.packed_gemm import packed_gemm_kernel
from streamserve_kernels.triton.packed_gemv import MAGIC, packed_gemv_kernel
from streamserve_kernels.triton.packed_split import packed_split_candidates, split_packed
from streamserve_kernels.triton.runtime import INTERPRETED
from streamserve_kernels.triton.split import (
    SPLIT_ROWS,
    new_counters,
    split_candidates,
    split_linear,
)
from streamserve_kernels.triton.tuning import LIBRARY, Config, bucket, usable

# Most rows that a kernel of ours takes.
FEW_ROWS = 16
PACKED_ROWS = 256
# Elements of a dequantised piece: 64 MiB of bfloat16.
_SCRATCH_ELEMENTS = 2**25

_GEMV = (
    Config("gemv", 1, 4),
    Config("gemv", 1, 8),
    Config("gemv", 1, 4, overlap=True),
    Config("gemv", 1, 8, overlap=True),
    Config("gemv", 1, 2, overlap=True),
    LIBRARY,
)
_SKINNY_TILES = (
    Config("skinny", 16, 32, 256, 4, 4),
    Config("skinny", 16, 16, 256, 4, 4),
    Config("skinny", 16, 32, 128, 4, 5),
    Config("skinny", 16, 64, 128, 4, 4),
)
_SKINNY = (
    LIBRARY,
    *_SKINNY_TILES,
    *(config._replace(overlap=True) for config in _SKINNY_TILES),
)
_PACKED_GEMV = (
    Config("gemv", 1, 4),
    Config("gemv", 1, 8),
    Config("gemv", 1, 4, overlap=True),
    Config("gemv", 1, 8, overlap=True),
    Config("gemv", 1, 2, overlap=True),
    Config("gemv", 1, 4, 0, 2, overlap=True),
)
_PACKED_FEW = (
    Config("gemm", 16, 32, 64, 4, 4),
    Config("gemm", 16, 16, 64, 4, 5),
    Config("gemm", 16, 32, 128, 8, 3),
    Config("gemm", 16, 64, 64, 4, 3),
)
_PACKED_32 = (
    Config("gemm", 32, 64, 32, 4, 3),
    Config("gemm", 32, 32, 32, 4, 4),
    Config("gemm", 32, 128, 32, 8, 3),
    LIBRARY,
)
_PACKED_MANY = (
    Config("gemm", 64, 64, 32, 4, 3),
    Config("gemm", 64, 128, 32, 8, 3),
    Config("gemm", 128, 64, 32, 8, 2),
    LIBRARY,
)
# Float32 is not what these kernels are for: one that is right, and fits.
_PACKED_FLOAT32 = (Config("gemm", 16, 32, 32, 4, 2),)


def _rows_of(x: Tensor, in_features: int) -> Tensor:
    """Takes x [..., K] as rows that start where a thread may load, copied if need be."""
    if x.shape[-1] != in_features:
        raise ValueError(f"expected rows of {in_features}, got {x.shape[-1]}")
    x = x.reshape(-1, in_features).contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _alignment(*tensors: Tensor | None) -> str:
    """Kernels are compiled anew for addresses of another alignment: part of a tuning key."""
    aligned = all(t is None or t.data_ptr() % ALIGNMENT == 0 for t in tensors)
    return "" if aligned else ",unaligned"


def _library(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """The library's product, as a tensor of its own or in `out` [M, N]."""
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


class DenseLinear:
    """A row-major weight [N, K], never copied if it was one; x in the weight's dtype."""

    __slots__ = ("bias", "choices", "counters", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.contiguous()
        self.bias = None if bias is None else bias.to(weight.dtype).contiguous()
        self.counters = new_counters(weight.shape[0], weight.device)
        self.choices: dict[int, Config] = {}  # by bucket of rows

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def unpack(self) -> Tensor:
        return self.weight

    def tuning_key(self, rows: int) -> str:
        bias = "" if self.bias is None else ",bias"
        shape = f"{self.out_features}x{self.in_features}"
        return f"dense,{shape},{self.dtype}{bias},{rows}{_alignment(self.weight, self.bias)}"

    def candidates(self, rows: int) -> tuple[Config, ...]:
        if rows == 1:
            return usable(_GEMV, self.device)
        if rows > SPLIT_ROWS or self.dtype == torch.float32:
            return (LIBRARY,)
        if rows <= FEW_ROWS:
            return usable(_SKINNY, self.device)
        return usable((LIBRARY, *split_candidates(rows, self.weight)), self.device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, self._chosen(x))

    def write(self, x: Tensor, out: Tensor) -> None:
        """See `WritingLinear`."""
        self.run(x, self._chosen(x), out)

    def _chosen(self, x: Tensor) -> Config:
        count = x.numel() // self.in_features
        if count > SPLIT_ROWS or count == 0 or x.dtype != self.dtype:
            return LIBRARY
        rows = bucket(count)
        return self.choices.get(rows) or self.candidates(rows)[0]

    def run(self, x: Tensor, config: Config, out: Tensor | None = None) -> Tensor:
        """The product by one of the candidates for as many rows, in `out` if that is given."""
        if config == LIBRARY:
            return _library(x, self.weight, self.bias, out)
        rows = _rows_of(x, self.in_features)
        count, out_features = rows.shape[0], self.out_features
        y = out
        if y is None:
            y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)
        if config.kernel == "split":
            split_linear(rows, self.weight, self.bias, y.view(count, -1), self.counters, config)
            return y
        if config.kernel == "gemv":
            gemv(rows, self.weight, self.bias, y, config)
            return y
        grid = -(-out_features // config.block_n), -(-count // config.block_m)
        skinny_kernel[grid](
            rows,
            self.weight,
            self.weight if self.bias is None else self.bias,
            y,
            count,
            out_features,
            self.in_features,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            HAS_BIAS=self.bias is not None,
            OVERLAP=config.overlap,
            STAGES=config.stages,
            INTERPRETED=INTERPRETED,
            num_warps=config.num_warps,
            launch_pdl=config.overlap,
        )
        return y


class HeldWeight(Protocol):
    """A quantised weight [N, K] in memory."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def nbytes(self) -> int: ...
    def unpack(self, dtype: torch.dtype, rows: slice | Tensor | None = None) -> Tensor:
        """The weights of all rows, of a run of them or of those with ids [R] -> [R, K]."""
        ...


Held = TypeVar("Held", bound=HeldWeight)


class DequantisedLinear(Generic[Held]):
    """Products with a weight that is dequantised on the way; x in any float dtype.

    `columns` is the order of inputs it is held in. A subclass says which kernels there are.
    """

    __slots__ = ("bias", "choices", "columns", "counters", "dtype", "packed", "quantization")

    def __init__(
        self,
        packed: Held,
        bias: Tensor | None,
        dtype: torch.dtype,
        quantization: Quantization,
        columns: Tensor | None = None,
    ) -> None:
        self.packed = packed
        self.bias = None if bias is None else bias.contiguous()
        self.dtype = dtype
        self.columns = columns
        self.counters = new_counters(packed.out_features, packed.device)
        self.quantization: Quantization = quantization
        self.choices: dict[int, Config] = {}  # by bucket of rows

    @property
    def out_features(self) -> int:
        return self.packed.out_features

    @property
    def in_features(self) -> int:
        return self.packed.in_features

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        parts = (self.bias, self.columns)
        return self.packed.nbytes + sum(part.nbytes for part in parts if part is not None)

    def unpack(self) -> Tensor:
        """The weight [N, K] float32 that the codes stand for."""
        return self._in_order(self.packed.unpack(torch.float32))

    def rows(self, ids: Tensor) -> Tensor:
        return self._in_order(self.packed.unpack(self.dtype, ids))

    def _in_order(self, weight: Tensor) -> Tensor:
        if self.columns is None:
            return weight
        ordered = torch.empty_like(weight)
        ordered[:, self.columns] = weight
        return ordered

    def candidates(self, rows: int) -> tuple[Config, ...]:
        """The kernels for a bucket of rows."""
        raise NotImplementedError

    def _launch(self, rows: Tensor, config: Config, y: Tensor) -> None:
        """Writes the product by a candidate other than the library into y."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        count = x.numel() // self.in_features
        if count == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self.run(x, self._chosen(x))

    def write(self, x: Tensor, out: Tensor) -> None:
        """See `WritingLinear`."""
        if x.shape[0]:
            self.run(x, self._chosen(x), out)

    def _chosen(self, x: Tensor) -> Config:
        if x.dtype != self.dtype:
            return LIBRARY  # nothing was measured for it, and no kernel may have been compiled
        rows = bucket(x.numel() // self.in_features)
        return self.choices.get(rows) or self.candidates(rows)[0]

    def run(self, x: Tensor, config: Config, out: Tensor | None = None) -> Tensor:
        """The product by one of the candidates for as many rows, in `out` if that is given."""
        rows = _rows_of(x, self.in_features)
        if self.columns is not None:
            rows = rows.index_select(1, self.columns)
        shape = *x.shape[:-1], self.out_features
        if config == LIBRARY:
            return self._through_scratch(rows, out).view(shape)
        y = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
        self._launch(rows, config, y)
        return y

    def _through_scratch(self, rows: Tensor, out: Tensor | None) -> Tensor:
        """Dequantised in x's dtype, a piece at a time: a copy of a head would not fit beside it."""
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        piece = max(1, _SCRATCH_ELEMENTS // self.in_features)
        if self.out_features <= piece:
            return _library(rows, self.packed.unpack(rows.dtype), bias, out)
        y = rows.new_empty(rows.shape[0], self.out_features) if out is None else out
        for start in range(0, self.out_features, piece):
            here = slice(start, min(start + piece, self.out_features))
            weight = self.packed.unpack(rows.dtype, here)
            _library(rows, weight, None if bias is None else bias[here], y[:, here])
        return y


class PackedQuantLinear(DequantisedLinear[PackedWeight]):
    """Integer weights in words."""

    __slots__ = ()

    def tuning_key(self, rows: int) -> str:
        packed = self.packed
        extras = "" if packed.zeros is None else ",zeros"
        extras += "" if self.bias is None else f",{self.bias.dtype} bias"
        shape = f"{self.out_features}x{self.in_features}"
        kind = f"{self.quantization},{packed.scales.dtype} per {packed.group_shift}"
        return f"{kind},{shape},{self.dtype}{extras},{rows}{_alignment(self.bias)}"

    def candidates(self, rows: int) -> tuple[Config, ...]:
        if rows == 1:
            return usable(_PACKED_GEMV, self.device)
        if rows > PACKED_ROWS:
            return (LIBRARY,)
        if self.dtype == torch.float32:
            return _PACKED_FLOAT32
        split = usable(packed_split_candidates(rows, self.packed), self.device)
        if rows <= FEW_ROWS:
            return (*_PACKED_FEW, *split)
        today = _PACKED_32 if rows == 32 else _PACKED_MANY
        # What the one that is split beats by far need not be measured in several sizes.
        return (today[0], *split, LIBRARY) if split else today

    def _launch(self, rows: Tensor, config: Config, y: Tensor) -> None:
        packed, count = self.packed, rows.shape[0]
        if config.kernel == "split":
            split_packed(rows, packed, self.bias, y.view(count, -1), self.counters, config)
            return
        zeros = packed.scales if packed.zeros is None else packed.zeros
        bias = packed.scales if self.bias is None else self.bias
        tensors = rows, packed.words, packed.scales, zeros, bias, y
        sizes = (
            self.out_features,
            self.in_features,
            packed.words.shape[1],
            packed.scales.shape[1],
            MAGIC,
            packed.group_shift,
        )
        if config.kernel == "gemv":
            packed_gemv_kernel[(-(-self.out_features // config.block_n),)](
                *tensors,
                *sizes,
                BITS=packed.bits,
                BLOCK_N=config.block_n,
                BLOCK_W=128 * config.num_warps,
                ROW_SCALES=packed.group_shift == WHOLE_ROW,
                HAS_ZEROS=packed.zeros is not None,
                HAS_BIAS=self.bias is not None,
                OVERLAP=config.overlap,
                num_warps=config.num_warps,
                launch_pdl=config.overlap,
            )
            return
        grid = -(-self.out_features // config.block_n), -(-count // config.block_m)
        packed_gemm_kernel[grid](
            *tensors,
            count,
            *sizes,
            BITS=packed.bits,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_W=config.block_k,
            ROW_SCALES=packed.group_shift == WHOLE_ROW,
            HAS_ZEROS=packed.zeros is not None,
            HAS_BIAS=self.bias is not None,
            STAGES=config.stages,
            INTERPRETED=INTERPRETED,
            num_warps=config.num_warps,
        )


def prepare_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Keeps the weight as it is; see `naive.prepare_linear`."""
    return DenseLinear(weight, bias)


def prepare_quantised(
    weight: Tensor, bias: Tensor | None, quantization: Quantization
) -> QuantLinear:
    """See `naive.prepare_quantised`: the very same weight.

    Activations are quantised for fp8 only, as the twin does it. Raises ValueError for fp8 on a card
    without it.
    """
    if quantization == "fp8":
        return Fp8Linear(weight, bias)
    quantised = quantise(weight, quantization)
    if quantization == "int8":
        codes, scales, group = quantised.codes.view(torch.uint8) ^ 128, quantised.scales, None
    else:
        codes, scales = quantised.codes + 8, quantised.scales.half()
        group = codes.shape[1] // scales.shape[1]
    packed = pack(
        codes,
        scales,
        None,
        bits=8 if quantization == "int8" else 4,
        group_size=group,
        in_features=quantised.in_features,
    )
    return PackedQuantLinear(packed, bias, weight.dtype, quantization)


def slow_quantisation() -> str | None:
    """Products with quantised weights read less and are faster for it."""
    return None


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """Computes x [..., K] @ weightᵀ + bias -> [..., N]."""
    return packed(x)
