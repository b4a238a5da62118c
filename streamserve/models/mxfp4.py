"""MXFP4, as gpt-oss's experts are published: 4-bit floats with a power of two for each 32 of them.

OCP Microscaling Formats 1.0, section 5.2: codes are E2M1 with the sign in the highest bit, a byte
holds two with the first in its low half, a block's scale is 2 to the power of its byte less 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamserve.models.parameters import Module
from streamserve_kernels.stored import StoredFormat, TableWeight

BLOCK = 32
CODES, SCALES = "_blocks", "_scales"
"""What the names of the two tensors end in."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
_BIAS = 127


class Mxfp4:
    """The experts, and nothing else."""

    name = "mxfp4"

    def format(self, module: Module) -> StoredFormat | None:
        return StoredFormat(bits=4, group=BLOCK) if module.expert is not None else None


def table_weight(blocks: Tensor, scales: Tensor) -> TableWeight:
    """Blocks [N, K / 32, 16] and scales [N, K / 32], bytes both, as a weight [N, K]."""
    codes = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(1)
    exponents = scales.to(torch.int32) - _BIAS
    powers = torch.ldexp(torch.ones(scales.shape), exponents)
    return TableWeight(codes, torch.tensor([VALUES]), bits=4, scales=powers, group=BLOCK)
