"""MXFP4, as gpt-oss's experts are published: 4-bit floats with a power of two for each 32 of them.

OCP Microscaling Formats 1.0, section 5.2: codes are E2M1 with the sign in the highest bit, a byte
holds two with the first in its low half, a block's scale is 2 to the power of its byte less 127.

    name_blocks  [experts, N, K/32, 16] uint8
    name_scales  [experts, N, K/32] uint8
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamserve.models.quantised.packing import unpack_nibbles
from streamserve.models.quantised.reader import Part, Tensors
from streamserve_kernels.stored import StoredFormat, TableWeight

BLOCK = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
_BIAS = 127


@dataclass(frozen=True, slots=True)
class Mxfp4Reader:
    unused: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, values: Mapping[str, Any], source: str) -> Mxfp4Reader:
        """There is one layout only."""
        return cls()

    def holds(self, tensors: Tensors, name: str) -> bool:
        return tensors.has_any(name, "_blocks", "_scales")

    def parts(self, tensors: Tensors, name: str, rows: int, columns: int) -> Sequence[Part]:
        blocks = (rows, columns // BLOCK)
        return (
            Part("_blocks", [(*blocks, BLOCK // 2)], [torch.uint8]),
            Part("_scales", [blocks], [torch.uint8]),
        )

    def format(self, tensors: Tensors, name: str, rows: int, columns: int) -> StoredFormat:
        return StoredFormat(bits=4, group=BLOCK)

    def read(self, tensors: Tensors, name: str, rows: int, columns: int) -> TableWeight:
        return table_weight(tensors.read(name + "_blocks"), tensors.read(name + "_scales"))


def table_weight(blocks: Tensor, scales: Tensor) -> TableWeight:
    """Blocks [N, K / 32, 16] and scales [N, K / 32], bytes both, as a weight [N, K]."""
    codes = unpack_nibbles(blocks, high_first=False).flatten(1)
    exponents = scales.to(torch.int32) - _BIAS
    powers = torch.ldexp(torch.ones(scales.shape), exponents)
    return TableWeight(codes, torch.tensor([VALUES]), bits=4, scales=powers, group=BLOCK)
