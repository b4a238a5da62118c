"""Products of up to a few hundred rows with packed words, on the matrix units.

The words are those of `streamserve_kernels.triton.packed`. A tile of them gives `32 / BITS` tiles
of weights, one for each place in a word, and each meets the inputs of its place: nothing is
shuffled.
"""

from __future__ import annotations

import triton.language as tl

from streamserve_kernels.triton.gemv import store_tile
from streamserve_kernels.triton.runtime import jit


@jit(do_not_specialize=["M", "magic", "group_shift"])
def packed_gemm_kernel(
    x,  # [M, K]
    words,  # [N, W] int32
    scales,  # [N, G]
    zeros,  # [N, G], or anything without HAS_ZEROS
    bias,  # [N], or anything without HAS_BIAS
    y,  # [M, N]
    M,
    N,
    K,
    W,
    G,
    magic,  # `packed_gemv.MAGIC`
    group_shift,  # chunk >> group_shift is the group
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROW_SCALES: tl.constexpr,  # G is 1: codes are multiplied as they are, sums are scaled
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    PER: tl.constexpr = 32 // BITS
    CHUNKS: tl.constexpr = BLOCK_W // 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = n.to(tl.int64)[None, :]
    x_rows = x + m.to(tl.int64)[:, None] * K
    offsets = tl.arange(0, BLOCK_W)
    first = offsets // 4 * (4 * PER) + offsets % 4
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, W, BLOCK_W, num_stages=STAGES):
        word = start + offsets
        w = tl.load(
            words + rows * W + word[:, None],
            mask=(n < N)[None, :] & (word < W)[:, None],
            other=0,
        ).to(tl.uint32, bitcast=True)
        chunk = start // 4 + tl.arange(0, CHUNKS)
        group = rows * G + (chunk >> group_shift)[:, None]
        mask = (n < N)[None, :] & (chunk < W // 4)[:, None]
        if HAS_ZEROS:
            zero = tl.load(zeros + group, mask=mask, other=0).to(tl.float32)[:, None, :]
        else:
            zero = 2.0 ** (BITS - 1)
        if not ROW_SCALES:
            scale = tl.load(scales + group, mask=mask, other=0.0).to(tl.float32)[:, None, :]
        else:
            scale = 1.0
        for j in tl.static_range(PER):
            unit = 2 ** (j * BITS % 16)
            half = w if j * BITS < 16 else w >> 16
            bits = (half & ((2**BITS - 1) * unit)) | magic
            code = tl.reshape(bits.to(tl.float32, bitcast=True), (CHUNKS, 4, BLOCK_N))
            weight = (code - (zero * unit + 8388608.0)) * (scale * (1.0 / unit))
            weight = tl.reshape(weight, (BLOCK_W, BLOCK_N)).to(x.dtype.element_ty)
            k = start * PER + first + j * 4
            values = tl.load(
                x_rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0
            )
            if INTERPRETED:
                weight, values = weight.to(tl.float32), values.to(tl.float32)
            acc = tl.dot(values, weight, acc, input_precision="ieee")
    if ROW_SCALES:
        acc *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y, bias, acc, m, n, M, N, HAS_BIAS)


@jit(do_not_specialize=["first_row", "group_shift"])
def unpack_kernel(
    words,  # [N, W] int32
    scales,  # [N, G]
    zeros,  # [N, G], or anything without HAS_ZEROS
    ids,  # [R] int64: rows to unpack; anything without HAS_IDS
    out,  # [R, K]
    first_row,  # of the R adjacent ones, without HAS_IDS
    K,
    W,
    G,
    group_shift,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """The weights that the words stand for, rounded to the dtype of `out`."""
    PER: tl.constexpr = 32 // BITS
    row = tl.program_id(0).to(tl.int64)
    if HAS_IDS:
        n = tl.load(ids + row)
    else:
        n = first_row + row
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    chunk = k // (4 * PER)
    # Threads own adjacent outputs, so that stores are whole; a word is read from L1 PER times.
    w = tl.load(words + n * W + (chunk * 4 + k % 4), mask=k < K, other=0)
    code = (w >> (k % (4 * PER) // 4 * BITS)) & (2**BITS - 1)
    group = n * G + (chunk >> group_shift)
    if HAS_ZEROS:
        code -= tl.load(zeros + group, mask=k < K, other=0).to(tl.int32)
    else:
        code -= 2 ** (BITS - 1)
    scale = tl.load(scales + group, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + row * K + k, (code.to(tl.float32) * scale).to(out.dtype.element_ty), mask=k < K)
