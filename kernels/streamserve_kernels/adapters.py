"""Low-rank adapters beside a linear layer (LoRA, Hu et al. 2021), several of them in one step.

A row of the step belongs to an adapter's *slot* or to none; for those of slot s

    y += (x · a[s]ᵀ) · b[s]ᵀ        a [R, K], b [N, R], the adapter's scale in b

so that rows of several adapters, and rows without one, share the product with the layer's own
weight and every other product of the model (Punica, Chen et al. 2023).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor


class AdapterRows(NamedTuple):
    """Whose each row is, by row and slot by slot. No row has a slot of S or more."""

    slots: Tensor  # [rows] int32, -1 for none
    order: Tensor  # [rows] int32: the rows of each slot in turn, and then those of none
    starts: Tensor  # [S + 1] int32: where in `order` a slot's begin

    @classmethod
    def of(
        cls, slots: NDArray[np.int32], device: torch.device, num_slots: int | None = None
    ) -> AdapterRows:
        """Of `slots` [rows] as above; S is no larger than need be, unless it is given."""
        if num_slots is None:
            num_slots = int(slots.max(initial=-1)) + 1
        order, starts = group_rows(slots, num_slots)
        return cls(*(torch.from_numpy(part).to(device) for part in (slots, order, starts)))


def group_rows(
    slots: NDArray[np.int32], num_slots: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """`order` and `starts` of an `AdapterRows`."""
    keys = np.where(slots < 0, num_slots, slots)
    order = np.argsort(keys, kind="stable").astype(np.int32)
    starts = np.searchsorted(keys[order], np.arange(num_slots + 1)).astype(np.int32)
    return order, starts


class StepAdapters(NamedTuple):
    """Those of the step's tokens [T], and of the rows that need logits [L]."""

    tokens: AdapterRows
    logits: AdapterRows

    def of(self, num_rows: int) -> AdapterRows:
        """What is multiplied are the tokens or the rows that need logits: where T = L, all."""
        return self.tokens if num_rows == self.tokens.order.shape[0] else self.logits


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
        self.make_room(num_slots)

    def make_room(self, num_slots: int) -> None:
        """Called once, for what a backend holds besides, or instead of, `entries`."""

    def set(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Give a slot its matrices, a [R, K] and b [N, R]. Raises ValueError as `check` does."""
        self.check(a, b)
        self.entries[slot] = (
            a.to(self.device, self.dtype).contiguous(),
            b.to(self.device, self.dtype).contiguous(),
        )

    def check(self, a: Tensor, b: Tensor) -> int:
        """The rank of matrices that fit. Raises ValueError for others."""
        rank = a.shape[0]
        if rank > self.max_rank:
            raise ValueError(f"an adapter of rank {rank} where {self.max_rank} is the largest")
        if a.shape != (rank, self.in_features) or b.shape != (self.out_features, rank):
            raise ValueError(
                f"an adapter of {tuple(a.shape)} and {tuple(b.shape)} beside a weight of "
                f"{(self.out_features, self.in_features)}"
            )
        return rank

    def clear(self, slot: int) -> None:
        """Take a slot's matrices away. No step that uses them may run."""
        self.entries[slot] = None


def add_adapters(y: Tensor, x: Tensor, table: AdapterTable, rows: AdapterRows | None) -> Tensor:
    """Adds to rows of y [rows, N] what their adapters make of x [rows, K]; returns y.

    In float32, rounded to the table's dtype between the two products, and once at the end.
    """
    assert rows is not None
    for slot, (start, end) in enumerate(pairwise(rows.starts.tolist())):
        entry = table.entries[slot]
        if start == end or entry is None:  # this adapter leaves the layer alone
            continue
        ids, (a, b) = rows.order[start:end], entry
        low = F.linear(x[ids].float(), a.float()).to(table.dtype)
        y[ids] = (y[ids].float() + F.linear(low.float(), b.float())).to(y.dtype)
    return y
