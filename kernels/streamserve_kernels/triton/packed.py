"""The layout of integer weights on the GPU, and how codes get into it.

A word holds eight 4-bit or four 8-bit codes, unsigned, lowest first. A *chunk* is four words: 32 or
16 inputs of one output. Bits `j * bits` and up of word i hold input `j * 4 + i` of the chunk, so
that a thread that loads a chunk (16 bytes) finds the inputs of one place in its words adjacent.

`(code - zero) * scale` is the weight. The zero point is half the range unless `zeros` says
otherwise; a group of inputs shares a scale and a zero. A group is a power of two of chunks or the
whole row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from streamserve_kernels.quantised import TILE_INPUTS
from streamserve_kernels.triton.packed_gemm import unpack_kernel

WORDS_PER_CHUNK = 4
# A shift that makes group 0 of every chunk: one scale for the whole row.
WHOLE_ROW = 31
_SLICE_ELEMENTS = 2**24
_UNPACK_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [N, K]: words [N, W] int32, scales [N, G], zeros [N, G] integer or None."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_shift: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.words.shape[0]

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        parts = (self.words, self.scales, self.zeros)
        return sum(part.nbytes for part in parts if part is not None)

    def unpack(self, dtype: torch.dtype, rows: slice | Tensor | None = None) -> Tensor:
        """The weights of all rows, of a run of them or of those with ids [R] -> [R, K]."""
        ids = rows if isinstance(rows, Tensor) else None
        first, count = 0, self.out_features
        if ids is not None:
            ids, count = ids.contiguous(), ids.shape[0]
            if ids.data_ptr() % 16:  # another alignment would be another compilation
                ids = ids.clone()
        elif isinstance(rows, slice):
            first, end, _ = rows.indices(self.out_features)
            count = end - first
        out = torch.empty(count, self.in_features, dtype=dtype, device=self.words.device)
        if count == 0:
            return out
        unpack_kernel[(count, -(-self.in_features // _UNPACK_BLOCK))](
            self.words,
            self.scales,
            self.scales if self.zeros is None else self.zeros,
            self.words if ids is None else ids,
            out,
            first,
            self.in_features,
            self.words.shape[1],
            self.scales.shape[1],
            self.group_shift,
            BITS=self.bits,
            BLOCK_K=_UNPACK_BLOCK,
            HAS_ZEROS=self.zeros is not None,
            HAS_IDS=ids is not None,
        )
        return out


def pack(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int | None,
    in_features: int,
) -> PackedWeight:
    """Codes [N, K or more] of any integer type, 0 to 2**bits - 1, scales and zeros [N, groups].

    Inputs past those there are become padding that no kernel's result depends on.
    """
    out_features = codes.shape[0]
    padded = -(-codes.shape[1] // TILE_INPUTS) * TILE_INPUTS
    chunk = WORDS_PER_CHUNK * 32 // bits
    shift = WHOLE_ROW
    if group_size is not None:
        shift = _shift(group_size, chunk)
        spare = -(-padded // group_size) - scales.shape[1]
        scales = F.pad(scales, (0, spare))
        zeros = None if zeros is None else F.pad(zeros, (0, spare))
    words = torch.empty(
        out_features, padded // chunk, WORDS_PER_CHUNK, dtype=torch.int32, device=codes.device
    )
    rows = max(1, _SLICE_ELEMENTS // padded)
    for start in range(0, out_features, rows):
        part = F.pad(codes[start : start + rows], (0, padded - codes.shape[1]))
        part = part.view(part.shape[0], -1, 32 // bits, WORDS_PER_CHUNK)
        words[start : start + rows] = part[:, :, 0]
        for place in range(1, 32 // bits):
            words[start : start + rows] |= part[:, :, place].int() << (place * bits)
    zeros = None if zeros is None else zeros.to(torch.uint8 if bits == 4 else torch.int16)
    return PackedWeight(
        words.view(out_features, -1),
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        bits,
        shift,
        in_features,
    )


def _shift(group_size: int, chunk: int) -> int:
    chunks, rest = divmod(group_size, chunk)
    if rest or chunks & (chunks - 1) or chunks == 0:
        raise ValueError(f"a group must be {chunk} times a power of two inputs, got {group_size}")
    return chunks.bit_length() - 1
