"""Products of a few rows with a row-major weight: the weight is read once, at memory speed.

`gemv_kernel` takes one row, on the ordinary units: a thread owns `VEC` adjacent inputs (one 16-byte
load) of every output of its program, so threads exchange nothing before the end. `skinny_kernel`
takes up to sixteen, the least that a tile of the matrix units has.

A program sums its outputs over all inputs, in float32 and in a fixed order.

With OVERLAP a kernel starts while the one before it still runs: see `runtime.overlaps`. By the time
that x is there, so is a row's first tile of the weight; to ask for more made whole steps slower.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from streamserve_kernels.triton.runtime import jit
from streamserve_kernels.triton.tuning import Config

ALIGNMENT = 16  # bytes that a thread loads at once


@jit
def store_tile(y, bias, acc, m, n, M, N, HAS_BIAS: tl.constexpr):
    """Puts sums [BLOCK_M, BLOCK_N] into rows `m` and columns `n` of y [M, N]."""
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + m.to(tl.int64)[:, None] * N + n[None, :],
        acc.to(y.dtype.element_ty),
        mask=(m < M)[:, None] & (n < N)[None, :],
    )


@jit
def gemv_kernel(
    x,  # [K]
    weight,  # [N, K]
    bias,  # [N], or anything without HAS_BIAS
    x_scale,  # [1] float32, or anything without HAS_SCALES
    weight_scales,  # [N] float32, or anything without HAS_SCALES
    y,  # [N]
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # VEC inputs a thread
    VEC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    tile = weight + n.to(tl.int64)[:, None] * K + inputs[None, :]
    here = (n < N)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_K // VEC), dtype=tl.float32)
    # The next tile is on its way while this one is multiplied; the first one before x is there.
    w = tl.load(tile, mask=here & (inputs < K)[None, :], other=0.0, eviction_policy="evict_first")
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    for start in range(0, K, BLOCK_K):
        k = start + inputs
        values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        products = w.to(tl.float32) * values[None, :]
        tile += BLOCK_K
        w = tl.load(
            tile,
            mask=here & (k < K - BLOCK_K)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        acc += tl.sum(tl.reshape(products, (BLOCK_N, BLOCK_K // VEC, VEC)), axis=2)
    out = tl.sum(acc, axis=1)
    if HAS_SCALES:
        out *= tl.load(x_scale) * tl.load(weight_scales + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: Config,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fills y [1, N] with the product of x [1, K] and the first N rows of weight [.., K].

    `scales` are those of float8 codes: x's [1], and the outputs' [N].
    """
    out_features, in_features = y.numel(), weight.shape[1]
    vector = ALIGNMENT // weight.itemsize
    x_scale, weight_scales = scales or (weight, weight)
    gemv_kernel[(-(-out_features // config.block_n),)](
        x,
        weight,
        weight if bias is None else bias,
        x_scale,
        weight_scales,
        y,
        out_features,
        in_features,
        BLOCK_N=config.block_n,
        BLOCK_K=32 * config.num_warps * vector,
        VEC=vector,
        HAS_BIAS=bias is not None,
        HAS_SCALES=scales is not None,
        OVERLAP=config.overlap,
        num_warps=config.num_warps,
        launch_pdl=config.overlap,
    )


@jit(do_not_specialize=["M"])
def skinny_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N], or anything without HAS_BIAS
    y,  # [M, N]
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    offsets = tl.arange(0, BLOCK_K)
    weight_rows = weight + n.to(tl.int64)[None, :] * K
    x_rows = x + m.to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + offsets
        w = tl.load(
            weight_rows + k[:, None],
            mask=(n < N)[None, :] & (k < K)[:, None],
            other=0.0,
            eviction_policy="evict_first",
        )
        values = tl.load(x_rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        if INTERPRETED:
            w, values = w.to(tl.float32), values.to(tl.float32)
        acc = tl.dot(values, w, acc, input_precision="ieee")
    store_tile(y, bias, acc, m, n, M, N, HAS_BIAS)
