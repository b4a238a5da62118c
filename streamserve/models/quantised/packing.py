"""Small integers out of the words and bytes that checkpoints pack them in."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Words [N, W] int32 -> the first ``count`` codes of each row, [N, count] uint8.

    A row is one stream of bits, lowest first, so a code of 3 bits may lie in two words:

        word 0  | c0 | c1 | … | c9 | c10 lo |   word 1  | c10 hi | c11 | …
    """
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data[:, :count]
    if 8 % bits == 0:
        parts = [data >> shift for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).bitwise_and_(2**bits - 1).flatten(1)[:, :count]
    num_rows = data.shape[0]
    # 8 codes take `bits` whole bytes: each code lies in one byte, or in two that follow.
    groups = torch.nn.functional.pad(data, (0, -data.shape[1] % bits)).view(num_rows, -1, bits)
    codes = torch.empty(*groups.shape[:2], 8, dtype=torch.uint8)
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        code = groups[..., byte] >> shift
        if shift + bits > 8:
            code = code | (groups[..., byte + 1] << (8 - shift))
        codes[..., index] = code & (2**bits - 1)
    return codes.flatten(1)[:, :count]


def unpack_nibbles(data: Tensor, *, high_first: bool) -> Tensor:
    """Bytes [..., B] uint8 -> codes [..., 2·B] uint8, two to a byte."""
    low, high = data & 15, data >> 4
    return torch.stack((high, low) if high_first else (low, high), dim=-1).flatten(-2)
