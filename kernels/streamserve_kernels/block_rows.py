"""A block of every cache as one row, so that it can leave the device in one piece."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor


class BlockRows:
    """Packs blocks [B, ...] of the caches into rows [n, W] and back, in plain torch.

    A row holds one block of each cache, in their order, as words of ``dtype``. The caches are
    contiguous, on one device, and stay where they are.
    """

    def __init__(self, caches: Sequence[Tensor]) -> None:
        num_bytes = [cache.stride(0) * cache.element_size() for cache in caches]
        self.dtype = torch.int64 if all(size % 8 == 0 for size in num_bytes) else torch.uint8
        self.num_blocks = caches[0].shape[0]
        self.device = caches[0].device
        self.caches = [cache.view(self.num_blocks, -1).view(self.dtype) for cache in caches]
        self.widths = [cache.shape[1] for cache in self.caches]
        self.width = sum(self.widths)

    def pack(self, block_ids: Tensor, rows: Tensor) -> None:
        """Blocks `block_ids` [n] int64 into `rows` [n, W]."""
        for cache, part in zip(self.caches, torch.split(rows, self.widths, 1), strict=True):
            part.copy_(cache.index_select(0, block_ids))

    def unpack(self, rows: Tensor, block_ids: Tensor) -> None:
        """`rows` [n, W] into blocks `block_ids` [n] int64, no two of which are the same."""
        for cache, part in zip(self.caches, torch.split(rows, self.widths, 1), strict=True):
            cache.index_copy_(0, block_ids, part)


def block_rows(caches: Sequence[Tensor]) -> BlockRows:
    """The fastest one for the caches' device."""
    if caches[0].device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        module = importlib.import_module("streamserve_kernels.triton.block_rows")
        return cast(BlockRows, module.TritonBlockRows(caches))
    return BlockRows(caches)
