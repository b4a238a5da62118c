"""Weights that somebody else quantised: what each kind is, and the naive twin of their products.

A checkpoint's reader makes one of three kinds of a module's tensors, whatever the file's layout:

    GroupedWeight   (code - zero) * scale, or code * scale - minimum (GPTQ, AWQ, GGUF, integers of
                    compressed-tensors)
    TableWeight     table[code] * scale, maybe with a few values beside it (SqueezeLLM, NF4, MXFP4)
    Float8Weight    value * scale (FP8)

`dequantise` is the specification: float32, step by step as upstream does it. A backend holds the
codes at their own width and multiplies however it likes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

# Widths of the planes that codes of so many bits are held in: 6 bits are four and two.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
# Backends pad outputs to whole multiples of so many.
STORED_OUTPUTS = 64
# Inputs that a compiled product with a table for each output takes at a time, by bits.
TABLE_STEPS = {3: 512, 4: 128}


def _to(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, FactoredNumbers):
        return FactoredNumbers(value.codes.to(device), value.units.to(device), value.per)
    if isinstance(value, _Stored):
        return value.to(device)
    return tuple(_to(part, device) for part in value) if isinstance(value, tuple) else value


class _Stored:
    """What the three kinds have in common."""

    __slots__ = ()

    def to(self, device: torch.device) -> Self:
        """The same weight on another device."""
        moved = {f.name: _to(getattr(self, f.name), device) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class FactoredNumbers:
    """Numbers [N, G] as small integers times a float32 that `per` adjacent ones share.

    `codes` are [N, G] int8, `units` [N, ceil(G / per)] float32.
    """

    codes: Tensor
    units: Tensor
    per: int

    def expand(self) -> Tensor:
        units = self.units.float().repeat_interleave(self.per, dim=1)[:, : self.codes.shape[1]]
        return units * self.codes.float()

    def rows(self, rows: slice | Tensor) -> FactoredNumbers:
        return FactoredNumbers(self.codes[rows], self.units[rows], self.per)


Numbers = Tensor | FactoredNumbers


def expand(numbers: Numbers) -> Tensor:
    """The numbers [N, G] float32."""
    return numbers.expand() if isinstance(numbers, FactoredNumbers) else numbers.float()


def rows_of(numbers: Numbers, rows: slice | Tensor) -> Numbers:
    """The numbers of some outputs."""
    return numbers.rows(rows) if isinstance(numbers, FactoredNumbers) else numbers[rows]


@dataclass(frozen=True, slots=True)
class GroupedWeight(_Stored):
    """`(code - zero) * scale`, or `code * scale - minimum`: one of zeros and minimums is given.

    Codes [N, K] uint8 below 2**bits; scales, zeros (in units of codes) and minimums [N, G], or one
    zero for all. Groups are runs of `group` columns, the last one maybe shorter. Column j
    multiplies input `inputs[j]` ([K] int64; None: input j), as act-order wants it.
    """

    codes: Tensor
    bits: int
    scales: Numbers
    zeros: Tensor | float | None
    group: int
    inputs: Tensor | None = None
    minimums: Numbers | None = None

    def __post_init__(self) -> None:
        if self.bits not in PLANES:
            raise ValueError(f"codes of {self.bits} bits are not held; of {sorted(PLANES)} are")
        if (self.zeros is None) == (self.minimums is None):
            raise ValueError("a grouped weight has either zeros or minimums")
        groups = -(-self.codes.shape[1] // self.group)
        for name in ("scales", "zeros", "minimums"):
            numbers = getattr(self, name)
            numbers = numbers.codes if isinstance(numbers, FactoredNumbers) else numbers
            if isinstance(numbers, Tensor) and numbers.shape != (self.codes.shape[0], groups):
                raise ValueError(
                    f"{name} of {tuple(numbers.shape)} for codes of {tuple(self.codes.shape)} in "
                    f"groups of {self.group}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantise(self) -> Tensor:
        """The weight [N, K] float32, inputs in the layer's order."""
        scales = _spread(expand(self.scales), self.group, self.codes.shape[1])
        codes = self.codes.float()
        if self.minimums is not None:
            minimums = _spread(expand(self.minimums), self.group, codes.shape[1])
            weight = codes * scales - minimums
        else:
            assert self.zeros is not None
            zeros = self.zeros
            if isinstance(zeros, Tensor):
                zeros = _spread(zeros.float(), self.group, codes.shape[1])
            weight = (codes - zeros) * scales
        return in_layer_order(weight, self.inputs)


@dataclass(frozen=True, slots=True)
class TableWeight(_Stored):
    """`table[code] * scale`, plus `sparse` (rows, columns, values), each given once.

    Codes [N, K] uint8; table [N, 2**bits], or [1, 2**bits] for all outputs, float32; scales [N, G]
    of runs of `group` columns.
    """

    codes: Tensor
    table: Tensor
    bits: int
    scales: Numbers | None = None
    group: int = 0
    sparse: tuple[Tensor, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.bits not in PLANES:
            raise ValueError(f"codes of {self.bits} bits are not held; of {sorted(PLANES)} are")
        if self.table.shape not in ((1, 2**self.bits), (self.codes.shape[0], 2**self.bits)):
            raise ValueError(f"a table of {tuple(self.table.shape)} for codes of {self.bits} bits")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantise(self) -> Tensor:
        """The weight [N, K] float32."""
        table = self.table.expand(self.codes.shape[0], -1)
        weight = table.gather(1, self.codes.long())
        if self.scales is not None:
            weight = weight * _spread(expand(self.scales), self.group, weight.shape[1])
        if self.sparse is not None:
            rows, columns, values = self.sparse
            weight.index_put_((rows, columns), values.float(), accumulate=True)
        return weight


@dataclass(frozen=True, slots=True)
class Float8Weight(_Stored):
    """`value * scale`: values [N, K] float8_e4m3fn.

    Scales are float32 [N, 1], [1, 1], or [ceil(N / rows), ceil(K / columns)] with
    `block` = (rows, columns).
    """

    values: Tensor
    scales: Tensor
    block: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.values.shape[1] if self.block is None else self.block[1]

    def row_scales(self) -> Tensor:
        """A scale for each output and group of columns [N, G]."""
        if self.block is None:
            return self.scales.expand(self.values.shape[0], 1)
        return self.scales.repeat_interleave(self.block[0], dim=0)[: self.values.shape[0]]

    def dequantise(self) -> Tensor:
        """The weight [N, K] float32."""
        scales = _spread(self.row_scales(), self.group, self.values.shape[1])
        return self.values.float() * scales


OneWeight = GroupedWeight | TableWeight | Float8Weight


@dataclass(frozen=True, slots=True)
class StackedWeight(_Stored):
    """Weights of the same inputs that are not held alike, their outputs one after the other."""

    parts: tuple[OneWeight, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def dequantise(self) -> Tensor:
        """The weight [N, K] float32."""
        return torch.cat([part.dequantise() for part in self.parts])


StoredWeight = OneWeight | StackedWeight


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """What a stored weight takes once it is packed, as a checkpoint's header tells: at most.

    `group_bytes` is a group's scale and zero or minimum (2 bytes each where they are float16
    numbers, else 4; factored: 1 and a share of the unit), `row_bytes` what each output has besides
    (a table of its own), `reordered` whether inputs have an order of their own,
    `step` what inputs are padded to whole multiples of.
    """

    bits: int
    group: int | None = None  # None: the whole row
    group_bytes: float = 4.0
    row_bytes: float = 0.0
    reordered: bool = False
    step: int = 32

    def nbytes(self, outputs: int, inputs: int) -> int:
        padded = -(-outputs // STORED_OUTPUTS) * STORED_OUTPUTS
        width = -(-inputs // self.step) * self.step
        groups = -(-inputs // (self.group or inputs))
        # A last unit of factored numbers may be of fewer of them.
        row = width * self.bits / 8 + math.ceil(groups * self.group_bytes + 8) + self.row_bytes
        return math.ceil(padded * row) + (12 * inputs if self.reordered else 0)


def concatenate(parts: Sequence[OneWeight]) -> StoredWeight:
    """Weights of the same inputs as one, their outputs one after the other.

    Parts that are not held alike (other kinds, bits, groups, orders of inputs: q and v of a GGUF
    file) become a `StackedWeight`, each as it is.
    """
    if len(parts) == 1:
        return parts[0]
    grouped = [part for part in parts if isinstance(part, GroupedWeight)]
    tables = [part for part in parts if isinstance(part, TableWeight)]
    floats = [part for part in parts if isinstance(part, Float8Weight)]
    if len({_form(part) for part in parts}) > 1 or not _same_order(grouped):
        return StackedWeight(tuple(parts))
    if grouped:
        return _concatenate_grouped(grouped)
    return _concatenate_tables(tables) if tables else _concatenate_float8(floats)


def _form(part: OneWeight) -> tuple[object, ...]:
    """What parts of one weight have in common."""
    if isinstance(part, GroupedWeight):
        return (GroupedWeight, part.bits, part.group, part.minimums is None)
    if isinstance(part, TableWeight):
        return (TableWeight, part.bits, part.group, part.scales is None)
    return (Float8Weight, part.group, part.block is None)


def _same_order(parts: Sequence[GroupedWeight]) -> bool:
    orders = [part.inputs for part in parts if part.inputs is not None]
    return not orders or (
        len(orders) == len(parts) and all(order.equal(orders[0]) for order in orders)
    )


def joined(parts: Sequence[Numbers]) -> Numbers:
    """The numbers of all outputs, one part's after the other's."""
    factored = [part for part in parts if isinstance(part, FactoredNumbers)]
    if len(factored) == len(parts) and len({part.per for part in factored}) == 1:
        codes = torch.cat([part.codes for part in factored])
        return FactoredNumbers(codes, torch.cat([part.units for part in factored]), factored[0].per)
    return torch.cat([expand(part) for part in parts])


def _concatenate_grouped(parts: Sequence[GroupedWeight]) -> GroupedWeight:
    first = parts[0]
    minimums = [part.minimums for part in parts if part.minimums is not None]
    zeros: Tensor | float | None = first.zeros
    if any(isinstance(part.zeros, Tensor) or part.zeros != zeros for part in parts):
        zeros = torch.cat([_every_zero(part) for part in parts])
    return GroupedWeight(
        torch.cat([part.codes for part in parts]),
        first.bits,
        joined([part.scales for part in parts]),
        zeros,
        first.group,
        first.inputs,
        joined(minimums) if minimums else None,
    )


def _every_zero(part: GroupedWeight) -> Tensor:
    if isinstance(part.zeros, Tensor):
        return part.zeros
    assert part.zeros is not None
    return torch.full_like(expand(part.scales), part.zeros)


def _concatenate_tables(parts: Sequence[TableWeight]) -> TableWeight:
    table = parts[0].table
    if any(part.table.shape != table.shape or not part.table.equal(table) for part in parts):
        table = torch.cat([part.table.expand(part.codes.shape[0], -1) for part in parts])
    elif table.shape[0] > 1:
        table = torch.cat([part.table for part in parts])
    scales = [part.scales for part in parts if part.scales is not None]
    sparse: list[tuple[Tensor, Tensor, Tensor]] = []
    start = 0
    for part in parts:
        if part.sparse is not None:
            rows, columns, values = part.sparse
            sparse.append((rows + start, columns, values))
        start += part.codes.shape[0]
    return TableWeight(
        torch.cat([part.codes for part in parts]),
        table,
        parts[0].bits,
        joined(scales) if scales else None,
        parts[0].group,
        None
        if not sparse
        else _three(*(torch.cat(column) for column in zip(*sparse, strict=True))),
    )


def _three(rows: Tensor, columns: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return rows, columns, values


def _concatenate_float8(parts: Sequence[Float8Weight]) -> Float8Weight:
    # Not every operation knows float8; bytes they all do.
    values = torch.cat([part.values.view(torch.uint8) for part in parts])
    block = parts[0].block
    if block is None:
        scales = torch.cat([part.row_scales() for part in parts])
        return Float8Weight(values.view(parts[0].values.dtype), scales)
    if all(_is_whole(part, block) for part in parts[:-1]) and parts[-1].block == block:
        scales = torch.cat([part.scales for part in parts])
    else:
        scales, block = torch.cat([part.row_scales() for part in parts]), (1, parts[0].group)
    return Float8Weight(values.view(parts[0].values.dtype), scales, block)


def _is_whole(part: Float8Weight, block: tuple[int, int] | None) -> bool:
    return block is not None and part.block == block and part.shape[0] % block[0] == 0


def _spread(numbers: Tensor, group: int, width: int) -> Tensor:
    """Numbers [N, G] -> one for each column [N, K]."""
    if numbers.shape[1] == 1:
        return numbers
    return numbers.repeat_interleave(group, dim=1)[:, :width]


def in_layer_order(weight: Tensor, inputs: Tensor | None) -> Tensor:
    """Columns [N, K] brought from where they are held to the inputs that they multiply."""
    if inputs is None:
        return weight
    ordered = torch.empty_like(weight)
    ordered[:, inputs] = weight
    return ordered
