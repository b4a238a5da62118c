"""SqueezeLLM: a table of values for each output, and outliers beside it.

`QuantLinearLUT` in squeezellm/quant.py (https://github.com/SqueezeAILab/SqueezeLLM):

    qweight       [K·bits/32, N] int32   codes of an output, packed down the column as GPTQ's
    lookup_table  [N, 2**bits]
    rows, cols, vals                     outliers in compressed rows, added to what the table gives
    full_rows [K, topX], full_row_indices [topX]   outputs that are added whole
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamserve.models.quantised.options import Options
from streamserve.models.quantised.packing import unpack_words
from streamserve.models.quantised.reader import FLOATS, Part, Tensors
from streamserve_kernels.stored import TABLE_STEPS, StoredFormat, TableWeight

BITS = (3, 4)
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class SqueezeLlmReader:
    bits: int
    # How upstream's kernel spreads the outliers over threads, and their number.
    unused: tuple[str, ...] = (r"\.startrows", r"sparse_threshold\..*")

    @classmethod
    def from_config(cls, values: Mapping[str, Any], source: str) -> SqueezeLlmReader:
        options = Options(values, source, "squeezellm")
        return cls(options.one_of("wbits", BITS, "bits", "w_bit"))

    def holds(self, tensors: Tensors, name: str) -> bool:
        return tensors.has_any(name, ".qweight", ".lookup_table")

    def parts(self, tensors: Tensors, name: str, rows: int, columns: int) -> Sequence[Part]:
        if columns * self.bits % 32:
            raise tensors.error(
                name + ".qweight", f"cannot hold {columns} inputs in {self.bits} bits"
            )
        parts = [
            Part(".qweight", [(columns * self.bits // 32, rows)], [torch.int32]),
            Part(".lookup_table", [(rows, 2**self.bits)], FLOATS),
        ]
        if any(name + suffix in tensors for suffix in (".rows", ".cols", ".vals")):
            found = [name + suffix for suffix in (".cols", ".vals") if name + suffix in tensors]
            count = math.prod(tensors.shape(found[0])) if found else 0
            parts += [
                Part(".rows", [(rows + 1,)], _INTEGERS),
                Part(".cols", [(count,)], _INTEGERS),
                Part(".vals", [(count,)], FLOATS),
            ]
        if tensors.has_any(name, ".full_rows", ".full_row_indices"):
            top = 0
            if name + ".full_rows" in tensors:
                top = math.prod(tensors.shape(name + ".full_rows")) // columns
            parts += [
                Part(".full_rows", [(columns, top)], FLOATS),
                Part(".full_row_indices", [(top,)], _INTEGERS),
            ]
        return parts

    def format(self, tensors: Tensors, name: str, rows: int, columns: int) -> StoredFormat:
        outliers = sum(
            math.prod(tensors.shape(name + suffix))
            for suffix in (".vals", ".full_rows")
            if name + suffix in tensors
        )
        # An outlier has the numbers of its output and its input and a value.
        row_bytes = 4 * 2**self.bits + outliers * 20 / rows
        return StoredFormat(self.bits, None, 0, row_bytes, step=TABLE_STEPS[self.bits])

    def read(self, tensors: Tensors, name: str, rows: int, columns: int) -> TableWeight:
        return TableWeight(
            codes=unpack_words(tensors.read(name + ".qweight").t(), self.bits, columns),
            table=tensors.read(name + ".lookup_table").float(),
            bits=self.bits,
            scales=None,
            group=columns,
            sparse=self._outliers(tensors, name, rows, columns),
        )

    def _outliers(
        self, tensors: Tensors, name: str, rows: int, columns: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """(output, input, value) of each, in one list."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        if name + ".rows" in tensors:
            starts = tensors.read(name + ".rows").long()
            inputs = tensors.read(name + ".cols").long()
            counts = starts.diff()
            if starts[0] != 0 or starts[-1] != len(inputs) or (counts < 0).any():
                raise tensors.error(name + ".rows", f"does not divide {len(inputs)} outliers")
            _check_range(tensors, name + ".cols", inputs, columns)
            outputs = torch.arange(rows).repeat_interleave(counts)
            found.append((outputs, inputs, tensors.read(name + ".vals").float()))
        if name + ".full_rows" in tensors:
            outputs = tensors.read(name + ".full_row_indices").long()
            _check_range(tensors, name + ".full_row_indices", outputs, rows)
            values = tensors.read(name + ".full_rows").float().t()
            found.append(
                (
                    outputs.repeat_interleave(columns),
                    torch.arange(columns).repeat(len(outputs)),
                    values.flatten(),
                )
            )
        if not found:
            return None
        first, second, third = (torch.cat(parts) for parts in zip(*found, strict=True))
        return first, second, third


def _check_range(tensors: Tensors, name: str, values: Tensor, limit: int) -> None:
    if len(values) and not (int(values.min()) >= 0 and int(values.max()) < limit):
        raise tensors.error(name, f"has numbers outside 0 to {limit - 1}")
