"""FP8 checkpoints: values of float8_e4m3fn, with a scale for all, for each output or each block.

    weight            [N, K]
    weight_scale_inv  [N/rows, K/columns]   in blocks, as DeepSeek and Qwen keep them
    weight_scale      [], [1] or [N, 1]     otherwise (AutoFP8, vLLM)

Either multiplies the value (transformers' integrations/finegrained_fp8.py). Scales of activations
are for products of float8: here activations stay as they are, and `input_scale` is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from streamserve.models.quantised.options import Options
from streamserve.models.quantised.reader import FLOATS, Part, Tensors, number_bytes
from streamserve_kernels.stored import Float8Weight, StoredFormat

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class Fp8Reader:
    block: tuple[int, int] | None
    unused: tuple[str, ...] = (
        r"\.(?:input|activation|kv|k|v|q|prob)_scale(?:_inv)?",
        r"\.attn\.(?:k|v|q|prob)_scale",
    )

    @classmethod
    def from_config(cls, values: Mapping[str, Any], source: str) -> Fp8Reader:
        options = Options(values, source, "fp8")
        if (kind := options.text_or("e4m3", "fmt")) not in ("e4m3", "float8_e4m3fn"):
            raise options.unsupported("fmt", kind, "e4m3")
        block = values.get("weight_block_size")
        if block is None:
            return cls(None)
        if (
            not isinstance(block, list)
            or len(block) != 2
            or not all(isinstance(extent, int) and extent > 0 for extent in block)
        ):
            raise options.unsupported("weight_block_size", block, "[outputs, inputs], null")
        return cls((block[0], block[1]))

    def holds(self, tensors: Tensors, name: str) -> bool:
        return tensors.dtype(name + ".weight") in _FLOAT8

    def parts(self, tensors: Tensors, name: str, rows: int, columns: int) -> Sequence[Part]:
        weight = Part(".weight", [(rows, columns)], [torch.float8_e4m3fn])
        dtypes = (*FLOATS, torch.float8_e8m0fnu)
        if self.block is not None:
            shape = (-(-rows // self.block[0]), -(-columns // self.block[1]))
            return weight, Part(".weight_scale_inv", [shape], dtypes)
        return weight, Part(self._suffix(tensors, name), [(), (1,), (rows,), (rows, 1)], dtypes)

    @staticmethod
    def _suffix(tensors: Tensors, name: str) -> str:
        inverse = ".weight_scale_inv"
        return inverse if name + inverse in tensors else ".weight_scale"

    def format(self, tensors: Tensors, name: str, rows: int, columns: int) -> StoredFormat:
        group = columns if self.block is None else self.block[1]
        return StoredFormat(8, group, number_bytes(tensors, name + self._suffix(tensors, name)))

    def read(self, tensors: Tensors, name: str, rows: int, columns: int) -> Float8Weight:
        values = tensors.read(name + ".weight")
        scales = tensors.read(name + self._suffix(tensors, name)).float()
        return Float8Weight(values, scales if self.block else scales.reshape(-1, 1), self.block)
