"""The tensors of a GGUF file as the loader wants them: mapped, named, and as transformers has them.

Experts, which are stacked in one tensor, are tensors of their own here: ``ffn_up_exps.7.weight``.
What the converter changed is changed back: the order of rows and columns (`orders`), packed ones
too, the 1 that norms of some were given, and what was made of a delta net's decay. What latent
attention makes of its heads' keys and values, which newer files have apart and the former turned,
is one tensor here, as it was in older ones.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.gguf.architecture import Architecture
from streamserve.models.gguf.container import TensorEntry
from streamserve.models.gguf.kinds import GgufWeight, Kind, kind_of, served_kinds, unpack_rows
from streamserve.models.gguf.orders import Order, orders
from streamserve.models.gguf.reading import Reading

_EXPERTS = re.compile(r"(ffn_\w+_exps)\.(weight|bias)$")
_LAYER = re.compile(r"blk\.\d+\.(\w+)")
_NORM = re.compile(r"(?<!ssm_)norm\.weight$")
# What a state space has for each head, and its norm, are columns there.
_OF_HEADS = re.compile(r"\.(ssm_a|ssm_d|ssm_norm\.weight)$")
_KEYS_OF_HEADS, _VALUES_OF_HEADS, _HEADS = ".attn_k_b.", ".attn_v_b.", ".attn_kv_b."
_CONVOLUTION = re.compile(r"(ssm_conv1d|shortconv\.conv)\.weight$")
# Rows that are dequantised at a time, by their weights.
_SLICE_ELEMENTS = 2**22


@dataclass(frozen=True, slots=True)
class _Slice:
    """A tensor, or an expert's part of one."""

    entry: TensorEntry
    kind: Kind
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GgufTensors:
    """`TensorFiles` of a GGUF file; ``of_guess``: those of layers that guess further tokens.

    Raises ModelLoadError that names the file and the tensor.
    """

    def __init__(
        self, reading: Reading, architecture: Architecture, *, of_guess: bool = False
    ) -> None:
        self._norm_offset = architecture.norm_offset
        self._orders = orders(reading, architecture)
        self._slices: dict[str, _Slice] = {}
        for entry in reading.file.tensors.values():
            if reading.is_of_guess(entry.name) == of_guess:
                for name, part in _parts(entry):
                    self._slices[name] = self._in_runs(name, part)
        self._joined = dict(self._joined_heads())

    def _joined_heads(self) -> Iterator[tuple[str, tuple[str, str]]]:
        for keys in self._slices:
            values = keys.replace(_KEYS_OF_HEADS, _VALUES_OF_HEADS)
            joined = keys.replace(_KEYS_OF_HEADS, _HEADS)
            if _KEYS_OF_HEADS in keys and values in self._slices and joined not in self._slices:
                yield joined, (keys, values)

    def names(self) -> Iterator[str]:
        yield from self._slices
        yield from self._joined

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._joined:
            return self._slices[name].shape
        keys, values = (self._slices[part].shape for part in self._joined[name])
        return keys[0] * (keys[-1] + values[-2]), values[-1]

    def dtype(self, name: str) -> torch.dtype | None:
        """None for one that is packed, or made of two."""
        return None if name in self._joined else self.kind(name).plain

    def file(self, name: str) -> Path:
        part, _ = self._joined.get(name, (name, name))
        return self._slices[part].entry.file.path

    def kind(self, name: str) -> Kind:
        return self._slices[name].kind

    def kind_or_none(self, name: str) -> Kind | None:
        """None for a tensor that is not there."""
        part = self._slices.get(name)
        return None if part is None else part.kind

    def read(self, name: str) -> Tensor:
        """The tensor in its own type, a view where it can be; float32 if it is packed."""
        if name in self._joined:
            keys, values = (self.read(part).float() for part in self._joined[name])
            return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)
        part = self._slices[name]
        if part.kind.plain is not None:
            tensor = self._bytes(part).view(part.kind.plain).view(part.shape)
        else:
            tensor = self._dequantise(part)
        order = self._order(name)
        if order is not None:
            tensor = order.plain(tensor)
        if name.endswith(".ssm_a"):
            tensor = (-tensor).log()
        if self._norm_offset and _NORM.search(name):
            tensor = tensor - self._norm_offset
        return tensor

    def read_rows(self, name: str, rows: slice) -> Tensor:
        # The converter's order is undone over all rows.
        return self.read(name)[rows]

    def stored(self, name: str) -> GgufWeight | None:
        """The tensor's codes and scales; None where it is plain."""
        part = self._slices[name]
        if part.kind.plain is not None or len(part.shape) != 2:
            return None
        weight = unpack_rows(part.kind, self._bytes(part), part.shape[0])
        order = self._order(name)
        return weight if order is None else order.packed(weight)

    def release(self, name: str) -> None:
        for held in self._joined.get(name, (name,)):
            part = self._slices[held]
            part.entry.file.advise(part.start, part.start + part.nbytes, mmap.MADV_DONTNEED)

    def _bytes(self, part: _Slice) -> Tensor:
        file = part.entry.file
        file.advise(part.start, part.start + part.nbytes, mmap.MADV_WILLNEED)
        return torch.frombuffer(file.map, dtype=torch.uint8, count=part.nbytes, offset=part.start)

    def _dequantise(self, part: _Slice) -> Tensor:
        columns = part.shape[-1]
        data = self._bytes(part).view(-1, columns // part.kind.block * part.kind.nbytes)
        weight = torch.empty(data.shape[0], columns)
        rows = max(1, _SLICE_ELEMENTS // columns)
        for start in range(0, data.shape[0], rows):
            some = data[start : start + rows]
            unpacked = unpack_rows(part.kind, some.reshape(-1), some.shape[0])
            weight[start : start + rows] = unpacked.dequantise()
        return weight.view(part.shape)

    def _order(self, name: str) -> Order | None:
        layer = _LAYER.match(name)
        return self._orders.get(layer[1]) if layer is not None else None

    def _in_runs(self, name: str, part: _Slice) -> _Slice:
        """The same; of a kind whose units are a run's own where runs of columns are moved.

        Raises UnsupportedModelError where a group lies in several.
        """
        order = self._order(name)
        if order is None or not order.run or part.kind.plain is not None:
            return part
        if order.run % part.kind.group:
            raise UnsupportedModelError(
                f"{part.entry.file.path}: tensor {name} is of kind {part.kind.name}, whose groups "
                f"of {part.kind.group} do not fit value heads of {order.run}: their order cannot "
                "be undone"
            )
        return replace(part, kind=part.kind.in_runs(order.run))


def _parts(entry: TensorEntry) -> Iterator[tuple[str, _Slice]]:
    """The tensor, or its experts. Raises for a kind or an extent that cannot be read."""
    kind = kind_of(entry.kind)
    path = entry.file.path
    if kind.plain is None and kind.unpack is None:
        raise UnsupportedModelError(
            f"{path}: tensor {entry.name} is of kind {kind.name}, which is not supported; "
            f"these are: {', '.join(served_kinds())}"
        )
    count = 1
    for extent in entry.shape:
        count *= extent
    if not entry.shape or entry.shape[-1] % kind.block:
        raise ModelLoadError(
            f"{path}: tensor {entry.name} of shape {list(entry.shape)} has rows that are no "
            f"multiple of {kind.name}'s {kind.block}"
        )
    nbytes = count // kind.block * kind.nbytes
    if entry.start + nbytes > len(entry.file.map):
        raise ModelLoadError(
            f"{path}: tensor {entry.name} ({nbytes} bytes at {entry.start}) lies outside the file "
            f"({len(entry.file.map)} bytes), which is cut short: download it again"
        )
    experts = _EXPERTS.search(entry.name)
    if experts is None:
        shape = entry.shape
        if entry.name.endswith("ffn_gate_inp_shexp.weight") and len(shape) == 1:
            shape = (1, *shape)
        if _OF_HEADS.search(entry.name):
            shape = (count,)
        if _CONVOLUTION.search(entry.name) and len(shape) == 2:
            shape = (shape[0], 1, shape[1])
        # Falcon H1's has no ending, as llama.cpp looks it up.
        name = f"{entry.name}.weight" if entry.name.endswith(".ffn_norm") else entry.name
        yield name, _Slice(entry, kind, shape, entry.start, nbytes)
        return
    size = nbytes // entry.shape[0]
    for index in range(entry.shape[0]):
        name = f"{entry.name[: experts.start()]}{experts[1]}.{index}.{experts[2]}"
        yield name, _Slice(entry, kind, entry.shape[1:], entry.start + index * size, size)
