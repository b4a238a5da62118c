"""Low-rank adapters on bfloat16 rows: tables that `adapters.c` reads by address."""

from __future__ import annotations

import torch
from torch import Tensor

from streamserve_kernels import adapters
from streamserve_kernels.adapters import AdapterRows
from streamserve_kernels.native.execute import pack_step, run_at_once
from streamserve_kernels.pool import pool

_INPUTS, _OUTPUTS = 32, 16  # a's rows and b's columns are padded to whole multiples
_ENTRY = 3  # addresses of a and b, rank
# Rows times inputs below which one thread is enough.
_PARALLEL_ELEMENTS = 16384


class AdapterTable(adapters.AdapterTable):
    """As the naive one, of bfloat16 and packed; `max_rank` is even, as packed ranks are."""

    def make_room(self, num_slots: int) -> None:
        if self.dtype != torch.bfloat16:
            raise TypeError(f"the native kernels take bfloat16 adapters, got {self.dtype}")
        self.max_rank += self.max_rank % 2
        self.addresses = torch.zeros(num_slots, _ENTRY, dtype=torch.int64)

    def set(self, slot: int, a: Tensor, b: Tensor) -> None:
        super().set(slot, a, b)
        entry = self.entries[slot]
        assert entry is not None
        rank = a.shape[0] + a.shape[0] % 2
        inputs = -(-self.in_features // _INPUTS) * _INPUTS
        outputs = -(-self.out_features // _OUTPUTS) * _OUTPUTS
        down = torch.zeros(rank, inputs, dtype=torch.bfloat16)
        down[: a.shape[0], : self.in_features] = entry[0]
        up = torch.zeros(rank // 2, 2, outputs, dtype=torch.bfloat16)
        up.view(rank, outputs)[: a.shape[0], : self.out_features] = entry[1].t()
        up = up.transpose(1, 2).contiguous()
        self.entries[slot] = (down, up)
        self.addresses[slot] = torch.tensor([down.data_ptr(), up.data_ptr(), rank])

    def clear(self, slot: int) -> None:
        self.addresses[slot] = 0
        super().clear(slot)

    def arguments(
        self, slots: int, x: int, x_stride: int, h: int, y: int, rows_kind: int = 0
    ) -> tuple[int, ...]:
        """What both instructions of `adapters.c` take; h has rows of `max_rank`."""
        return (
            self.addresses.data_ptr(),
            slots,
            x,
            x_stride,
            self.in_features,
            h,
            self.max_rank,
            y,
            self.out_features,
            rows_kind,
        )


def add_adapters(
    y: Tensor, x: Tensor, table: adapters.AdapterTable, rows: AdapterRows | None
) -> Tensor:
    """See `naive.add_adapters`."""
    assert isinstance(table, AdapterTable)
    assert rows is not None
    if y.dtype != torch.bfloat16 or x.dtype != torch.bfloat16 or not y.is_contiguous():
        raise TypeError(f"x and y must be bfloat16, y contiguous, got {x.dtype} and {y.dtype}")
    if x.stride(1) != 1:
        x = x.contiguous()
    slots = rows.slots
    if slots.dtype != torch.int32 or slots.shape[0] != y.shape[0]:
        raise TypeError(f"a slot of int32 for each row, got {slots.shape[0]} of {slots.dtype}")
    h = torch.empty(y.shape[0], table.max_rank, dtype=torch.bfloat16)
    args = table.arguments(slots.data_ptr(), x.data_ptr(), x.stride(0), h.data_ptr(), y.data_ptr())
    threads = 1 if x.numel() < _PARALLEL_ELEMENTS else pool().threads()
    run_at_once([("adapt_down", args), ("adapt_up", args)], pack_step(y.shape[0]), threads)
    return y
