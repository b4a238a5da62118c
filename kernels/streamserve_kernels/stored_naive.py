"""Stored weights as backends without a layout of their own hold them, and the naive product.

Codes lie in planes of whole powers of two bits, numbers are float16 where that is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from streamserve_kernels.interface import QuantLinear
from streamserve_kernels.quantised import Quantization
from streamserve_kernels.stored import (
    PLANES,
    FactoredNumbers,
    Float8Weight,
    GroupedWeight,
    Numbers,
    OneWeight,
    StackedWeight,
    StoredWeight,
    TableWeight,
    rows_of,
)

# Weights that are dequantised at a time.
_SLICE_ELEMENTS = 2**22


def pack_codes(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Codes [N, K] uint8 -> planes [N, bytes] uint8, lowest bits and columns first."""
    planes = []
    shift = 0
    for width in PLANES[bits]:
        per = 8 // width
        part = (codes >> shift) & (2**width - 1)
        part = F.pad(part, (0, -codes.shape[1] % per)).view(codes.shape[0], -1, per)
        packed = part[..., 0].clone()
        for place in range(1, per):
            packed |= part[..., place] << (place * width)
        planes.append(packed)
        shift += width
    return tuple(planes)


def unpack_codes(planes: Sequence[Tensor], bits: int, width: int) -> Tensor:
    """What `pack_codes` packed: codes [N, width] uint8."""
    codes: Tensor | None = None
    shift = 0
    for plane, plane_bits in zip(planes, PLANES[bits], strict=True):
        shifts = torch.arange(0, 8, plane_bits, dtype=torch.uint8, device=plane.device)
        part = ((plane[..., None] >> shifts) & (2**plane_bits - 1)).flatten(1)[:, :width]
        codes = part if codes is None else codes | (part << shift)
        shift += plane_bits
    assert codes is not None
    return codes


def narrowed_tensor(numbers: Tensor) -> Tensor:
    """The same numbers in float16, if that holds every one of them exactly, else in float32."""
    half = numbers.half()
    return half if half.float().equal(numbers.float()) else numbers.float()


def narrowed(numbers: Numbers) -> Numbers:
    """As `narrowed_tensor`, for numbers of either form."""
    if isinstance(numbers, FactoredNumbers):
        return FactoredNumbers(numbers.codes, narrowed_tensor(numbers.units), numbers.per)
    return narrowed_tensor(numbers)


def number_bytes(numbers: Numbers | float | None) -> int:
    if isinstance(numbers, FactoredNumbers):
        return numbers.codes.nbytes + numbers.units.nbytes
    return numbers.nbytes if isinstance(numbers, Tensor) else 0


def stored_name(weight: OneWeight) -> Quantization:
    """The nearest of the names that `--quantization` has."""
    if isinstance(weight, Float8Weight):
        return "fp8"
    return "int8" if weight.bits == 8 else "int4"


@dataclass(frozen=True, slots=True)
class PackedStored:
    """A stored weight with its codes (or float8 values) in planes [N, bytes]; see `pack_stored`."""

    kind: type[OneWeight]
    planes: tuple[Tensor, ...]
    bits: int
    in_features: int
    group: int
    scales: Numbers | None
    zeros: Tensor | float | None = None
    minimums: Numbers | None = None
    inputs: Tensor | None = None
    table: Tensor | None = None
    sparse: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def out_features(self) -> int:
        return self.planes[0].shape[0]

    @property
    def nbytes(self) -> int:
        tensors = (*self.planes, *(self.sparse or ()), self.inputs, self.table)
        numbers = (self.scales, self.zeros, self.minimums)
        return sum(number_bytes(one) for one in (*tensors, *numbers))

    def part(self, rows: slice | Tensor) -> OneWeight:
        """Some outputs as they were given; what stands in `sparse` is left out."""
        planes = [plane[rows] for plane in self.planes]
        scales = None if self.scales is None else rows_of(self.scales, rows)
        if self.kind is Float8Weight:
            assert isinstance(scales, Tensor)
            return Float8Weight(planes[0].view(torch.float8_e4m3fn), scales, (1, self.group))
        codes = unpack_codes(planes, self.bits, self.in_features)
        if self.kind is TableWeight:
            assert self.table is not None
            table = self.table if self.table.shape[0] == 1 else self.table[rows]
            return TableWeight(codes, table, self.bits, scales, self.group)
        assert scales is not None
        zeros = self.zeros[rows] if isinstance(self.zeros, Tensor) else self.zeros
        minimums = None if self.minimums is None else rows_of(self.minimums, rows)
        return GroupedWeight(codes, self.bits, scales, zeros, self.group, self.inputs, minimums)

    def dequantise(self, rows: slice | Tensor) -> Tensor:
        """Outputs `rows` of the weight [R, K] float32, inputs in the layer's order."""
        weight = self.part(rows).dequantise()
        if self.sparse is not None:
            at, columns, values = self.sparse
            beside = weight.new_zeros(self.out_features, self.in_features)
            beside.index_put_((at, columns), values.float(), accumulate=True)
            weight += beside[rows]
        return weight


def pack_stored(weight: OneWeight) -> PackedStored:
    """The same weight, as small as it goes."""
    if isinstance(weight, Float8Weight):
        values = weight.values.contiguous().view(torch.uint8)
        numbers = narrowed(weight.row_scales().contiguous())
        return PackedStored(Float8Weight, (values,), 8, weight.shape[1], weight.group, numbers)
    planes = pack_codes(weight.codes, weight.bits)
    width, scales = weight.shape[1], None if weight.scales is None else narrowed(weight.scales)
    if isinstance(weight, TableWeight):
        return PackedStored(
            TableWeight,
            planes,
            weight.bits,
            width,
            weight.group,
            scales,
            table=weight.table,
            sparse=weight.sparse,
        )
    zeros = weight.zeros
    if isinstance(zeros, Tensor):
        zeros = narrowed_tensor(zeros)
    minimums = None if weight.minimums is None else narrowed(weight.minimums)
    return PackedStored(
        GroupedWeight,
        planes,
        weight.bits,
        width,
        weight.group,
        scales,
        zeros,
        minimums,
        weight.inputs,
    )


class NaiveStoredLinear:
    """The product is taken in float32, of a few outputs at a time, and rounded once."""

    __slots__ = ("_packed", "bias", "dtype", "quantization")

    def __init__(self, weight: OneWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._packed = pack_stored(weight)
        self.bias = bias
        self.dtype = dtype
        self.quantization: Quantization = stored_name(weight)

    @property
    def out_features(self) -> int:
        return self._packed.out_features

    @property
    def in_features(self) -> int:
        return self._packed.in_features

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes + number_bytes(self.bias)

    def unpack(self) -> Tensor:
        """The weight [N, K] float32."""
        return self._packed.dequantise(slice(None))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] of the weight -> [T, K] in `dtype`."""
        return self._packed.dequantise(ids).to(self.dtype)

    def _pieces(self) -> Iterator[slice]:
        count = max(1, _SLICE_ELEMENTS // self.in_features)
        for start in range(0, self.out_features, count):
            yield slice(start, min(start + count, self.out_features))

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype, device=x.device)
        for rows in self._pieces():
            bias = None if self.bias is None else self.bias[rows].float()
            y[..., rows] = F.linear(wide, self._packed.dequantise(rows), bias).to(x.dtype)
        return y


class StackedLinear:
    """Outputs one after the other, of weights that are held in different ways."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[QuantLinear]) -> None:
        self.parts = tuple(parts)

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def quantization(self) -> Quantization:
        return self.parts[0].quantization

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def unpack(self) -> Tensor:
        return torch.cat([part.unpack() for part in self.parts])

    def rows(self, ids: Tensor) -> Tensor:
        return self.unpack()[ids].to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def prepare_parts(
    weight: StoredWeight,
    bias: Tensor | None,
    prepare: Callable[[OneWeight, Tensor | None], QuantLinear],
    stack: Callable[[Sequence[QuantLinear]], QuantLinear] = StackedLinear,
) -> QuantLinear:
    """Prepares a weight, or the parts of a stacked one, each with its own piece of the bias."""
    if not isinstance(weight, StackedWeight):
        return prepare(weight, bias)
    sizes = [part.shape[0] for part in weight.parts]
    biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
    return stack([prepare(*part) for part in zip(weight.parts, biases, strict=True)])
