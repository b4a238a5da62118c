"""Products of up to a few hundred rows with packed words, at memory speed: `split` for those.

A tile of words gives `32 / BITS` tiles of weights, one for each place in a word. They lie one after
the other, as one wide left operand, and never leave the registers: words come from shared memory
in the order in which a thread of the matrix units wants its weights. The compiler finds that way
from loads and constants only; a number that is an argument sends every weight through shared
memory. Found where they are in x, the inputs would be scattered in pieces of four, and every
program would gather them anew: they are put in the order of the words beforehand.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from streamserve_kernels.triton.packed import WHOLE_ROW, WORDS_PER_CHUNK, PackedWeight
from streamserve_kernels.triton.runtime import INTERPRETED, jit
from streamserve_kernels.triton.split import finish, plan, prefetch, with_splits
from streamserve_kernels.triton.tuning import Config

_ORDER_BLOCK = 1024

# By bits and rows: tiles, in words, that are worth a try, without their splits. Two or three
# programs on a processor, or one that reads x half as often.
_TILES = {
    (8, 16): (Config("split", 16, 128, 32, 4, 4, overlap=True),),
    (8, 32): (
        Config("split", 32, 128, 32, 4, 4, overlap=True),
        Config("split", 32, 256, 16, 8, 6, overlap=True),
    ),
    (8, 64): (
        Config("split", 64, 128, 32, 4, 3, overlap=True),
        Config("split", 64, 256, 16, 8, 6, overlap=True),
    ),
    (8, 128): (Config("split", 128, 256, 16, 8, 5, overlap=True),),
    (4, 16): (Config("split", 16, 128, 16, 4, 6, overlap=True),),
    (4, 32): (
        Config("split", 32, 128, 16, 4, 4, overlap=True),
        Config("split", 32, 256, 16, 8, 6, overlap=True),
    ),
    (4, 64): (
        Config("split", 64, 128, 16, 4, 4, overlap=True),
        Config("split", 64, 256, 16, 8, 6, overlap=True),
    ),
    (4, 128): (Config("split", 128, 256, 16, 8, 4, overlap=True),),
}


@jit
def order_kernel(
    x,  # [M, K]
    ordered,  # [M, steps, PER, STEP]: the input of place j of a word of a step; zero past K
    K,
    width,  # of a row of `ordered`
    PER: tl.constexpr,  # places of a word
    CHUNK: tl.constexpr,  # words whose inputs of one place are adjacent
    STEP: tl.constexpr,  # words
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = at // (PER * STEP) * STEP + at % STEP
    place = at // STEP % PER
    k = word // CHUNK * (CHUNK * PER) + place * CHUNK + word % CHUNK
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    inside = at < width
    values = tl.load(x + row * K + k, mask=inside & (k < K), other=0.0)
    tl.store(ordered + row * width + at, values, mask=inside)


@jit
def in_mantissa(word, MASK: tl.constexpr, INTERPRETED: tl.constexpr):
    """The bits under MASK in the low bits of 2**23, as a float32: one instruction, told to be."""
    if INTERPRETED:
        bits = (word & MASK) | 0x4B000000
    else:
        bits = tl.inline_asm_elementwise(
            f"lop3.b32 $0, $1, {MASK}, 0x4B000000, 0xEA;",
            "=r,r",
            [word],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    return bits.to(tl.float32, bitcast=True)


@jit
def weights_of_place(
    words,  # [BLOCK_N, BLOCK_W] uint32
    zero,  # [BLOCK_N, GROUPS, 1] or a number
    scale,  # [BLOCK_N, GROUPS, 1] or a number; anything for no GROUPS
    PLACE: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    unit: tl.constexpr = 2 ** (PLACE * BITS % 16)
    half = words if PLACE * BITS < 16 else words >> 16
    code = in_mantissa(half, (2**BITS - 1) * unit, INTERPRETED)
    if GROUPS == 0:
        # Exact, and so one operation.
        code = code * (1.0 / unit) - (zero + 8388608.0 / unit)
    else:
        code = tl.reshape(code, (words.shape[0], GROUPS, words.shape[1] // GROUPS))
        code = (code - (zero * unit + 8388608.0)) * (scale * (1.0 / unit))
        code = tl.reshape(code, (words.shape[0], words.shape[1]))
    return code.to(dtype)


@jit
def four_places(a, b, c, d):
    """[N, W] each -> [N, 4 * W], one after the other."""
    weights = tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 3, 2, 1))
    return tl.reshape(weights, (a.shape[0], 4 * a.shape[1]))


@jit
def eight_places(a, b, c, d, e, f, g, h):
    """[N, W] each -> [N, 8 * W], one after the other."""
    low = tl.join(tl.join(a, b), tl.join(c, d))
    high = tl.join(tl.join(e, f), tl.join(g, h))
    weights = tl.permute(tl.join(low, high), (0, 4, 3, 2, 1))
    return tl.reshape(weights, (a.shape[0], 8 * a.shape[1]))


@jit
def weights_of(
    words,
    zero,
    scale,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """[BLOCK_N, PER * BLOCK_W]: the weights of all places, one after the other."""
    a = weights_of_place(words, zero, scale, 0, BITS, GROUPS, dtype, INTERPRETED)
    b = weights_of_place(words, zero, scale, 1, BITS, GROUPS, dtype, INTERPRETED)
    c = weights_of_place(words, zero, scale, 2, BITS, GROUPS, dtype, INTERPRETED)
    d = weights_of_place(words, zero, scale, 3, BITS, GROUPS, dtype, INTERPRETED)
    if BITS == 8:
        weights = four_places(a, b, c, d)
    else:
        e = weights_of_place(words, zero, scale, 4, BITS, GROUPS, dtype, INTERPRETED)
        f = weights_of_place(words, zero, scale, 5, BITS, GROUPS, dtype, INTERPRETED)
        g = weights_of_place(words, zero, scale, 6, BITS, GROUPS, dtype, INTERPRETED)
        h = weights_of_place(words, zero, scale, 7, BITS, GROUPS, dtype, INTERPRETED)
        weights = eight_places(a, b, c, d, e, f, g, h)
    return weights


@jit(do_not_specialize=["M", "splits", "steps", "all_steps"])
def packed_split_kernel(
    x,  # [M, all_steps, PER, BLOCK_W]: see `order_kernel`
    words,  # [N, W] int32
    scales,  # [N, G]
    zeros,  # [N, G], or anything without HAS_ZEROS
    bias,  # [N], or anything without HAS_BIAS
    y,  # [M, N]
    partials,  # [tiles, splits, BLOCK_N, BLOCK_M] float32; anything for one split
    counters,  # [tiles] int32
    M,
    N,
    W,
    G,
    splits,
    steps,  # of BLOCK_W words in a split; the last one may have fewer
    all_steps,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    EVEN: tl.constexpr,  # W is whole steps
    GROUP_WORDS: tl.constexpr,  # that share a scale; 0: a row does, and its sums are scaled
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    WIDTH: tl.constexpr = 32 // BITS * BLOCK_W
    tiles = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    offsets = tl.arange(0, BLOCK_W)
    inputs = tl.arange(0, WIDTH)
    row_width = (all_steps * WIDTH).to(tl.int64)
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * row_width
    # A row's zero is that of a group: against a tile of two dimensions it would send every weight
    # through shared memory.
    ROW_ZERO: tl.constexpr = HAS_ZEROS and GROUP_WORDS == 0
    GROUP: tl.constexpr = BLOCK_W if ROW_ZERO else GROUP_WORDS
    GROUPS: tl.constexpr = (BLOCK_W + GROUP - 1) // GROUP if GROUP > 0 else 0
    if ROW_ZERO:
        row_zero = tl.load(zeros + rows).to(tl.float32)[:, :, None]
    first = split * steps
    count = tl.minimum(steps, all_steps - first)
    tl.assume(count > 0)
    if OVERLAP:
        gdc_launch_dependents()
        prefetch(words + rows * W, first * BLOCK_W, W, 4 * BLOCK_W)
        gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, count, num_stages=STAGES):
        start = (first + step) * BLOCK_W
        word = start + offsets
        # Past the last word inputs are zero: any weight will do.
        if EVEN:
            w = tl.load(words + rows * W + word[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(words + rows * W + word[None, :], mask=(word < W)[None, :], other=0)
        scale = 1.0
        zero = 2.0 ** (BITS - 1)
        if GROUP_WORDS == 0:
            if ROW_ZERO:
                zero = row_zero
        else:
            group = start // GROUP_WORDS + tl.arange(0, GROUPS)
            at = rows * G + group[None, :]
            here = (group < G)[None, :]
            scale = tl.load(scales + at) if EVEN else tl.load(scales + at, mask=here, other=0.0)
            scale = scale.to(tl.float32)[:, :, None]
            if HAS_ZEROS:
                zero = tl.load(zeros + at) if EVEN else tl.load(zeros + at, mask=here, other=0)
                zero = zero.to(tl.float32)[:, :, None]
        bits = w.to(tl.uint32, bitcast=True)
        weights = weights_of(bits, zero, scale, BITS, GROUPS, x.dtype.element_ty, INTERPRETED)
        values = tl.load(x_rows + ((first + step) * WIDTH + inputs)[:, None])
        if INTERPRETED:
            weights, values = weights.to(tl.float32), values.to(tl.float32)
        acc = tl.dot(weights, values, acc, input_precision="ieee")
    if GROUP_WORDS == 0:
        acc *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tile += tl.program_id(1) * tiles
    finish(acc, bias, y, partials, counters, tile, split, n, m, M, N, splits, HAS_BIAS)


def packed_split_candidates(rows: int, packed: PackedWeight) -> tuple[Config, ...]:
    """For a bucket of rows: the tiles, with their splits."""
    tiles = _TILES[packed.bits, min(128, max(16, rows))]
    per = 32 // packed.bits
    # An input has two bytes, a word four.
    stage_bytes = [c.block_k * (2 * per * c.block_m + 4 * c.block_n) for c in tiles]
    return with_splits(tiles, stage_bytes, packed.words)


def in_order(x: Tensor, per: int, chunk: int, step: int, steps: int, *, overlap: bool) -> Tensor:
    """Rows [M, K] as `order_kernel` leaves them."""
    width = steps * per * step
    ordered = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    order_kernel[(x.shape[0], -(-width // _ORDER_BLOCK))](
        x,
        ordered,
        x.shape[1],
        width,
        PER=per,
        CHUNK=chunk,
        STEP=step,
        BLOCK=_ORDER_BLOCK,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )
    return ordered


def split_packed(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    y: Tensor,
    counters: Tensor,
    config: Config,
) -> None:
    """Computes x [M, K] @ weightᵀ + bias into y [M, N]."""
    rows, (out_features, width) = x.shape[0], packed.words.shape
    all_steps = -(-width // config.block_k)
    per = 32 // packed.bits
    ordered = in_order(x, per, WORDS_PER_CHUNK, config.block_k, all_steps, overlap=config.overlap)
    grid, splits, steps, partials = plan(rows, out_features, all_steps, config, x.device)
    whole_row = packed.group_shift == WHOLE_ROW
    packed_split_kernel[grid](
        ordered,
        packed.words,
        packed.scales,
        packed.scales if packed.zeros is None else packed.zeros,
        packed.scales if bias is None else bias,
        y,
        counters if partials is None else partials,
        counters,
        rows,
        out_features,
        width,
        packed.scales.shape[1],
        splits,
        steps,
        all_steps,
        BITS=packed.bits,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_W=config.block_k,
        EVEN=width % config.block_k == 0,
        GROUP_WORDS=0 if whole_row else WORDS_PER_CHUNK << packed.group_shift,
        HAS_ZEROS=packed.zeros is not None,
        HAS_BIAS=bias is not None,
        OVERLAP=config.overlap,
        STAGES=config.stages,
        INTERPRETED=INTERPRETED,
        num_warps=config.num_warps,
        launch_pdl=config.overlap,
    )
