"""Products with weights that have a table for each output: lines for `table_linear.c`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from streamserve_kernels.huge_pages import Arena
from streamserve_kernels.native.stored_linear import LookupLinear
from streamserve_kernels.stored import TABLE_STEPS, OneWeight, TableWeight
from streamserve_kernels.stored_naive import number_bytes, stored_name

# Words of 16 bits that hold an output's codes of a step.
WORDS = {3: 96, 4: 32}
_WIDTH = 32

_arena = Arena()


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., parts, 32] of so many bits -> words [..., 32] int16, the first part lowest."""
    words = codes[..., 0, :].to(torch.int16)
    for part in range(1, codes.shape[-2]):
        words |= codes[..., part, :].to(torch.int16) << (part * bits)
    return words


def _fields(words: Tensor, bits: int) -> Tensor:
    """What `_words` made words of."""
    shifts = torch.arange(0, 16, bits, dtype=torch.int16)[:, None]
    fields: Tensor = (words[..., None, :] >> shifts) & (2**bits - 1)
    return fields.to(torch.uint8)


class NativeTableLinear(LookupLinear):
    """SqueezeLLM's weights: looked up in the output's own table, a few values beside them."""

    __slots__ = ("_bits", "_columns", "_starts", "_table", "_values")

    operation = "table_linear"

    def __init__(self, weight: TableWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.quantization = stored_name(weight)
        self.bias = None if bias is None else bias.float().contiguous()
        self.group = self.inputs_address = 0
        self._bits = weight.bits
        # Four outputs are read at a time.
        spare = -self.out_features % 4
        self._table = pad(weight.table.float(), (0, 0, 0, spare)).contiguous()
        step = TABLE_STEPS[self._bits]
        steps = -(-self.in_features // step)
        shape = (self.out_features + spare, steps, WORDS[self._bits] * 2)
        self._codes = _arena.empty(shape, torch.uint8).zero_()
        lines = self._codes.view(torch.int16).view(*shape[:2], -1, _WIDTH)
        padded = pad(weight.codes, (0, steps * step - self.in_features, 0, spare))
        parts = padded.view(shape[0], steps, -1, _WIDTH)
        if self._bits == 4:
            lines[:, :, 0] = _words(parts, 4)
        else:
            low = (parts & 3).view(shape[0], steps, 2, 8, _WIDTH)
            lines[:, :, :2] = _words(low, 2)
            lines[:, :, 2] = _words(parts >> 2, 1)
        self._starts, self._columns, self._values = _by_output(weight)
        sparse = (self._starts, self._columns, self._values)
        self._descriptor = torch.tensor(
            (
                self._bits,
                self.out_features,
                self.in_features,
                self._codes.data_ptr(),
                self._table.data_ptr(),
                *(0 if part is None else part.data_ptr() for part in sparse),
            ),
            dtype=torch.int64,
        )

    @property
    def nbytes(self) -> int:
        sparse = (self._starts, self._columns, self._values)
        return sum(number_bytes(part) for part in (self._codes, self._table, self.bias, *sparse))

    def _weight(self) -> TableWeight:
        lines = self._codes.view(torch.int16).view(*self._codes.shape[:2], -1, _WIDTH)
        if self._bits == 4:
            codes = _fields(lines[:, :, 0], 4)
        else:
            low = _fields(lines[:, :, :2], 2).flatten(2, 3)
            codes = low | (_fields(lines[:, :, 2], 1) << 2)
        codes = codes.flatten(1)[: self.out_features, : self.in_features]
        sparse = None
        if self._starts is not None and self._columns is not None and self._values is not None:
            counts = self._starts.diff().long()
            rows = torch.arange(self.out_features).repeat_interleave(counts)
            sparse = rows, self._columns.long(), self._values
        return TableWeight(codes, self._table[: self.out_features], self._bits, sparse=sparse)

    def unpack(self) -> Tensor:
        """The weight [N, K] float32."""
        return self._weight().dequantise()

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] of the weight -> [T, K] in `dtype`."""
        return self.unpack()[ids].to(self.dtype)


def _by_output(weight: TableWeight) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where each output's values begin [N + 1] int32, their columns int32 and values float32."""
    if weight.sparse is None:
        return None, None, None
    rows, columns, values = weight.sparse
    order = rows.argsort(stable=True)
    counts = torch.bincount(rows, minlength=weight.shape[0])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return starts.int(), columns[order].int(), values[order].float().contiguous()


def prepare_tables(
    weight: OneWeight, bias: Tensor | None, dtype: torch.dtype
) -> NativeTableLinear | None:
    """The weight in lines of its outputs; None: they do not take it."""
    if not isinstance(weight, TableWeight) or weight.bits not in TABLE_STEPS:
        return None
    if weight.scales is not None or weight.table.shape[0] != weight.shape[0]:
        return None
    return NativeTableLinear(weight, bias, dtype)
