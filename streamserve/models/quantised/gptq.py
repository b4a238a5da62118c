"""GPTQ, as AutoGPTQ and GPTQModel pack it.

    qweight  [K·bits/32, N] int32   codes of an output, packed down the column
    qzeros   [G, N·bits/32] int32   zeros of a group, packed along the row; one less in `gptq` (v1)
    scales   [G, N] float16
    g_idx    [K] int32              the group of each input; absent: K inputs in order

weight[n, k] = (code[n, k] - zero[g, n]) · scale[g, n] with g = g_idx[k]
(`QuantLinear.forward` in auto_gptq/nn_modules/qlinear/qlinear_cuda.py). In act-order the inputs of
a group lie apart: here they are brought together, and the weight says which input is which.
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

BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class GptqReader:
    bits: int
    group_size: int
    is_v1: bool
    unused: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, values: Mapping[str, Any], source: str) -> GptqReader:
        options = Options(values, source, "gptq")
        bits = options.one_of("bits", BITS)
        group_size = options.group_size("group_size")
        version = options.text_or("gptq", "checkpoint_format", "format")
        if options.flag("is_marlin_format"):
            version = "marlin"
        if version not in ("gptq", "gptq_v2"):
            raise options.unsupported("checkpoint_format", version, "gptq, gptq_v2")
        if values.get("dynamic"):
            raise options.unsupported("dynamic", values["dynamic"], "the same bits for all modules")
        if (dtype := options.text_or("int32", "pack_dtype")) != "int32":
            raise options.unsupported("pack_dtype", dtype, "int32")
        return cls(bits, group_size, version == "gptq")

    def holds(self, tensors: Tensors, name: str) -> bool:
        return tensors.has_any(name, ".qweight", ".qzeros", ".scales")

    def parts(self, tensors: Tensors, name: str, rows: int, columns: int) -> Sequence[Part]:
        group = columns if self.group_size == -1 else self.group_size
        if columns % group or columns * self.bits % 32 or rows * self.bits % 32:
            raise tensors.error(
                name + ".qweight",
                f"cannot hold {rows} outputs and {columns} inputs in {self.bits} bits "
                f"and groups of {group}",
            )
        groups = columns // group
        return (
            Part(".qweight", [(columns * self.bits // 32, rows)], [torch.int32]),
            Part(".qzeros", [(groups, rows * self.bits // 32)], [torch.int32]),
            Part(".scales", [(groups, rows)], FLOATS),
            Part(".g_idx", [(columns,)], [torch.int32, torch.int64], optional=True),
        )

    def format(self, tensors: Tensors, name: str, rows: int, columns: int) -> StoredFormat:
        return StoredFormat(
            bits=self.bits,
            group=None if self.group_size == -1 else self.group_size,
            group_bytes=2 + number_bytes(tensors, name + ".scales"),
            reordered=name + ".g_idx" in tensors,
        )

    def read(self, tensors: Tensors, name: str, rows: int, columns: int) -> GroupedWeight:
        codes = unpack_words(tensors.read(name + ".qweight").t(), self.bits, columns)
        zeros = self._zeros(tensors.read(name + ".qzeros"), rows)
        scales = tensors.read(name + ".scales").float().t().contiguous()
        group = columns if self.group_size == -1 else self.group_size
        inputs = None
        if name + ".g_idx" in tensors:
            inputs = act_order(tensors, name + ".g_idx", group)
        if inputs is not None:
            codes = codes[:, inputs]
        return GroupedWeight(
            codes=codes.contiguous(),
            bits=self.bits,
            scales=scales,
            zeros=one_if_equal(zeros.t().float().contiguous()),
            group=group,
            inputs=inputs,
        )

    def _zeros(self, words: Tensor, rows: int) -> Tensor:
        """Words [G, N·bits/32] -> zeros [G, N] uint8, the one put back.

        Of 2, 4 or 8 bits it was taken from whole words, a zero of 0 borrowing from the next field,
        and so it is given back (`convert_gptq_v1_to_v2_format_module` in gptqmodel/utils/model.py).
        """
        if not self.is_v1:
            return unpack_words(words, self.bits, rows)
        if 32 % self.bits:
            return unpack_words(words, self.bits, rows).add_(1).bitwise_and_(2**self.bits - 1)
        ones = sum(1 << shift for shift in range(0, 32, self.bits))
        return unpack_words((words.long() + ones).to(torch.int32), self.bits, rows)


def act_order(tensors: Tensors, name: str, group: int) -> Tensor | None:
    """Inputs in the order of their groups, [K] int64; None where they stand in it already."""
    g_idx = tensors.read(name).long()
    in_order = torch.arange(len(g_idx)) // group
    if torch.equal(g_idx, in_order):
        return None
    ordered, inputs = g_idx.sort(stable=True)
    if not torch.equal(ordered, in_order):
        raise tensors.error(name, f"does not put {group} inputs into each group")
    return inputs
