"""Blocks of all caches into rows and back: one launch, however many layers there are."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamserve_kernels.block_rows import BlockRows
from streamserve_kernels.triton.runtime import jit

_WORDS = 2048  # of a program


@jit
def _rows_kernel(
    addresses, widths, columns, block_ids, rows, row_words, PACK: tl.constexpr, BLOCK: tl.constexpr
):
    """Row `program_id(0)`, the part of cache `program_id(1)`, its piece `program_id(2)`."""
    row = tl.program_id(0).to(tl.int64)
    cache = tl.program_id(1)
    words = tl.load(widths + cache)
    base = tl.load(addresses + cache).to(tl.pointer_type(tl.int64))
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < words
    in_cache = base + tl.load(block_ids + row) * words + at
    in_row = rows + row * row_words + tl.load(columns + cache) + at
    if PACK:
        tl.store(in_row, tl.load(in_cache, mask=inside), mask=inside)
    else:
        tl.store(in_cache, tl.load(in_row, mask=inside), mask=inside)


class TritonBlockRows(BlockRows):
    """See `BlockRows`. Blocks that are no multiple of 8 bytes are left to torch."""

    def __init__(self, caches: Sequence[Tensor]) -> None:
        super().__init__(caches)
        starts = [sum(self.widths[:i]) for i in range(len(self.widths))]
        table = [[cache.data_ptr() for cache in self.caches], self.widths, starts]
        self._table = torch.tensor(table, dtype=torch.int64, device=self.device)
        self._num_pieces = triton.cdiv(max(self.widths), _WORDS)

    def pack(self, block_ids: Tensor, rows: Tensor) -> None:
        """See `BlockRows.pack`."""
        if self.dtype != torch.int64:
            super().pack(block_ids, rows)
        else:
            self._run(block_ids, rows, pack=True)

    def unpack(self, rows: Tensor, block_ids: Tensor) -> None:
        """See `BlockRows.unpack`."""
        if self.dtype != torch.int64:
            super().unpack(rows, block_ids)
        else:
            self._run(block_ids, rows, pack=False)

    def _run(self, block_ids: Tensor, rows: Tensor, *, pack: bool) -> None:
        if len(block_ids) == 0:
            return
        addresses, widths, columns = self._table
        grid = (len(block_ids), len(self.caches), self._num_pieces)
        _rows_kernel[grid](
            addresses, widths, columns, block_ids, rows, self.width,
            PACK=pack, BLOCK=_WORDS, num_warps=8,
        )  # fmt: skip
