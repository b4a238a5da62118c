"""bitsandbytes: NF4 and FP4 with a scale for each block of a row of numbers, and LLM.int8.

4 bits (`QuantState.as_dict` and `dequantize_4bit` in bitsandbytes/functional.py):

    weight                               [N·K/2, 1] uint8, the first code in the high half
    weight.quant_map                     [16]: what a code means
    weight.absmax                        [blocks] float32, or uint8 if it is quantised itself:
    weight.nested_quant_map              [256], with
    weight.nested_absmax                 [blocks/256] and an offset
    weight.quant_state.bitsandbytes__nf4 (or fp4) the rest, JSON in bytes

Blocks are runs of the whole matrix, row after row. 8 bits: weight [N, K] int8 and SCB [N], the
largest of each output: weight = value · SCB / 127.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from streamserve.models.quantised.packing import unpack_nibbles
from streamserve.models.quantised.reader import Part, Tensors
from streamserve_kernels.stored import GroupedWeight, OneWeight, StoredFormat, TableWeight

_STATE = ".weight.quant_state.bitsandbytes__"
# quant_storage may be of any kind: the bytes are the same.
_STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
_ANY_BYTES = (torch.uint8,)


@dataclass(frozen=True, slots=True)
class _State:
    suffix: str
    block: int
    nested_block: int | None
    offset: float


@dataclass(frozen=True, slots=True)
class BitsAndBytesReader:
    unused: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, values: Mapping[str, Any], source: str) -> BitsAndBytesReader:
        """The tensors say all."""
        return cls()

    def holds(self, tensors: Tensors, name: str) -> bool:
        return self._is_int8(tensors, name) or tensors.has_any(
            name, ".weight.absmax", ".weight.quant_map"
        )

    @staticmethod
    def _is_int8(tensors: Tensors, name: str) -> bool:
        weight = name + ".weight"
        if name + ".SCB" in tensors:
            return True
        has_table = tensors.has_any(weight, ".absmax", ".quant_map")
        return not has_table and tensors.dtype(weight) == torch.int8

    def parts(self, tensors: Tensors, name: str, rows: int, columns: int) -> Sequence[Part]:
        if self._is_int8(tensors, name):
            return (
                Part(".weight", [(rows, columns)], [torch.int8]),
                Part(".SCB", [(rows,), (rows, 1)], [torch.float32]),
                Part(".weight_format", [(), (1,)], [torch.uint8], optional=True),
            )
        state = self._state(tensors, name, rows, columns)
        if state is None:
            return (Part(_STATE + "nf4", [(0,)], _ANY_BYTES),)
        blocks = -(-rows * columns // state.block)
        dtype = tensors.dtype(name + ".weight")
        size = -(-rows * columns // 2) // (dtype.itemsize if dtype is not None else 1)
        parts = [
            Part(".weight", [(size, 1), (1, size)], _STORAGE),
            Part(".weight.quant_map", [(16,)], [torch.float32]),
            Part(state.suffix, [tensors.shape(name + state.suffix)], _ANY_BYTES),
        ]
        if state.nested_block is None:
            return (*parts, Part(".weight.absmax", [(blocks,)], [torch.float32]))
        return (
            *parts,
            Part(".weight.absmax", [(blocks,)], [torch.uint8]),
            Part(".weight.nested_quant_map", [(256,)], [torch.float32]),
            Part(".weight.nested_absmax", [(-(-blocks // state.nested_block),)], [torch.float32]),
        )

    def _state(self, tensors: Tensors, name: str, rows: int, columns: int) -> _State | None:
        suffixes = [_STATE + kind for kind in ("nf4", "fp4") if name + _STATE + kind in tensors]
        if not suffixes:
            return None
        full = name + suffixes[0]
        try:
            state = json.loads(bytes(tensors.read(full).tolist()))
            block = int(state["blocksize"])
            nested = state.get("nested_blocksize")
            shape = list(state["shape"])
            found = _State(
                suffixes[0],
                block,
                None if nested is None else int(nested),
                float(state.get("nested_offset", 0.0)),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise tensors.error(full, f"is no state of a quantised weight: {error!r}") from error
        if shape != [rows, columns] or block < 1:
            raise tensors.error(
                full,
                f"says shape {shape} in blocks of {block}; the config asks for {[rows, columns]}",
            )
        return found

    def format(self, tensors: Tensors, name: str, rows: int, columns: int) -> StoredFormat:
        if self._is_int8(tensors, name):
            return StoredFormat(8, columns, 4)
        state = self._state(tensors, name, rows, columns)
        # Without one it is refused when its parts are checked.
        return StoredFormat(4, columns if state is None else math.gcd(columns, state.block), 4)

    def read(self, tensors: Tensors, name: str, rows: int, columns: int) -> OneWeight:
        if name + ".SCB" in tensors:
            return self._read_int8(tensors, name, columns)
        state = self._state(tensors, name, rows, columns)
        assert state is not None  # its parts were checked
        absmax = tensors.read(name + ".weight.absmax")
        if state.nested_block is not None:
            values = tensors.read(name + ".weight.nested_quant_map")[absmax.long()]
            scales = tensors.read(name + ".weight.nested_absmax")
            scales = scales.repeat_interleave(state.nested_block)[: len(values)]
            absmax = values * scales + state.offset
        data = tensors.read(name + ".weight").flatten().view(torch.uint8)
        codes = unpack_nibbles(data, high_first=True)[: rows * columns].view(rows, columns)
        group = math.gcd(columns, state.block)
        return TableWeight(
            codes=codes,
            table=tensors.read(name + ".weight.quant_map").view(1, 16),
            bits=4,
            scales=absmax.repeat_interleave(state.block // group)[: rows * columns // group].view(
                rows, -1
            ),
            group=group,
        )

    def _read_int8(self, tensors: Tensors, name: str, columns: int) -> GroupedWeight:
        layout = name + ".weight_format"
        if layout in tensors and int(tensors.read(layout).reshape(-1)[0]) != 0:
            raise tensors.error(layout, "must be 0: rows one after the other")
        values = tensors.read(name + ".weight").short()
        scales = tensors.read(name + ".SCB").reshape(-1, 1)
        return GroupedWeight(
            codes=(values + 128).to(torch.uint8),
            bits=8,
            scales=scales / 127.0,
            zeros=128.0,
            group=columns,
        )
