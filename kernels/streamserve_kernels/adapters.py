"""Low-rank adapters beside a linear layer (LoRA, Hu et al. 2021), several of them in one step.

A row of the step belongs to an adapter's *slot* or to none; for those of slot s

    y += (x · a[s]ᵀ) · b[s]ᵀ        a [R, K], b [N, R], the adapter's scale in b

so that rows of several adapters, and rows without one, share the product with the layer's own
weight and every other product of the model (Punica, Chen et al. 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class AdapterRows(NamedTuple):
    """Whose each row is: `slots` [rows] int32, -1 for none; the same, slot by slot, in `groups`."""

    slots: Tensor
    groups: tuple[tuple[int, Tensor], ...]  # (slot, its rows [n] int64)


class StepAdapters(NamedTuple):
    """Those of the step's tokens [T], and of the rows that need logits [L]."""

    tokens: AdapterRows
    logits: AdapterRows

    def of(self, num_rows: int) -> AdapterRows:
        """What is multiplied are the tokens or the rows that need logits: where T = L, all."""
        return self.tokens if num_rows == self.tokens.slots.shape[0] else self.logits


class AdapterTable:
    """One linear layer's adapters by slot, in `dtype` on `device`; none has more ranks than that.

    Each backend has one of its own, which its `add_adapters` takes.
    """

    def __init__(
        self,
        num_slots: int,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
        max_rank: int,
    ) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.dtype, self.device, self.max_rank = dtype, device, max_rank
        self.entries: list[tuple[Tensor, Tensor] | None] = [None] * num_slots

    def set(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Give a slot its matrices, a [R, K] and b [N, R]. Raises ValueError for other shapes."""
        rank = a.shape[0]
        if rank > self.max_rank:
            raise ValueError(f"an adapter of rank {rank} where {self.max_rank} is the largest")
        if a.shape != (rank, self.in_features) or b.shape != (self.out_features, rank):
            raise ValueError(
                f"an adapter of {tuple(a.shape)} and {tuple(b.shape)} beside a weight of "
                f"{(self.out_features, self.in_features)}"
            )
        self.entries[slot] = (
            a.to(self.device, self.dtype).contiguous(),
            b.to(self.device, self.dtype).contiguous(),
        )

    def clear(self, slot: int) -> None:
        """Take a slot's matrices away. No step that uses them may run."""
        self.entries[slot] = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for entry in self.entries if entry is not None for part in entry)


def add_adapters(y: Tensor, x: Tensor, table: AdapterTable, rows: AdapterRows | None) -> Tensor:
    """Adds to rows of y [rows, N] what their adapters make of x [rows, K]; returns y.

    In float32, rounded to the table's dtype between the two products, and once at the end.
    """
    assert rows is not None
    for slot, ids in rows.groups:
        entry = table.entries[slot]
        if entry is None:  # this adapter leaves the layer alone
            continue
        a, b = entry
        low = F.linear(x[ids].float(), a.float()).to(table.dtype)
        y[ids] = (y[ids].float() + F.linear(low.float(), b.float())).to(y.dtype)
    return y
