"""AWQ, as AutoAWQ packs it: 4 bits, a zero for each group.

The layout of version ``gemm`` (awq/modules/linear/gemm.py):

    qweight  [K, N/8] int32     eight outputs to a word, in the order 0 2 4 6 1 3 5 7
    qzeros   [K/group, N/8] int32, packed likewise
    scales   [K/group, N] float16

and of ``gemv`` (awq/modules/linear/gemv.py), in order, its groups padded to whole words and more:

    qweight  [N, K/8] int32
    qzeros   [N, width] int32
    scales   [N, 8·width] float16
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamserve.models.quantised.options import Options
from streamserve.models.quantised.packing import unpack_words
from streamserve.models.quantised.reader import FLOATS, Part, Tensors, number_bytes, one_if_equal
from streamserve_kernels.stored import GroupedWeight, StoredFormat

BITS = 4
# Where in a word output 0, 1, 2, … of its eight lies.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class AwqReader:
    group_size: int
    version: str
    unused: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, values: Mapping[str, Any], source: str) -> AwqReader:
        options = Options(values, source, "awq")
        options.one_of("bits", (BITS,), "w_bit")
        version = options.text_or("gemm", "version", "checkpoint_format", "format")
        if version not in ("gemm", "gemv"):
            raise options.unsupported("version", version, "gemm, gemv")
        return cls(options.group_size("group_size", "q_group_size"), version)

    def holds(self, tensors: Tensors, name: str) -> bool:
        return tensors.has_any(name, ".qweight", ".qzeros", ".scales")

    def _group(self, columns: int) -> int:
        return columns if self.group_size == -1 else self.group_size

    def parts(self, tensors: Tensors, name: str, rows: int, columns: int) -> Sequence[Part]:
        group = self._group(columns)
        if columns % group or rows % 8 or columns % 8:
            raise tensors.error(
                name + ".qweight",
                f"cannot hold {rows} outputs and {columns} inputs in groups of {group}",
            )
        groups = columns // group
        shapes = ((columns, rows // 8), (groups, rows // 8), (groups, rows))
        if self.version == "gemv":
            width = gemv_width(groups, group)
            shapes = ((rows, columns // 8), (rows, width), (rows, 8 * width))
        return (
            Part(".qweight", [shapes[0]], [torch.int32]),
            Part(".qzeros", [shapes[1]], [torch.int32]),
            Part(".scales", [shapes[2]], FLOATS),
        )

    def format(self, tensors: Tensors, name: str, rows: int, columns: int) -> StoredFormat:
        return StoredFormat(BITS, self._group(columns), 2 + number_bytes(tensors, name + ".scales"))

    def read(self, tensors: Tensors, name: str, rows: int, columns: int) -> GroupedWeight:
        qweight, qzeros = tensors.read(name + ".qweight"), tensors.read(name + ".qzeros")
        scales = tensors.read(name + ".scales").float()
        groups = columns // self._group(columns)
        if self.version == "gemv":
            codes = unpack_words(qweight, BITS, columns)
            zeros = unpack_words(qzeros, BITS, groups)
            scales = scales[:, :groups]
        else:
            codes, zeros = _unpack_gemm(qweight), _unpack_gemm(qzeros)
            scales = scales.t()
        return GroupedWeight(
            codes=codes.contiguous(),
            bits=BITS,
            scales=scales.contiguous(),
            zeros=one_if_equal(zeros.float()),
            group=self._group(columns),
            inputs=None,
        )


def _unpack_gemm(words: Tensor) -> Tensor:
    """Words [K, N/8] -> codes [N, K] uint8."""
    codes = unpack_words(words, BITS, 8 * words.shape[1])
    return codes.view(len(words), -1, 8)[..., _PLACES].flatten(1).t().contiguous()


def gemv_width(groups: int, group: int) -> int:
    """Words of an output's zeros: `calculate_zeros_width` in awq/modules/linear/gemv.py."""
    multiple = {64: 2, 32: 4}.get(group, 1)
    words = -(-groups // 8)
    return -(-words // multiple) * multiple
