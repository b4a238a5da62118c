"""Weights in oneDNN's blocked layout, which our own kernels read as well.

For N in blocks of W outputs and K padded to Kp:

    [ceil(N / W)][Kp / 2][W][2]     two neighbours in k side by side, as the dot-product units want
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

# oneDNN chooses a layout for a number of rows; the one for 64 costs nothing at few rows and, unlike
# the one for 1, is not reordered again at every call with many.
PACKED_FOR_ROWS = 64
WIDTHS = (64, 32, 16)


def pack(weight: Tensor) -> Tensor:
    """Weight [N, K] bfloat16 -> an opaque tensor for `linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """X [..., K] @ weightᵀ + bias by oneDNN."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def address(packed: Tensor) -> int:
    """Where the packed weight lies."""
    return int(torch.ops.mkldnn.data_ptr(packed))


def _shape(packed: Tensor, width: int, out_features: int, in_features: int) -> tuple[int, ...]:
    padded = -(-in_features // 32) * 32
    return (-(-out_features // width), padded // 2, width, 2)


def packed_width(packed: Tensor, weight: Tensor) -> int | None:
    """W if the packed form of weight [N, K] bfloat16 has the layout above, else None.

    Compares the first, a middle and the last block with the weight. A weight so uniform that more
    than one W fits tells nothing, and counts as unknown.
    """
    try:
        address = int(torch.ops.mkldnn.data_ptr(packed))
        nbytes = int(torch.ops.mkldnn._nbytes(packed))
    except AttributeError:  # a torch without these operators
        return None
    out_features, in_features = weight.shape
    fitting = []
    for width in WIDTHS:
        blocks, pairs, _, _ = _shape(packed, width, out_features, in_features)
        if blocks * pairs * width * 4 != nbytes:
            continue
        if address % 64:
            continue
        block_elements = pairs * width * 2
        for b in {0, blocks // 2, blocks - 1}:
            raw = (ctypes.c_int16 * block_elements).from_address(address + 2 * b * block_elements)
            block = torch.frombuffer(raw, dtype=torch.bfloat16).view(pairs, width, 2)
            rows = block.transpose(0, 1).reshape(width, 2 * pairs)[:, :in_features]
            expected = weight[b * width : (b + 1) * width]
            if not torch.equal(rows[: expected.shape[0]], expected):
                break
        else:
            fitting.append(width)
    return fitting[0] if len(fitting) == 1 else None
