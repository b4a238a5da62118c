"""Low-rank adapters on the GPU: two launches beside a layer's own product, whoever the rows are of.

The first writes h = x · aᵀ, the second adds h · bᵀ to y (Punica's SGMV, Chen et al. 2023). Rows are
multiplied in tiles, slot by slot. Which tile is whose, each program finds from where the slots'
rows start in `order`: the launches follow from shapes, and a captured graph stays right for rows of
other adapters. Programs of tiles and ranks that are not there leave after a few loads; rows without
an adapter are in no tile.

    order   4 7 . | 0 1 2 | 9 . . | 3 . . |  5 6 8       starts  0 2 6 6 7, in tiles of three
            slot 0  slot 1          slot 3   no slot

Sums are in float32, and in an order that follows from shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from streamserve_kernels import adapters
from streamserve_kernels.adapters import AdapterRows
from streamserve_kernels.triton.runtime import INTERPRETED, jit, num_processors, overlaps

_RANKS = 16  # the fewest that a tile of the matrix units takes
_MOST_RANKS = 64  # of a tile
_FEW_ROWS = 256
_MOST_PIECES = 8


class _Tile(NamedTuple):
    """Sizes of both products, the ranks apart."""

    block_m: int
    block_k: int
    block_n: int
    num_warps: int


_FEW = _Tile(16, 128, 128, 4)
_MANY = _Tile(64, 64, 128, 4)
# Float32 is not what these kernels are for: one that is right, and fits.
_FLOAT32 = _Tile(16, 32, 32, 4)


@jit
def _tile_of(starts, S, tile, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile's slot, and its places in `order`: from the first to the slot's last; none: from 0."""
    s = tl.arange(0, BLOCK_S)
    start = tl.load(starts + s, mask=s < S, other=0)
    end = tl.load(starts + s + 1, mask=s < S, other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    before = tl.cumsum(tiles, axis=0) - tiles
    mine = (tile >= before) & (tile < before + tiles)
    first = tl.sum(tl.where(mine, start + (tile - before) * BLOCK_M, 0), axis=0)
    return tl.sum(tl.where(mine, s, 0), axis=0), first, tl.sum(tl.where(mine, end, 0), axis=0)


@jit(do_not_specialize=["num_rows"])
def shrink_kernel(
    x,  # [rows, K]
    a,  # [S, R, K], zeros behind a slot's rank
    ranks,  # [S] int32; 0: the slot's adapter leaves this layer alone
    order,  # [rows] int32
    starts,  # [S + 1] int32
    h,  # [PIECES, rows, R] float32, rows as in `order`: sums over a part of K each
    x_stride,
    num_rows,
    S,
    K,
    R,
    PIECES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched with `launch_pdl`
    INTERPRETED: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    slot, first, last = _tile_of(starts, S, tl.program_id(0), BLOCK_S, BLOCK_M)
    first_rank = tl.program_id(2) * BLOCK_R
    if (first >= last) | (first_rank >= tl.load(ranks + slot)):
        return
    places = first + tl.arange(0, BLOCK_M)
    inside = places < last
    rows = tl.load(order + places, mask=inside, other=0).to(tl.int64)
    r = first_rank + tl.arange(0, BLOCK_R)
    x_rows = x + rows[:, None] * x_stride
    a_rows = a + (slot.to(tl.int64) * R + r)[None, :] * K
    piece = tl.program_id(1)
    length = (K + PIECES * BLOCK_K - 1) // (PIECES * BLOCK_K) * BLOCK_K
    begin = piece * length
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(begin, tl.minimum(begin + length, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        values = tl.load(x_rows + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(a_rows + k[:, None], mask=(r < R)[None, :] & (k < K)[:, None], other=0.0)
        if INTERPRETED:
            values, w = values.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(values, w, acc, input_precision="ieee")
    out = h + (piece * num_rows + places).to(tl.int64)[:, None] * R
    tl.store(out + r[None, :], acc, mask=inside[:, None] & (r < R)[None, :])


@jit(do_not_specialize=["num_rows"])
def expand_kernel(
    h,  # [PIECES, rows, R] float32
    b,  # [S, N, R], zeros behind a slot's rank
    ranks,
    order,
    starts,
    y,  # [rows, N]
    num_rows,
    S,
    N,
    R,
    PIECES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """H is rounded to b's dtype, when the sums of its pieces are."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    slot, first, last = _tile_of(starts, S, tl.program_id(0), BLOCK_S, BLOCK_M)
    rank = tl.load(ranks + slot)
    if (first >= last) | (rank == 0):
        return
    places = first + tl.arange(0, BLOCK_M)
    inside = places < last
    rows = tl.load(order + places, mask=inside, other=0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = n < N
    b_rows = b + (slot.to(tl.int64) * N + n)[None, :] * R
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_rank in range(0, rank, BLOCK_R):
        r = first_rank + tl.arange(0, BLOCK_R)
        low = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for piece in tl.static_range(PIECES):
            parts = h + (piece * num_rows + places).to(tl.int64)[:, None] * R
            low += tl.load(parts + r[None, :], mask=inside[:, None] & (r < R)[None, :], other=0.0)
        w = tl.load(b_rows + r[:, None], mask=(r < R)[:, None] & is_output[None, :], other=0.0)
        low = low.to(w.dtype)
        if INTERPRETED:
            low, w = low.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(low, w, acc, input_precision="ieee")
    out = y + rows[:, None] * N + n[None, :]
    mask = inside[:, None] & is_output[None, :]
    acc += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, acc.to(y.dtype.element_ty), mask=mask)


class AdapterTable(adapters.AdapterTable):
    """As the naive one, with room for every slot from the start, which is written in place.

    A captured graph finds there what is loaded later. No step that uses a slot may run, or be
    queued, while it is written.
    """

    def make_room(self, num_slots: int) -> None:
        width = -(-self.max_rank // _RANKS) * _RANKS
        dtype, device = self.dtype, self.device
        self.a = torch.zeros(num_slots, width, self.in_features, dtype=dtype, device=device)
        self.b = torch.zeros(num_slots, self.out_features, width, dtype=dtype, device=device)
        self.ranks = torch.zeros(num_slots, dtype=torch.int32, device=device)

    def set(self, slot: int, a: Tensor, b: Tensor) -> None:
        rank = self.check(a, b)
        # Padded before they go over: one copy each.
        for part, held, columns in ((a, self.a, self.in_features), (b, self.b, rank)):
            padded = torch.zeros(held.shape[1:], dtype=self.dtype)
            padded[: part.shape[0], :columns] = part
            held[slot].copy_(padded)
        self.ranks[slot] = rank

    def clear(self, slot: int) -> None:
        self.ranks[slot] = 0


def add_adapters(
    y: Tensor, x: Tensor, table: adapters.AdapterTable, rows: AdapterRows | None
) -> Tensor:
    """See `naive.add_adapters`."""
    assert isinstance(table, AdapterTable)
    assert rows is not None
    num_rows, num_slots = rows.order.shape[0], rows.starts.shape[0] - 1
    if num_rows != y.shape[0] or num_slots > table.ranks.shape[0]:
        raise ValueError(
            f"rows of {y.shape[0]} and {table.ranks.shape[0]} slots, got {num_rows} and {num_slots}"
        )
    if not y.is_contiguous():
        raise TypeError("y must be contiguous")
    if x.stride(1) != 1:
        x = x.contiguous()
    if num_rows == 0 or num_slots == 0:
        return y
    width, device = table.a.shape[1], y.device
    tile = _FLOAT32 if table.dtype == torch.float32 else _FEW if num_rows <= _FEW_ROWS else _MANY
    block_r = min(triton.next_power_of_2(width), _MOST_RANKS)
    # Each slot has at most one tile that is not full.
    num_tiles = num_rows // tile.block_m + min(num_slots, num_rows)
    blocks = triton.cdiv(width, block_r)
    pieces = _num_pieces(num_tiles * blocks, table.in_features // (2 * tile.block_k), device)
    h = torch.empty(pieces, num_rows, width, dtype=torch.float32, device=device)
    overlap = overlaps(device)
    sizes = {
        "PIECES": pieces,
        "BLOCK_S": triton.next_power_of_2(num_slots),
        "BLOCK_M": tile.block_m,
        "BLOCK_R": block_r,
        "OVERLAP": overlap,
        "INTERPRETED": INTERPRETED,
        "num_warps": tile.num_warps,
        "launch_pdl": overlap,
    }
    shrink_kernel[(num_tiles, pieces, blocks)](
        x,
        table.a,
        table.ranks,
        rows.order,
        rows.starts,
        h,
        x.stride(0),
        num_rows,
        num_slots,
        table.in_features,
        width,
        BLOCK_K=tile.block_k,
        **sizes,
    )
    expand_kernel[(num_tiles, triton.cdiv(table.out_features, tile.block_n))](
        h,
        table.b,
        table.ranks,
        rows.order,
        rows.starts,
        y,
        num_rows,
        num_slots,
        table.out_features,
        width,
        BLOCK_N=tile.block_n,
        **sizes,
    )
    return y


def _num_pieces(num_programs: int, most: int, device: torch.device) -> int:
    """Into how many parts the inputs are cut, so that there is a program for each processor."""
    wanted = min(num_processors(device) // num_programs, most, _MOST_PIECES)
    return 1 << (max(wanted, 1).bit_length() - 1)
