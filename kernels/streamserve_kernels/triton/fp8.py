"""Fp8 products on the GPU: see `streamserve_kernels.fp8` for what they are.

One kernel quantises the activations, a row a program; cuBLAS multiplies, on cards that have the
matrix units for it (compute capability 8.9). One row is a matter of reading the weight: `gemv`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
import triton.language as tl
from torch import Tensor

from streamserve_kernels.fp8 import FP8, quantise_fp8_weight
from streamserve_kernels.quantised import FP8_TILE, Quantization
from streamserve_kernels.triton.gemv import gemv
from streamserve_kernels.triton.runtime import INTERPRETED, jit
from streamserve_kernels.triton.tuning import LIBRARY, Config, bucket, usable

_QUANTISE_BLOCK = 2048
_GEMV = (
    Config("gemv", 1, 4),
    Config("gemv", 1, 8),
    Config("gemv", 1, 4, overlap=True),
    Config("gemv", 1, 8, overlap=True),
    LIBRARY,
)
_CAPABILITY = (8, 9)


@jit
def _rounded(values):
    """To the nearest float8_e4m3fn, ties to even: the interpreter's conversion gets that wrong."""
    bits = values.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    # Below the least normal number steps are 2**-9, those of float32 at 2**14.
    small = (values + 24576.0) - 24576.0
    return tl.where(tl.abs(values) < 2.0**-6, small, normal.to(tl.float32, bitcast=True))


@jit
def quantise_kernel(
    x,  # [M, K]
    codes,  # [M, P] float8_e4m3fn, P >= K: zeros past K
    scales,  # [M] float32
    K,
    P,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    poison = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, K, BLOCK):
        k = start + offsets
        values = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
        poison += values * 0.0  # a maximum may lose what is no number; a sum does not
    top = tl.max(largest, axis=0)
    top = tl.where(top == 0.0, 1.0, top) + tl.sum(poison, axis=0)
    steps = tl.div_rn(448.0, top)
    tl.store(scales + row, tl.div_rn(top, 448.0))
    for start in range(0, P, BLOCK):
        k = start + offsets
        values = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32) * steps
        values = tl.minimum(tl.maximum(values, -448.0), 448.0)
        if INTERPRETED:
            values = _rounded(values)
        tl.store(codes + row * P + k, values.to(codes.dtype.element_ty), mask=k < P)


class Fp8Linear:
    """A weight in codes [N, K] of float8_e4m3fn, padded; x in any float dtype.

    Cards that multiply no fp8 raise ValueError at once.
    """

    __slots__ = (
        "bias",
        "choices",
        "codes",
        "dtype",
        "in_features",
        "one",
        "out_features",
        "scales",
    )

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.is_cuda:
            has = torch.cuda.get_device_capability(weight.device)
            if has < _CAPABILITY:
                raise ValueError(
                    f"fp8 products need compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]}, "
                    f"{torch.cuda.get_device_name(weight.device)} has {has[0]}.{has[1]}"
                )
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        spare = -self.in_features % FP8_TILE, -self.out_features % FP8_TILE
        codes, scales = quantise_fp8_weight(weight)
        codes = F.pad(codes.view(torch.uint8), (0, spare[0], 0, spare[1]))
        self.codes = codes.view(FP8)
        self.scales = F.pad(scales, (0, spare[1]))
        self.one = torch.ones((), device=weight.device)
        self.bias = None if bias is None else F.pad(bias.to(weight.dtype), (0, spare[1]))
        self.choices: dict[int, Config] = {}  # by bucket of rows

    @property
    def quantization(self) -> Quantization:
        return "fp8"

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        bias_bytes = 0 if self.bias is None else self.bias.nbytes
        return self.codes.nbytes + self.scales.nbytes + bias_bytes

    def unpack(self) -> Tensor:
        """The weight [N, K] float32 that the codes stand for."""
        weight = self.codes.float() * self.scales[:, None]
        return weight[: self.out_features, : self.in_features]

    def rows(self, ids: Tensor) -> Tensor:
        # Indexing of float8 is not implemented everywhere; of bytes it is.
        codes = self.codes.view(torch.uint8)[ids].view(FP8).float()
        return (codes * self.scales[ids, None]).to(self.dtype)[:, : self.in_features]

    def tuning_key(self, rows: int) -> str:
        bias = "" if self.bias is None else ",bias"
        return f"fp8,{self.out_features}x{self.in_features},{self.dtype}{bias},{rows}"

    def candidates(self, rows: int) -> tuple[Config, ...]:
        return usable(_GEMV, self.device) if rows == 1 else (LIBRARY,)

    def __call__(self, x: Tensor) -> Tensor:
        count = x.numel() // self.in_features
        if count == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        if x.dtype != self.dtype:
            return self.run(x, LIBRARY)
        rows = bucket(count)
        return self.run(x, self.choices.get(rows) or self.candidates(rows)[0])

    def run(self, x: Tensor, config: Config) -> Tensor:
        """The product by one of the candidates for as many rows."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected rows of {self.in_features}, got {x.shape[-1]}")
        codes, scales = self.quantise(x.reshape(-1, self.in_features))
        shape = *x.shape[:-1], self.out_features
        if config == LIBRARY:
            return self._library(codes, scales, x.dtype)[:, : self.out_features].reshape(shape)
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
        gemv(codes, self.codes, self.bias, y, config, (scales, self.scales))
        return y

    def quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`quantise_fp8` of rows [M, K], padded to the codes' width."""
        rows = rows.contiguous()
        if rows.data_ptr() % 16:
            rows = rows.clone()
        count, width = rows.shape[0], self.codes.shape[1]
        codes = torch.empty(count, width, dtype=torch.uint8, device=rows.device).view(FP8)
        scales = torch.empty(count, dtype=torch.float32, device=rows.device)
        quantise_kernel[(count,)](
            rows,
            codes,
            scales,
            self.in_features,
            width,
            BLOCK=_QUANTISE_BLOCK,
            INTERPRETED=INTERPRETED,
        )
        return codes, scales

    def _library(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        if not codes.is_cuda:
            sums = codes.float() @ self.codes.float().t()
        elif dtype == torch.bfloat16:
            y = torch._scaled_mm(
                codes,
                self.codes.t(),
                scale_a=scales[:, None],
                scale_b=self.scales[None, :],
                out_dtype=dtype,
                use_fast_accum=True,
            )
            return y if self.bias is None else y + self.bias.to(dtype)
        else:
            # cuBLAS scales rows into bfloat16 only.
            sums = torch._scaled_mm(
                codes,
                self.codes.t(),
                scale_a=self.one,
                scale_b=self.one,
                out_dtype=torch.float32,
                use_fast_accum=True,
            )
        y = sums * (scales[:, None] * self.scales)
        return (y if self.bias is None else y + self.bias.float()).to(dtype)
