"""One block of memory that holds all inputs of a step, on the host and on the device.

A step's arrays lie behind each other in an order and at offsets that its `StepKey` alone decides,
so one copy brings them over, and a captured graph finds them where they were at its capture::

    | input_ids | positions | slots | … | sampling | groups | block table, a row per sequence |
    |<------------------------------ one copy ------------------------- as far as it is used

The host's side is pinned and there are several of it: the next step is written while the last
one's copy may still be under way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamserve.models.batch import ForwardBatch
from streamserve.runner.cuda.step_key import StepKey
from streamserve.runner.cuda.timeline import Mark, Timeline
from streamserve_kernels import PrefixGroups
from streamserve_kernels.adapters import AdapterRows, StepAdapters
from streamserve_kernels.recurrent import StepStates

HostViews: TypeAlias = dict[str, NDArray[np.generic]]

_NUM_HOST_BUFFERS = 3  # two steps in flight, and the one that is being written
_ALIGNMENT = 16  # bytes, so that every array may be read in the widest loads


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The device's side of a step. Arrays of L rows belong to the rows that get logits."""

    batch: ForwardBatch
    sampled_rows: Tensor  # [L] int64 rows of live requests; the last row of all where none is drawn
    count_rows: Tensor  # [L] int32 rows of the penalties' table, -1: none
    temperature: Tensor  # [L] float32
    top_k: Tensor  # [L] int32
    top_p: Tensor  # [L] float64
    min_p: Tensor  # [L] float32
    uniforms: Tensor  # [L] float64
    repetition_penalty: Tensor  # [L] float32
    presence_penalty: Tensor  # [L] float32
    frequency_penalty: Tensor  # [L] float32
    drafts: Tensor  # [L] int32 what the row must draw for the next to count, -1: none waits for it
    num_before: Tensor  # [L] int32 rows of the same request right before this one


def _fields(key: StepKey, keeps_states: bool) -> list[tuple[str, type[np.generic], int]]:
    """Name, dtype and length of every array but the block table, in their order."""
    tokens, seqs = key.num_tokens, key.num_seqs
    groups = seqs // 2 if key.has_groups else 0
    return [
        ("input_ids", np.int64, tokens),
        ("positions", np.int64, tokens),
        ("slot_mapping", np.int64, tokens),
        ("logits_indices", np.int64, seqs),
        ("sampled_rows", np.int64, seqs),
        ("uniforms", np.float64, seqs),
        ("top_p", np.float64, seqs),
        ("query_start_loc", np.int32, seqs + 1),
        ("seq_lens", np.int32, seqs),
        ("count_rows", np.int32, seqs),
        ("top_k", np.int32, seqs),
        ("temperature", np.float32, seqs),
        ("min_p", np.float32, seqs),
        ("repetition_penalty", np.float32, seqs),
        ("presence_penalty", np.float32, seqs),
        ("frequency_penalty", np.float32, seqs),
        ("drafts", np.int32, seqs),
        ("num_before", np.int32, seqs),
        ("group_members", np.int32, seqs if groups else 0),
        ("group_starts", np.int32, groups + 1 if groups else 0),
        ("group_num_blocks", np.int32, groups),
        ("state_slots", np.int32, seqs if keeps_states else 0),
        ("state_saves", np.int32, tokens if keeps_states else 0),
        *_adapter_fields(key),
    ]


def _adapter_fields(key: StepKey) -> list[tuple[str, type[np.generic], int]]:
    """Of the tokens, and of the rows that get logits, where those are others."""
    if not key.num_adapters:
        return []
    sizes = {"token": key.num_tokens}
    if not key.has_all_logits:
        sizes["logits"] = key.num_seqs
    return [
        (f"{whose}_{part}", np.int32, key.num_adapters + 1 if part == "starts" else size)
        for whose, size in sizes.items()
        for part in AdapterRows._fields
    ]


def torch_dtype(dtype: type[np.generic] | np.dtype[np.generic]) -> torch.dtype:
    """Torch's name for it."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


@dataclass(frozen=True, slots=True)
class _Layout:
    fields: list[tuple[str, type[np.generic], int, int]]  # name, dtype, length, byte offset
    table: int  # byte offset of the block table


class StepArena:
    """Room for a step of any shape up to ``largest``. Its views live as long as it does."""

    def __init__(
        self,
        largest: StepKey,
        max_blocks: int,
        device: torch.device,
        timeline: Timeline,
        *,
        keeps_states: bool = False,
    ) -> None:
        """With ``keeps_states`` it holds where the sequences' states are."""
        self._max_blocks = max_blocks
        self._keeps_states = keeps_states
        self._timeline = timeline
        self._layouts: dict[StepKey, _Layout] = {}
        self._host_views: dict[tuple[int, StepKey], HostViews] = {}
        self._inputs: dict[StepKey, StepInputs] = {}
        num_bytes = self._layout(largest).table + 4 * largest.num_seqs * max_blocks
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._hosts = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            for _ in range(_NUM_HOST_BUFFERS)
        ]
        self._copied: list[Mark | None] = [None] * _NUM_HOST_BUFFERS
        self._turn = 0

    def open(self, key: StepKey) -> HostViews:
        """The host's arrays of the next step, by field name; waits until its buffer is free."""
        self._turn = (self._turn + 1) % _NUM_HOST_BUFFERS
        if (copied := self._copied[self._turn]) is not None:
            copied.wait()
        place = (self._turn, key)
        if place not in self._host_views:
            self._host_views[place] = self._views(key, self._hosts[self._turn])
        return self._host_views[place]

    def upload(self, key: StepKey, num_seqs: int) -> StepInputs:
        """Queues the copy of what `open` gave last, with ``num_seqs`` rows of the block table."""
        end = self._layout(key).table + 4 * num_seqs * self._max_blocks
        self._device[:end].copy_(self._hosts[self._turn][:end], non_blocking=True)
        self._copied[self._turn] = self._timeline.mark()
        return self.inputs(key)

    def inputs(self, key: StepKey) -> StepInputs:
        """The device's views of a shape: always the same tensors."""
        if key not in self._inputs:
            self._inputs[key] = self._device_views(key)
        return self._inputs[key]

    def _layout(self, key: StepKey) -> _Layout:
        if key not in self._layouts:
            offset = 0
            fields = []
            for name, dtype, length in _fields(key, self._keeps_states):
                fields.append((name, dtype, length, offset))
                num_bytes = length * np.dtype(dtype).itemsize
                offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            self._layouts[key] = _Layout(fields, offset)
        return self._layouts[key]

    def _views(self, key: StepKey, memory: Tensor) -> HostViews:
        layout, raw = self._layout(key), memory.numpy()
        views: HostViews = {
            name: raw[offset : offset + length * np.dtype(dtype).itemsize].view(dtype)
            for name, dtype, length, offset in layout.fields
        }
        table = raw[layout.table : layout.table + 4 * key.num_seqs * self._max_blocks]
        views["block_table"] = table.view(np.int32).reshape(key.num_seqs, self._max_blocks)
        return views

    def _device_views(self, key: StepKey) -> StepInputs:
        layout = self._layout(key)
        views = {
            name: self._device[offset : offset + length * np.dtype(dtype).itemsize].view(
                torch_dtype(dtype)
            )
            for name, dtype, length, offset in layout.fields
        }
        table = self._device[layout.table : layout.table + 4 * key.num_seqs * self._max_blocks]
        prefix_groups = None
        if key.has_groups:
            prefix_groups = PrefixGroups(
                views["group_members"], views["group_starts"], views["group_num_blocks"]
            )
        adapters = None
        if key.num_adapters:
            tokens = _adapter_rows(views, "token")
            of_logits = tokens if key.has_all_logits else _adapter_rows(views, "logits")
            adapters = StepAdapters(tokens, of_logits)
        states = None
        if self._keeps_states:
            states = StepStates(views["state_slots"], views["state_saves"])
        batch = ForwardBatch(
            input_ids=views["input_ids"],
            positions=views["positions"],
            slot_mapping=views["slot_mapping"],
            query_start_loc=views["query_start_loc"],
            seq_lens=views["seq_lens"],
            block_table=table.view(torch.int32).view(key.num_seqs, self._max_blocks),
            logits_indices=views["logits_indices"],
            prefix_groups=prefix_groups,
            adapters=adapters,
            states=states,
            max_query_len=key.max_query_len,
        )
        names = StepInputs.__dataclass_fields__.keys() - {"batch"}
        return StepInputs(batch=batch, **{name: views[name] for name in names})


def _adapter_rows(views: dict[str, Tensor], whose: str) -> AdapterRows:
    return AdapterRows(*(views[f"{whose}_{part}"] for part in AdapterRows._fields))
