"""Products of one row with packed words: dequantised in registers, at memory speed.

The words are those of `streamserve_kernels.triton.packed`. A thread owns a chunk, four adjacent
words, of every output of its program. A code becomes a number without a conversion: put into the
low bits of 2**23 (`MAGIC`, an argument: of two constants the compiler would make two instructions)
it is a float32, from which 2**23 and the zero point are taken away, exactly.
Codes stay at their place in the word, so they are `unit` times too large; the input makes up for
it, exactly as well.
"""

from __future__ import annotations

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from streamserve_kernels.triton.runtime import jit

MAGIC = 0x4B000000  # 2**23 as the bits of a float32


@jit(do_not_specialize=["magic", "group_shift"])
def packed_gemv_kernel(
    x,  # [K]
    words,  # [N, W] int32: see `packed`
    scales,  # [N, G]
    zeros,  # [N, G], or anything without HAS_ZEROS
    bias,  # [N], or anything without HAS_BIAS
    y,  # [N]
    N,
    K,
    W,
    G,
    magic,  # MAGIC
    group_shift,  # chunk >> group_shift is the group
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,  # four words, a chunk, a thread
    ROW_SCALES: tl.constexpr,  # G is 1
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`: see `gemv`
):
    PER: tl.constexpr = 32 // BITS
    CHUNKS: tl.constexpr = BLOCK_W // 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = n.to(tl.int64)[None, :]
    offsets = tl.arange(0, BLOCK_W)
    first = offsets // 4 * (4 * PER) + offsets % 4
    if ROW_SCALES and HAS_ZEROS:
        row_zero = tl.load(zeros + n, mask=n < N, other=0).to(tl.float32)[None, None, :]
    acc = tl.zeros((CHUNKS, BLOCK_N), dtype=tl.float32)
    tile = words + rows * W + offsets[:, None]
    here = (n < N)[None, :]
    # The next tile is on its way while this one is multiplied; the first one before x is there.
    w = tl.load(tile, mask=here & (offsets < W)[:, None], other=0, eviction_policy="evict_first")
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    for start in range(0, W, BLOCK_W):
        this = w.to(tl.uint32, bitcast=True)  # shifts bring in zeros
        tile += BLOCK_W
        w = tl.load(
            tile,
            mask=here & (start + offsets < W - BLOCK_W)[:, None],
            other=0,
            eviction_policy="evict_first",
        )
        zero = 2.0 ** (BITS - 1)
        if ROW_SCALES:
            if HAS_ZEROS:
                zero = row_zero
        else:
            chunk = start // 4 + tl.arange(0, CHUNKS)
            group = rows * G + (chunk >> group_shift)[:, None]
            mask = here & (chunk < W // 4)[:, None]
            scale = tl.load(scales + group, mask=mask, other=0.0).to(tl.float32)
            if HAS_ZEROS:
                zero = tl.load(zeros + group, mask=mask, other=0).to(tl.float32)[:, None, :]
        part = tl.zeros((CHUNKS, 4, BLOCK_N), dtype=tl.float32)
        for j in tl.static_range(PER):
            unit = 2 ** (j * BITS % 16)
            half = this if j * BITS < 16 else this >> 16
            bits = (half & ((2**BITS - 1) * unit)) | magic
            code = tl.reshape(bits.to(tl.float32, bitcast=True), (CHUNKS, 4, BLOCK_N))
            k = start * PER + first + j * 4
            values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32) * (1.0 / unit)
            part += (code - (zero * unit + 8388608.0)) * tl.reshape(values, (CHUNKS, 4, 1))
        if ROW_SCALES:
            acc += tl.sum(part, axis=1)
        else:
            acc += tl.sum(part, axis=1) * scale
    out = tl.sum(acc, axis=0)
    if ROW_SCALES:
        out *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)
