"""Products with stored weights of any kind, dequantised on their way to the matrix units.

Codes are read from the planes of `streamserve_kernels.stored_naive`, a byte for each of them (its
neighbours come from the first-level cache), and what they stand for from a table or as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from streamserve_kernels.triton.gemv import store_tile
from streamserve_kernels.triton.runtime import jit


class KernelWeight(NamedTuple):
    """A stored weight [N, K] as kernels take it: one argument."""

    low: Any  # [N, P] uint8: the low bits of codes
    high: Any  # [N, P'] uint8: their high bits, or None where HIGH_BITS is 0
    table: Any  # [N or 1, 2**bits] float32 of what codes stand for; None: themselves
    scales: Any  # [N, G]
    scale_units: Any  # [N, ceil(G / SCALES_PER)]
    offsets: Any  # [N, G]: zeros or minimums
    offset_units: Any
    zero: float
    group: int
    G: int  # groups of a row
    LOW_BITS: tl.constexpr
    HIGH_BITS: tl.constexpr
    TABLE_ROW: tl.constexpr  # elements between the tables of two outputs
    SCALES_PER: tl.constexpr  # scales that share a unit; 0: they have none, -1: no scales
    OFFSETS: tl.constexpr  # 0: none, 1: `zero`, 2: zeros, 3: minimums
    OFFSETS_PER: tl.constexpr


@jit
def numbers_of(values, units, n, g, G, mask, PER: tl.constexpr):
    number = tl.load(values + n * G + g, mask=mask, other=0).to(tl.float32)
    if PER:
        shared = (G + PER - 1) // PER
        number *= tl.load(units + n * shared + g // PER, mask=mask, other=0.0).to(tl.float32)
    return number


@jit
def _codes(plane, n, k, P, mask, BITS: tl.constexpr):
    PER: tl.constexpr = 8 // BITS
    byte = tl.load(plane + n * P + k // PER, mask=mask, other=0).to(tl.int32)
    return (byte >> (k % PER * BITS)) & (2**BITS - 1)


@jit
def _weights(weight, n, k, N, K):
    """The weights of outputs n (int64, against k) and columns k, as `dequantise` has them."""
    mask = (n < N) & (k < K)
    LOW_PER: tl.constexpr = 8 // weight.LOW_BITS
    code = _codes(weight.low, n, k, (K + LOW_PER - 1) // LOW_PER, mask, weight.LOW_BITS)
    if weight.HIGH_BITS:
        HIGH_PER: tl.constexpr = 8 // weight.HIGH_BITS
        width = (K + HIGH_PER - 1) // HIGH_PER
        code |= _codes(weight.high, n, k, width, mask, weight.HIGH_BITS) << weight.LOW_BITS
    if weight.table is not None:
        values = tl.load(weight.table + n * weight.TABLE_ROW + code, mask=mask, other=0.0)
    else:
        values = code.to(tl.float32)
    g, G = k // weight.group, weight.G
    if weight.OFFSETS == 1:
        values -= weight.zero
    elif weight.OFFSETS == 2:
        values -= numbers_of(weight.offsets, weight.offset_units, n, g, G, mask, weight.OFFSETS_PER)
    if weight.SCALES_PER >= 0:
        values *= numbers_of(weight.scales, weight.scale_units, n, g, G, mask, weight.SCALES_PER)
    if weight.OFFSETS == 3:
        values -= numbers_of(weight.offsets, weight.offset_units, n, g, G, mask, weight.OFFSETS_PER)
    return tl.where(mask, values, 0.0)


@jit(do_not_specialize=["M"])
def stored_product_kernel(
    x,  # [M, K]
    bias,  # [N], or anything without HAS_BIAS
    y,  # [M, N]
    M,
    N,
    K,
    weight,  # a KernelWeight
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # 1: a row without the matrix units
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = n.to(tl.int64)[None, :]
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = _weights(weight, rows, k[:, None], N, K)
        if BLOCK_M == 1:
            values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            acc += tl.sum(w * values[:, None], axis=0)[None, :]
        else:
            values = tl.load(
                x + m.to(tl.int64)[:, None] * K + k[None, :],
                mask=(m < M)[:, None] & (k < K)[None, :],
                other=0.0,
            )
            w = w.to(values.dtype)
            if INTERPRETED:
                w, values = w.to(tl.float32), values.to(tl.float32)
            acc = tl.dot(values, w, acc, input_precision="ieee")
    store_tile(y, bias, acc, m, n, M, N, HAS_BIAS)


@jit(do_not_specialize=["first_row"])
def stored_rows_kernel(
    ids,  # [R] int64: rows to unpack; anything without HAS_IDS
    out,  # [R, K]
    first_row,  # of the R adjacent ones, without HAS_IDS
    N,
    K,
    weight,  # a KernelWeight
    HAS_IDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The weights of some outputs, rounded to the dtype of `out`."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_IDS:
        n = tl.load(ids + row)
    else:
        n = first_row + row
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    w = _weights(weight, n, k, N, K)
    tl.store(out + row * K + k, w.to(out.dtype.element_ty), mask=k < K)


@jit
def sparse_kernel(
    x,  # [M, K]
    starts,  # [N + 1] int32: where an output's values begin
    columns,  # int32
    values,
    y,  # [M, N]: their products are added
    N,
    K,
    BLOCK: tl.constexpr,
):
    """What a few outputs have beside their table: one program an output and row, in one order."""
    n = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64)
    start, end = tl.load(starts + n), tl.load(starts + n + 1)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        column = tl.load(columns + at, mask=at < end, other=0)
        value = tl.load(values + at, mask=at < end, other=0.0).to(tl.float32)
        acc += value * tl.load(x + m * K + column, mask=at < end, other=0.0).to(tl.float32)
    to = y + m * N + n
    tl.store(to, (tl.load(to).to(tl.float32) + tl.sum(acc, axis=0)).to(y.dtype.element_ty))
