"""Products of tens to hundreds of rows with a row-major weight, at memory speed.

The weight is the left operand of the matrix units, x the right one: so tens of rows fill a tile,
and a program takes many outputs, which spares reading x again and again. So that few outputs fill
all processors, the inputs are split between programs: each leaves its sums in `partials`, and the
one that comes last adds them up, in the order of the splits whichever it is.

`counters` are zero before a launch and after it.

What ptxas makes of such a loop hangs on little. Each program has a step to do, and says so
(`tl.assume`): with a way past the loop the sums are written by others than the matrix units, and
every product is waited for. Loads go by no mask: outputs and rows that there are not read the last
one's, and are not stored.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from streamserve_kernels.triton.runtime import INTERPRETED, bring_to_l2, jit, num_processors
from streamserve_kernels.triton.tuning import Config

SPLIT_ROWS = 128
_LEAST_OUTPUTS = 128  # of a tile that is split
_MOST_ROW_TILES = 4
_MOST_SPLITS = 16
_LEAST_STEPS = 4  # of a split: less would mostly be waiting for its first loads

# By rows: tiles that are worth a try, without their splits. Two programs on a processor, or one
# that reads x half as often.
_TILES = {
    32: (
        Config("split", 32, 128, 64, 4, 5, overlap=True),
        Config("split", 32, 256, 64, 8, 5, overlap=True),
    ),
    64: (
        Config("split", 64, 128, 64, 4, 4, overlap=True),
        Config("split", 64, 256, 64, 8, 5, overlap=True),
    ),
    128: (Config("split", 128, 256, 64, 8, 4, overlap=True),),
}
# Bytes of shared memory that programs on a processor have.
SHARED_BYTES = 225 * 1024


@jit
def finish(
    acc,  # [BLOCK_N, BLOCK_M] sums of one split
    bias,
    y,
    partials,
    counters,
    tile,
    split,
    n,
    m,
    M,
    N,
    splits,
    HAS_BIAS: tl.constexpr,
):
    """Stores the outputs of a tile, if this program is the last of its splits."""
    last = splits == 1
    if splits > 1:
        SIZE: tl.constexpr = acc.shape[0] * acc.shape[1]
        own = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1]
        own += tl.arange(0, acc.shape[1])[None, :]
        of_tile = partials + (tile * splits).to(tl.int64) * SIZE + own
        tl.store(of_tile + split.to(tl.int64) * SIZE, acc, cache_modifier=".cg")
        tl.debug_barrier()  # the whole program's stores before the one thread's release
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
        if last:
            acc = tl.zeros_like(acc)
            for _ in range(splits):
                acc += tl.load(of_tile, cache_modifier=".cg")
                of_tile += SIZE
            tl.store(counters + tile, 0)
    if last:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(
            y + m.to(tl.int64)[None, :] * N + n[:, None],
            acc.to(y.dtype.element_ty),
            mask=(n < N)[:, None] & (m < M)[None, :],
        )


@jit
def prefetch(rows, first, width, LENGTH: tl.constexpr):
    """Brings LENGTH elements from the first of each row [R, 1] of `width` on their way, to L2."""
    LINE: tl.constexpr = 128 * 8 // rows.dtype.element_ty.primitive_bitwidth
    at = tl.minimum(first + tl.arange(0, LENGTH // LINE) * LINE, width - 1)
    bring_to_l2(rows + at[None, :])


@jit(do_not_specialize=["M", "splits", "steps", "all_steps"])
def split_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N], or anything without HAS_BIAS
    y,  # [M, N]
    partials,  # [tiles, splits, BLOCK_N, BLOCK_M] float32; anything for one split
    counters,  # [tiles] int32
    M,
    N,
    K,
    splits,
    steps,  # of BLOCK_K in a split; the last one may have fewer
    all_steps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,  # K is whole steps
    HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets = tl.arange(0, BLOCK_K)
    weight_rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * K
    first = split * steps
    count = tl.minimum(steps, all_steps - first)
    tl.assume(count > 0)
    if OVERLAP:
        gdc_launch_dependents()
        prefetch(weight_rows, first * BLOCK_K, K, 4 * BLOCK_K)
        gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(0, count, num_stages=STAGES):
        k = (first + step) * BLOCK_K + offsets
        if EVEN:
            w = tl.load(weight_rows + k[None, :], eviction_policy="evict_first")
            values = tl.load(x_rows + k[:, None])
        else:
            inside = k < K
            w = tl.load(weight_rows + k[None, :], mask=inside[None, :], other=0.0)
            values = tl.load(x_rows + k[:, None], mask=inside[:, None], other=0.0)
        if INTERPRETED:
            w, values = w.to(tl.float32), values.to(tl.float32)
        acc = tl.dot(w, values, acc, input_precision="ieee")
    tile += tl.program_id(1) * tiles
    finish(acc, bias, y, partials, counters, tile, split, n, m, M, N, splits, HAS_BIAS)


def new_counters(out_features: int, device: torch.device) -> Tensor:
    """What a layer keeps for its launches, which follow each other on one stream."""
    tiles = -(-out_features // _LEAST_OUTPUTS) * _MOST_ROW_TILES
    return torch.zeros(tiles, dtype=torch.int32, device=device)


def split_candidates(rows: int, weight: Tensor) -> tuple[Config, ...]:
    """For a bucket of rows and a weight [N, K] of 2-byte numbers: the tiles, with their splits."""
    tiles = _TILES[rows]
    stage_bytes = [(c.block_m + c.block_n) * c.block_k * weight.itemsize for c in tiles]
    return with_splits(tiles, stage_bytes, weight)


def with_splits(
    tiles: tuple[Config, ...], stage_bytes: list[int], weight: Tensor
) -> tuple[Config, ...]:
    """Tiles with splits, for a weight [N, anything] of which `block_k` elements are a step."""
    row_bytes = weight.shape[1] * weight.itemsize
    configs = []
    for config, size in zip(tiles, stage_bytes, strict=True):
        at_once = max(1, min(8 // config.num_warps, SHARED_BYTES // (size * config.stages)))
        splits = num_splits(
            -(-weight.shape[0] // config.block_n),
            -(-weight.shape[1] // config.block_k),
            at_once * num_processors(weight.device),
            # Sums, float32, are written and read again, in L2: half as dear as the weight is.
            4 * config.block_m / row_bytes,
        )
        configs.append(config._replace(splits=splits))
    return tuple(configs)


def num_splits(tiles: int, steps: int, at_once: int, cost: float) -> int:
    """Splits that are worth their `cost` (1: as much as the product): few processors are idle.

    `at_once` programs run at once.
    """

    def time(splits: int) -> float:
        programs = tiles * splits
        return -(-programs // at_once) * at_once / programs + (cost + 0.01) * splits

    return min(range(1, max(1, min(_MOST_SPLITS, steps // _LEAST_STEPS)) + 1), key=time)


def plan(
    rows: int, out_features: int, all_steps: int, config: Config, device: torch.device
) -> tuple[tuple[int, int], int, int, Tensor | None]:
    """(grid, splits, steps of a split, partials) of `config` for a weight of so many steps.

    There are no more splits than have a step to do.
    """
    tiles = -(-out_features // config.block_n), -(-rows // config.block_m)
    steps = -(-all_steps // config.splits)
    splits = -(-all_steps // steps)
    partials = None
    if splits > 1:
        if tiles[1] > _MOST_ROW_TILES or config.block_n < _LEAST_OUTPUTS:
            raise ValueError(f"no counters for {rows} rows by {config}")
        size = tiles[0] * tiles[1] * splits * config.block_n * config.block_m
        partials = torch.empty(size, dtype=torch.float32, device=device)
    return (tiles[0] * splits, tiles[1]), splits, steps, partials


def split_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, counters: Tensor, config: Config
) -> None:
    """Computes x [M, K] @ weightᵀ + bias into y [M, N]."""
    rows, (out_features, in_features) = x.shape[0], weight.shape
    all_steps = -(-in_features // config.block_k)
    grid, splits, steps, partials = plan(rows, out_features, all_steps, config, x.device)
    split_kernel[grid](
        x,
        weight,
        weight if bias is None else bias,
        y,
        counters if partials is None else partials,
        counters,
        rows,
        out_features,
        in_features,
        splits,
        steps,
        all_steps,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN=in_features % config.block_k == 0,
        HAS_BIAS=bias is not None,
        OVERLAP=config.overlap,
        STAGES=config.stages,
        INTERPRETED=INTERPRETED,
        num_warps=config.num_warps,
        launch_pdl=config.overlap,
    )
