"""Norms, activations and the embedding: one pass over memory each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from streamserve_kernels.interface import ActivationKind, GatedKind
from streamserve_kernels.triton.runtime import jit, overlaps

_ELEMENTS = 1024  # of a program of the activations

KINDS: dict[str, int] = {
    "silu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "gelu_new": 2,
    "gelu_fast": 2,
    "quick_gelu": 3,
    "relu": 4,
    "relu2": 5,
}
GATED_KINDS = {**KINDS, "clamped_swiglu": 6}


def _warps(elements: int) -> int:
    """Eight elements, 16 bytes, or a few times as many for each thread."""
    return min(max(elements // 512, 1), 16)


@jit
def _rms_norm_kernel(
    x, residual, normed, total, row_stride, residual_stride, H, eps, weight, weight_offset,
    HAS_RESIDUAL: tl.constexpr, HAS_OFFSET: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < H
    w = tl.load(weight + at, mask=inside, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    h = tl.load(x + row * row_stride + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        r = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row * H + at, h, mask=inside)
    h32 = h.to(tl.float32)
    scaled = h32 * tl.rsqrt(tl.sum(h32 * h32, axis=0) / H + eps)
    if HAS_OFFSET:
        out = scaled * (weight_offset + w.to(tl.float32))
    else:
        out = scaled.to(x.dtype.element_ty).to(tl.float32) * w.to(tl.float32)
    tl.store(normed + row * H + at, out.to(normed.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `naive.rms_norm`."""
    has_offset = weight_offset != 0.0
    return _norm(_rms_norm_kernel, x, residual, eps, weight, weight_offset, HAS_OFFSET=has_offset)


@jit
def _layer_norm_kernel(
    x, residual, normed, total, row_stride, residual_stride, H, eps, weight, bias,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < H
    if HAS_WEIGHT:
        w = tl.load(weight + row % GROUPS * H + at, mask=inside, other=0.0)
    if HAS_BIAS:
        b = tl.load(bias + at, mask=inside, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    h = tl.load(x + row * row_stride + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        r = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row * H + at, h, mask=inside)
    h32 = h.to(tl.float32)
    centred = tl.where(inside, h32 - tl.sum(h32, axis=0) / H, 0.0)
    out = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / H + eps)
    if HAS_WEIGHT:
        out *= w.to(tl.float32)
    if HAS_BIAS:
        out += b.to(tl.float32)
    tl.store(normed + row * H + at, out.to(normed.dtype.element_ty), mask=inside)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `naive.layer_norm`."""
    return _norm(
        _layer_norm_kernel,
        x,
        residual,
        eps,
        x if weight is None else weight,
        x if bias is None else bias,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        GROUPS=weight.shape[0] if weight is not None and weight.dim() == 2 else 1,
    )


def _norm(
    kernel: Any,
    x: Tensor,
    residual: Tensor | None,
    eps: float,
    *parameters: Tensor | float,
    **constants: int,
) -> Tensor | tuple[Tensor, Tensor]:
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    added = rows if residual is None else residual.reshape(-1, size)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = normed if residual is None else torch.empty_like(normed)
    block, overlap = triton.next_power_of_2(size), overlaps(x.device)
    if rows.shape[0]:
        kernel[(rows.shape[0],)](
            rows, added, normed, total, rows.stride(0), added.stride(0), size, eps, *parameters,
            HAS_RESIDUAL=residual is not None, OVERLAP=overlap, BLOCK=block,
            num_warps=_warps(block), launch_pdl=overlap, **constants,
        )  # fmt: skip
    return normed if residual is None else (normed, total)


@jit
def sigmoid(x):
    # of powers that do not overflow
    power = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, power) / (1.0 + power)


@jit
def act(x, KIND: tl.constexpr):
    if KIND == 0:
        y = x * sigmoid(x)
    elif KIND == 1:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        # (1 + tanh(y)) / 2 is sigmoid(2y)
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == 3:
        y = x * sigmoid(1.702 * x)
    elif KIND == 4:
        y = tl.maximum(x, 0.0)
    else:
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return y


@jit
def gate(x, up, KIND: tl.constexpr):
    if KIND == 6:
        # of a NaN neither is true, and it stays
        x = tl.where(x > 7.0, 7.0, x)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        y = act(x, 3) * (up + 1.0)
    else:
        y = act(x, KIND) * up
    return y


@jit
def _activation_kernel(
    x, y, row_stride, size, KIND: tl.constexpr, GATED: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    values = x + row * row_stride + at
    first = tl.load(values, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        out = gate(first, tl.load(values + size, mask=inside, other=0.0).to(tl.float32), KIND)
    else:
        out = act(first, KIND)
    tl.store(y + row * size + at, out.to(y.dtype.element_ty), mask=inside)


def _activate(x: Tensor, kind: str, gated: bool) -> Tensor:
    kinds = GATED_KINDS if gated else KINDS
    if kind not in kinds:
        raise ValueError(f"activation kind {kind!r} is not known")
    rows = x.reshape(-1, x.shape[-1])
    size = x.shape[-1] // 2 if gated else x.shape[-1]
    y = torch.empty(*x.shape[:-1], size, dtype=x.dtype, device=x.device)
    if y.numel():
        grid, overlap = (rows.shape[0], triton.cdiv(size, _ELEMENTS)), overlaps(x.device)
        _activation_kernel[grid](
            rows, y, rows.stride(0), size, KIND=kinds[kind], GATED=gated, OVERLAP=overlap,
            BLOCK=_ELEMENTS, num_warps=4, launch_pdl=overlap,
        )  # fmt: skip
    return y


def gated_activation(x: Tensor, kind: GatedKind) -> Tensor:
    """See `naive.gated_activation`."""
    return _activate(x, kind, True)


def activation(x: Tensor, kind: ActivationKind) -> Tensor:
    """See `naive.activation`."""
    return _activate(x, kind, False)


@jit
def _gather_kernel(ids, weight, out, row_stride, H, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < H
    source = tl.load(ids + row) * row_stride
    tl.store(out + row * H + at, tl.load(weight + source + at, mask=inside), mask=inside)


def gather(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows `ids` [T] of weight [V, H] -> [T, H]."""
    size = weight.shape[1]
    out = torch.empty(ids.shape[0], size, dtype=weight.dtype, device=weight.device)
    if out.numel():
        grid = (ids.shape[0], triton.cdiv(size, _ELEMENTS))
        _gather_kernel[grid](ids, weight, out, weight.stride(0), size, BLOCK=_ELEMENTS, num_warps=4)
    return out


@jit(do_not_specialize=["T"])
def _resolve_kernel(ids, last, T, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(ids + at, mask=at < T, other=0)
    pending = (found < 0) & (at < T)
    drawn = tl.load(last - 1 - found, mask=pending, other=0)
    tl.store(ids + at, drawn, mask=pending)


def resolve_tokens(input_ids: Tensor, last_tokens: Tensor) -> None:
    """See `naive.resolve_tokens`."""
    count = input_ids.shape[0]
    if count:
        _resolve_kernel[(triton.cdiv(count, _ELEMENTS),)](
            input_ids, last_tokens, count, BLOCK=_ELEMENTS, num_warps=4
        )
