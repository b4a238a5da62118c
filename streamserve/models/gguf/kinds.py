"""ggml's kinds of tensors: their blocks of bytes, unpacked to codes, scales and minimums.

A row is a run of blocks, each of 32 or 256 weights. Layouts follow ggml's ``ggml-common.h`` and
``ggml-quants.c``; a dequantised weight is the reference's to the last bit. In the comments ``n`` is
a number of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamserve_kernels.stored import FactoredNumbers, GroupedWeight, Numbers, TableWeight, joined

GgufWeight = GroupedWeight | TableWeight

SUPER_BLOCK = 256
# Weights that are unpacked at a time.
_SLICE_ELEMENTS = 2**22


@dataclass(frozen=True, slots=True)
class Kind:
    """``nbytes`` hold ``block`` weights. ``plain`` is torch's type of what is no code.

    Codes of kinds with a ``table`` are places in it.

    A kind that has neither ``plain`` nor ``unpack`` is not served.
    """

    name: str
    block: int = 1
    nbytes: int = 0
    plain: torch.dtype | None = None
    unpack: Callable[[Tensor], Blocks] | None = None
    bits: int = 0
    group: int = 0
    # Bytes of a group's scale and minimum, held as `Blocks` has them.
    group_bytes: float = 4.0
    table: tuple[int, ...] = ()

    def in_runs(self, run: int) -> Kind:
        """The same of rows whose runs of ``run`` weights were moved: none shares a unit."""
        if self.block < SUPER_BLOCK:
            return self
        per_number = self._bytes_per_number(SUPER_BLOCK)
        share = self._bytes_per_number(math.gcd(SUPER_BLOCK, run)) / per_number
        return replace(self, group_bytes=self.group_bytes * share)

    def _bytes_per_number(self, columns: int) -> float:
        """Of a group's factor and its share of a unit for ``columns``."""
        return 1 + 4 * self.group / columns


@dataclass(frozen=True, slots=True)
class Blocks:
    """Codes [n, block] uint8, scales and minimums [n, groups] or factors of them."""

    codes: Tensor
    scales: Numbers
    zero: float | None = None
    minimums: Numbers | None = None


def unpack_rows(kind: Kind, data: Tensor, rows: int) -> GgufWeight:
    """The bytes of ``rows`` whole rows (uint8) as codes, scales and what belongs to them."""
    blocks = _unpack(kind, data.view(-1, kind.nbytes))

    def by_row(numbers: Numbers) -> Numbers:
        if isinstance(numbers, FactoredNumbers):
            codes, units = numbers.codes.view(rows, -1), numbers.units.view(rows, -1)
            return FactoredNumbers(codes, units, numbers.per)
        return numbers.view(rows, -1)

    if kind.table:
        table = torch.tensor([kind.table], dtype=torch.float32)
        codes = blocks.codes.view(rows, -1)
        return TableWeight(codes, table, kind.bits, by_row(blocks.scales), kind.group)
    return GroupedWeight(
        blocks.codes.view(rows, -1),
        kind.bits,
        by_row(blocks.scales),
        blocks.zero,
        kind.group,
        None,
        None if blocks.minimums is None else by_row(blocks.minimums),
    )


def _unpack(kind: Kind, data: Tensor) -> Blocks:
    """Some blocks at a time: their bits apart take several times what the codes do."""
    assert kind.unpack is not None
    size = max(1, _SLICE_ELEMENTS // kind.block)
    if len(data) <= size:
        return kind.unpack(data)
    codes = torch.empty(len(data), kind.block, dtype=torch.uint8)
    parts = []
    for start in range(0, len(data), size):
        part = kind.unpack(data[start : start + size])
        codes[start : start + size] = part.codes
        parts.append(replace(part, codes=codes[:0]))
    first = parts[0]
    minimums = [part.minimums for part in parts if part.minimums is not None]
    return Blocks(
        codes,
        joined([part.scales for part in parts]),
        first.zero,
        joined(minimums) if minimums else None,
    )


def _half(data: Tensor) -> Tensor:
    """Two bytes [n, 2] -> the float16 that they are, [n, 1] float32."""
    return data.contiguous().view(torch.float16).float()


def _shifted(data: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """[n, a, b] -> [n, a · shifts · b]: each run of b bytes once for each shift."""
    by = torch.tensor(shifts, dtype=torch.uint8)[:, None]
    return ((data[:, :, None, :] >> by) & mask).flatten(1)


def _nibbles(data: Tensor) -> Tensor:
    """[n, 16] -> [n, 32]: the lower halves first."""
    return _shifted(data[:, None], (0, 4), 15)


def _bits(data: Tensor) -> Tensor:
    """[n, 4] -> [n, 32]: bit by bit, of a little-endian number."""
    by = torch.arange(8, dtype=torch.uint8)
    return ((data[:, :, None] >> by) & 1).flatten(1)


def _q4_0(data: Tensor) -> Blocks:
    return Blocks(_nibbles(data[:, 2:]), _half(data[:, :2]), zero=8.0)


def _q4_1(data: Tensor) -> Blocks:
    minimums = -_half(data[:, 2:4])
    return Blocks(_nibbles(data[:, 4:]), _half(data[:, :2]), minimums=minimums)


def _q5_0(data: Tensor) -> Blocks:
    codes = _nibbles(data[:, 6:]) | (_bits(data[:, 2:6]) << 4)
    return Blocks(codes, _half(data[:, :2]), zero=16.0)


def _q5_1(data: Tensor) -> Blocks:
    codes = _nibbles(data[:, 8:]) | (_bits(data[:, 4:8]) << 4)
    return Blocks(codes, _half(data[:, :2]), minimums=-_half(data[:, 2:4]))


def _q8_0(data: Tensor) -> Blocks:
    # int8 as it is, counted from its least.
    return Blocks(data[:, 2:] ^ 0x80, _half(data[:, :2]), zero=128.0)


def _q2_k(data: Tensor) -> Blocks:
    scales, quants = data[:, :16], data[:, 16:80]
    scale, minimum = _half(data[:, 80:82]), _half(data[:, 82:84])
    codes = _shifted(quants.reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    return Blocks(
        codes,
        FactoredNumbers((scales & 15).to(torch.int8), scale, 16),
        minimums=FactoredNumbers((scales >> 4).to(torch.int8), minimum, 16),
    )


def _q3_k(data: Tensor) -> Blocks:
    high, quants, packed = data[:, :32], data[:, 32:96], data[:, 96:108]
    low_codes = _shifted(quants.reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    codes = low_codes | (_shifted(high[:, None], tuple(range(8)), 1) << 2)
    low = _shifted(packed[:, None, :8], (0, 4), 15)
    scales = low | (_shifted(packed[:, None, 8:], (0, 2, 4, 6), 3) << 4)
    factors = scales.to(torch.int8) - 32
    return Blocks(codes, FactoredNumbers(factors, _half(data[:, 108:110]), 16), zero=4.0)


def _six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes [n, 12] -> eight scales and eight minimums of six bits, [n, 8] int8 each."""
    first, second, third = packed.reshape(-1, 3, 4).unbind(1)
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), dim=1)
    minimums = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), dim=1)
    return scales.to(torch.int8), minimums.to(torch.int8)


def _q4_k(data: Tensor) -> Blocks:
    scales, minimums = _six_bit_pairs(data[:, 4:16])
    codes = _shifted(data[:, 16:].reshape(-1, 4, 32), (0, 4), 15)
    return _with_minimums(codes, data, scales, minimums)


def _q5_k(data: Tensor) -> Blocks:
    scales, minimums = _six_bit_pairs(data[:, 4:16])
    low = _shifted(data[:, 48:].reshape(-1, 4, 32), (0, 4), 15)
    codes = low | (_shifted(data[:, None, 16:48], tuple(range(8)), 1) << 4)
    return _with_minimums(codes, data, scales, minimums)


def _with_minimums(codes: Tensor, data: Tensor, scales: Tensor, minimums: Tensor) -> Blocks:
    return Blocks(
        codes,
        FactoredNumbers(scales, _half(data[:, :2]), 8),
        minimums=FactoredNumbers(minimums, _half(data[:, 2:4]), 8),
    )


def _q6_k(data: Tensor) -> Blocks:
    low = _shifted(data[:, :128].reshape(-1, 2, 64), (0, 4), 15)
    high = _shifted(data[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    factors = data[:, 192:208].contiguous().view(torch.int8)
    return Blocks(
        low | (high << 4), FactoredNumbers(factors, _half(data[:, 208:210]), 16), zero=32.0
    )


def _iq4_xs(data: Tensor) -> Blocks:
    high = data[:, 2:4].contiguous().view(torch.int16).to(torch.int32)
    high = (high >> torch.arange(0, 16, 2, dtype=torch.int32)) & 3
    low = _shifted_inside(data[:, 4:8])
    factors = (low | (high << 4).to(torch.uint8)).to(torch.int8) - 32
    codes = _shifted(data[:, 8:].reshape(-1, 8, 16), (0, 4), 15)
    return Blocks(codes, FactoredNumbers(factors, _half(data[:, :2]), 8))


def _shifted_inside(data: Tensor) -> Tensor:
    """[n, a] -> [n, 2a]: each byte's lower half, then its upper one."""
    return torch.stack((data & 15, data >> 4), dim=2).flatten(1)


def _mxfp4(data: Tensor) -> Blocks:
    """A scale is a power of two; the table's numbers are doubled, so that it is halved."""
    exponent = data[:, :1].to(torch.int32)
    # The two least are no normal numbers.
    bits = torch.where(exponent < 2, 0x200000 << exponent, (exponent - 1) << 23)
    return Blocks(_nibbles(data[:, 1:]), bits.view(torch.float32))


def _super(
    name: str, nbytes: int, unpack: Callable[[Tensor], Blocks], bits: int, group: int, columns: int
) -> Kind:
    """Kinds of 256 weights, whose groups' ``columns`` numbers are bytes times two or four more."""
    group_bytes = columns * (1 + 4 * group / SUPER_BLOCK)
    return Kind(name, SUPER_BLOCK, nbytes, None, unpack, bits, group, group_bytes)


KINDS: dict[int, Kind] = {
    0: Kind("F32", 1, 4, torch.float32),
    1: Kind("F16", 1, 2, torch.float16),
    30: Kind("BF16", 1, 2, torch.bfloat16),
    28: Kind("F64", 1, 8, torch.float64),
    2: Kind("Q4_0", 32, 18, None, _q4_0, 4, 32, 4.0),
    3: Kind("Q4_1", 32, 20, None, _q4_1, 4, 32, 8.0),
    6: Kind("Q5_0", 32, 22, None, _q5_0, 5, 32, 4.0),
    7: Kind("Q5_1", 32, 24, None, _q5_1, 5, 32, 8.0),
    8: Kind("Q8_0", 32, 34, None, _q8_0, 8, 32, 4.0),
    10: _super("Q2_K", 84, _q2_k, 2, 16, 2),
    11: _super("Q3_K", 110, _q3_k, 3, 16, 1),
    12: _super("Q4_K", 144, _q4_k, 4, 32, 2),
    13: _super("Q5_K", 176, _q5_k, 5, 32, 2),
    14: _super("Q6_K", 210, _q6_k, 6, 16, 1),
}
_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
KINDS |= {
    20: Kind("IQ4_NL", 32, 18, None, _q4_0, 4, 32, 4.0, _NON_LINEAR),
    23: Kind("IQ4_XS", SUPER_BLOCK, 136, None, _iq4_xs, 4, 32, 1.5, _NON_LINEAR),
    39: Kind("MXFP4", 32, 17, None, _mxfp4, 4, 32, 4.0, _E2M1),
}
# Kinds that are named when they are refused.
_OTHERS = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
}


def kind_of(number: int) -> Kind:
    """The kind with ggml's ``number``; only its name for one that is not served."""
    return KINDS.get(number) or Kind(_OTHERS.get(number, f"number {number}"))


def served_kinds() -> tuple[str, ...]:
    return tuple(kind.name for kind in KINDS.values())
