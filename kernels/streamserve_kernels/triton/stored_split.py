"""Products of up to 128 rows with stored weights of 2 to 8 bits: `split` for those.

Planes of codes are read as words: place j of a word is its j-th code. Beside a plane of one or two
high bits, whose words have more of them, two or four words of low ones belong to each.
`packed_split` says how weights get to the matrix units; what a table holds goes through shared
memory after all.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from streamserve_kernels.triton.packed_split import (
    eight_places,
    four_places,
    in_mantissa,
    in_order,
)
from streamserve_kernels.triton.runtime import INTERPRETED, jit
from streamserve_kernels.triton.split import SHARED_BYTES, finish, plan, prefetch, with_splits
from streamserve_kernels.triton.stored_kernels import KernelWeight, numbers_of
from streamserve_kernels.triton.tuning import Config

_STEP_INPUTS = 64  # that the planes of a step's least words are whole for

_WORD_CODES = 256  # of a step, at most: what it needs of x would not fit

# By rows: tiles, in words, without their splits.
_TILES = {
    16: (Config("split", 16, 128, 16, 4, 4, overlap=True),),
    32: (Config("split", 32, 128, 16, 4, 4, overlap=True),),
    64: (Config("split", 64, 128, 16, 4, 3, overlap=True),),
    128: (Config("split", 128, 128, 16, 8, 3, overlap=True),),
}


@jit
def _part_of_code(words, PLACE: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """The bits of a place as a number."""
    unit: tl.constexpr = 2 ** (PLACE * BITS % 16)
    half = words if PLACE * BITS < 16 else words >> 16
    bits = in_mantissa(half, (2**BITS - 1) * unit, INTERPRETED)
    return bits * (1.0 / unit) - 8388608.0 / unit  # exact


@jit
def _float8(words, PLACE: tl.constexpr):
    """The e4m3 number of a place."""
    top = words << (24 - 8 * PLACE)
    bits = (top & 0x80000000) | ((top >> 4) & 0x07F00000)
    value = bits.to(tl.float32, bitcast=True) * 2.0**120
    return tl.where((top & 0x7F000000) == 0x7F000000, float("nan"), value)


@jit
def _place(
    words,  # (low, high) [BLOCK_N, BLOCK_W] uint32, which this place's bits are in
    numbers,  # (scale, offset) [BLOCK_N, GROUPS, 1]
    rows,
    weight,
    PLACE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZERO: tl.constexpr,
    FLOAT8: tl.constexpr,
    GROUPS: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The weights of one place."""
    IN_LOW: tl.constexpr = PLACE % (32 // LOW)
    low, high = words
    if FLOAT8:
        value = _float8(low, IN_LOW)
    elif weight.table is not None:
        code = (low >> (IN_LOW * LOW)) & (2**LOW - 1)
        if HIGH:
            code |= ((high >> (PLACE * HIGH)) & (2**HIGH - 1)) << LOW
        value = tl.load(weight.table + rows * weight.TABLE_ROW + code)
    else:
        value = _part_of_code(low, IN_LOW, LOW, INTERPRETED)
        if HIGH:
            value += _part_of_code(high, PLACE, HIGH, INTERPRETED) * 2.0**LOW
    scale, offset = numbers
    value = tl.reshape(value, (low.shape[0], GROUPS, low.shape[1] // GROUPS))
    if weight.OFFSETS == 1:
        value -= ZERO
    elif weight.OFFSETS == 2:
        value -= offset
    if weight.SCALES_PER >= 0:
        value *= scale
    if weight.OFFSETS == 3:
        value -= offset
    return tl.reshape(value, (low.shape[0], low.shape[1])).to(dtype)


@jit
def _places(
    words,
    numbers,
    rows,
    weight,
    FIRST: tl.constexpr,
    AT_ONCE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZERO: tl.constexpr,
    FLOAT8: tl.constexpr,
    GROUPS: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The weights of four or eight places, one after the other."""
    a = _place(
        words, numbers, rows, weight, FIRST, LOW, HIGH, ZERO, FLOAT8, GROUPS, dtype, INTERPRETED
    )
    b = _place(
        words, numbers, rows, weight, FIRST + 1, LOW, HIGH, ZERO, FLOAT8, GROUPS, dtype, INTERPRETED
    )
    c = _place(
        words, numbers, rows, weight, FIRST + 2, LOW, HIGH, ZERO, FLOAT8, GROUPS, dtype, INTERPRETED
    )
    d = _place(
        words, numbers, rows, weight, FIRST + 3, LOW, HIGH, ZERO, FLOAT8, GROUPS, dtype, INTERPRETED
    )
    if AT_ONCE == 4:
        weights = four_places(a, b, c, d)
    else:
        e = _place(
            words, numbers, rows, weight, FIRST + 4, LOW, HIGH, ZERO, FLOAT8, GROUPS, dtype,
            INTERPRETED,
        )  # fmt: skip
        f = _place(
            words, numbers, rows, weight, FIRST + 5, LOW, HIGH, ZERO, FLOAT8, GROUPS, dtype,
            INTERPRETED,
        )  # fmt: skip
        g = _place(
            words, numbers, rows, weight, FIRST + 6, LOW, HIGH, ZERO, FLOAT8, GROUPS, dtype,
            INTERPRETED,
        )  # fmt: skip
        h = _place(
            words, numbers, rows, weight, FIRST + 7, LOW, HIGH, ZERO, FLOAT8, GROUPS, dtype,
            INTERPRETED,
        )  # fmt: skip
        weights = eight_places(a, b, c, d, e, f, g, h)
    return weights


@jit(do_not_specialize=["M", "splits", "steps", "all_steps"])
def stored_split_kernel(
    x,  # [M, all_steps, PER, BLOCK_W]: see `order_kernel`
    low_words,  # [N, W * RATIO] int32
    high_words,  # [N, W] int32, or anything without HIGH
    bias,  # [N], or anything without HAS_BIAS
    y,  # [M, N]
    partials,  # [tiles, splits, BLOCK_N, BLOCK_M] float32; anything for one split
    counters,  # [tiles] int32
    M,
    N,
    W,
    splits,
    steps,  # of BLOCK_W words in a split; the last one may have fewer
    all_steps,
    weight,  # a KernelWeight
    LOW: tl.constexpr,  # bits
    HIGH: tl.constexpr,
    ZERO: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    EVEN: tl.constexpr,  # W is whole steps
    GROUP_WORDS: tl.constexpr,  # that share numbers; 0: a row does
    HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    LOW_PER: tl.constexpr = 32 // LOW
    PER: tl.constexpr = 32 // HIGH if HIGH else LOW_PER
    RATIO: tl.constexpr = PER // LOW_PER  # words of low bits beside one of high bits
    AT_ONCE: tl.constexpr = 8 if PER > 8 else PER  # places of one product
    WIDTH: tl.constexpr = AT_ONCE * BLOCK_W
    tiles = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    offsets = tl.arange(0, BLOCK_W)
    row_width = (all_steps * (PER * BLOCK_W)).to(tl.int64)
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * row_width
    x_rows += tl.arange(0, WIDTH)[:, None]
    GROUPS: tl.constexpr = (BLOCK_W + GROUP_WORDS - 1) // GROUP_WORDS if GROUP_WORDS > 0 else 1
    low_rows = low_words + rows * (W * RATIO)
    first = split * steps
    count = tl.minimum(steps, all_steps - first)
    tl.assume(count > 0)  # see `split`
    if OVERLAP:
        gdc_launch_dependents()
        prefetch(low_rows, first * (BLOCK_W * RATIO), W * RATIO, 4 * BLOCK_W * RATIO)
        gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, count, num_stages=STAGES):
        start = (first + step) * BLOCK_W
        word = start + offsets
        here = (word < W)[None, :]
        high = 0
        if HIGH:
            high_at = high_words + rows * W + word[None, :]
            high = tl.load(high_at) if EVEN else tl.load(high_at, mask=here, other=0)
            high = high.to(tl.uint32, bitcast=True)
        if GROUP_WORDS == 0:
            group = tl.arange(0, 1)
        else:
            group = start // GROUP_WORDS + tl.arange(0, GROUPS)
        known = (group < weight.G)[None, :]
        scale = 1.0
        if weight.SCALES_PER >= 0:
            scale = numbers_of(
                weight.scales, weight.scale_units, rows, group[None, :], weight.G, known,
                weight.SCALES_PER,
            )[:, :, None]  # fmt: skip
        offset = 0.0
        if weight.OFFSETS >= 2:
            offset = numbers_of(
                weight.offsets, weight.offset_units, rows, group[None, :], weight.G, known,
                weight.OFFSETS_PER,
            )[:, :, None]  # fmt: skip
        numbers = scale, offset
        for part in tl.static_range(PER // AT_ONCE):
            # One word of low bits has eight places, or sixteen; an eight of places is in one.
            low_at = low_rows + word[None, :] * RATIO + part * RATIO * AT_ONCE // PER
            low = tl.load(low_at) if EVEN else tl.load(low_at, mask=here, other=0)
            low = low.to(tl.uint32, bitcast=True)
            words = low, high
            weights = _places(
                words, numbers, rows, weight, part * AT_ONCE, AT_ONCE, LOW, HIGH, ZERO, FLOAT8,
                GROUPS, x.dtype.element_ty, INTERPRETED,
            )  # fmt: skip
            values = tl.load(x_rows + start * PER + part * WIDTH)
            if INTERPRETED:
                weights, values = weights.to(tl.float32), values.to(tl.float32)
            acc = tl.dot(weights, values, acc, input_precision="ieee")
    tile += tl.program_id(1) * tiles
    finish(acc, bias, y, partials, counters, tile, split, n, m, M, N, splits, HAS_BIAS)


class SplitWords:
    """Planes [N, bytes] of a stored weight as `stored_split_kernel` reads them."""

    def __init__(self, weight: KernelWeight, *, float8: bool) -> None:
        self.low = weight.low.view(torch.int32)
        self.high = None if weight.high is None else weight.high.view(torch.int32)
        self.steps_in = self.low if self.high is None else self.high
        low_bits, high_bits = weight.LOW_BITS.value, weight.HIGH_BITS.value
        self.per = 32 // (high_bits or low_bits)
        self.ratio = self.per * low_bits // 32
        self.weight = weight._replace(table=None) if float8 else weight
        self.float8 = float8
        whole = weight.group >= weight.low.shape[1] * 8 // low_bits
        self.group_words = 0 if whole else weight.group // self.per

    @staticmethod
    def of(weight: KernelWeight, in_features: int, *, float8: bool) -> SplitWords | None:
        """None: the planes are not whole words, or words not whole groups."""
        low, high = weight.LOW_BITS.value, weight.HIGH_BITS.value
        words, rest = divmod(weight.group, 32 // (high or low))
        in_words = weight.group >= in_features or (rest == 0 and words & (words - 1) == 0)
        if in_features % _STEP_INPUTS or not in_words:
            return None
        return SplitWords(weight, float8=float8)

    def candidates(self, rows: int) -> tuple[Config, ...]:
        """For a bucket of rows: the tiles, with their splits. The least has sixteen rows."""
        if self.per == 32 and self.weight.table is not None and rows > 64:
            return ()  # what goes through shared memory does not fit beside so many inputs
        words = 1 if self.high is None else 1 + self.ratio
        tiles, stage_bytes = [], []
        for tile in _TILES.get(max(rows, 16), ()):
            config = tile._replace(block_k=min(tile.block_k, _WORD_CODES // self.per))
            size = config.block_k * (2 * self.per * config.block_m + 4 * words * config.block_n)
            fits = size * config.stages <= SHARED_BYTES
            tiles.append(config if fits else config._replace(stages=2))
            stage_bytes.append(size)
        return with_splits(tuple(tiles), stage_bytes, self.steps_in)


def split_stored(
    x: Tensor,
    words: SplitWords,
    bias: Tensor | None,
    y: Tensor,
    counters: Tensor,
    config: Config,
) -> None:
    """Computes x [M, K] @ weightᵀ + bias into y [M, N]."""
    rows, (out_features, width) = x.shape[0], words.steps_in.shape
    all_steps = -(-width // config.block_k)
    ordered = in_order(x, words.per, 1, config.block_k, all_steps, overlap=config.overlap)
    grid, splits, steps, partials = plan(rows, out_features, all_steps, config, x.device)
    stored_split_kernel[grid](
        ordered,
        words.low,
        words.steps_in,
        words.low if bias is None else bias,
        y,
        counters if partials is None else partials,
        counters,
        rows,
        out_features,
        width,
        splits,
        steps,
        all_steps,
        words.weight,
        LOW=words.weight.LOW_BITS.value,
        HIGH=words.weight.HIGH_BITS.value,
        ZERO=words.weight.zero,
        FLOAT8=words.float8,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_W=config.block_k,
        EVEN=width % config.block_k == 0,
        GROUP_WORDS=words.group_words,
        HAS_BIAS=bias is not None,
        OVERLAP=config.overlap,
        STAGES=config.stages,
        INTERPRETED=INTERPRETED,
        num_warps=config.num_warps,
        launch_pdl=config.overlap,
    )
