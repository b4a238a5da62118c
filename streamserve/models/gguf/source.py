"""A GGUF file's weights for the loader: packed ones stay packed, module by module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from streamserve.models.checkpoint import CheckpointSource, module_pieces
from streamserve.models.gguf.kinds import Kind
from streamserve.models.gguf.tensors import GgufTensors
from streamserve.models.names import WeightNames
from streamserve.models.parameters import Module
from streamserve.models.spec import DecoderSpec
from streamserve_kernels.stored import (
    FactoredNumbers,
    GroupedWeight,
    Numbers,
    StoredFormat,
    StoredWeight,
    concatenate,
    expand,
)

# These decide, or are read in another way than by products and rows.
_NEVER_PACKED = ("layers.router", "layers.shared.gate", "position_embedding")


@dataclass(frozen=True, slots=True)
class GgufQuantization:
    """Which modules of a file are packed, and what they take."""

    tensors: GgufTensors
    names: WeightNames
    name: str = "gguf"

    def kinds(self, module: Module) -> list[Kind] | None:
        """The kinds of the parts of a module that stays packed; None for any other.

        Packed parts beside a plain one are dequantised: it would lose something if it were packed.
        """
        if module.columns is None or module.name in _NEVER_PACKED:
            return None
        held = set(self.tensors.names())
        pieces = module_pieces(self.names, module, "weight")
        kinds = [self.tensors.kind(piece.name) for piece in pieces if piece.name in held]
        if len(kinds) < len(pieces) or any(kind.unpack is None for kind in kinds):
            return None
        return kinds

    def format(self, module: Module) -> StoredFormat | None:
        kinds = self.kinds(module)
        if kinds is None:
            return None
        group = math.gcd(*(kind.group for kind in kinds))
        # A kind whose groups are divided has its numbers as often as it has groups then.
        return StoredFormat(
            max(kind.bits for kind in kinds),
            group,
            max(kind.group_bytes for kind in kinds) * (1 if _alike(kinds) else 2),
        )


def _alike(kinds: Sequence[Kind]) -> bool:
    return len({kind.name for kind in kinds}) == 1


class GgufSource(CheckpointSource):
    def __init__(self, tensors: GgufTensors, names: WeightNames, spec: DecoderSpec) -> None:
        super().__init__(tensors, names, spec)
        self._gguf = tensors
        self._quantization = GgufQuantization(tensors, names)

    def stored(self, module: Module) -> StoredWeight | None:
        if self._quantization.kinds(module) is None:
            return None
        pieces = module_pieces(self._names, module, "weight")
        parts = [self._gguf.stored(piece.name) for piece in pieces]
        weight = stack([part for part in parts if part is not None])
        for piece in pieces:
            self._gguf.release(piece.name)
        return weight


def stack(parts: Sequence[GroupedWeight]) -> StoredWeight:
    """Parts as one weight, of unlike kinds too: the widest codes, the shortest groups.

    A Q4_K_M file has q and k in Q4_K and v in Q6_K, in half of its layers. Exact: a scale of ggml
    has at most 18 significant bits and a code 6 (Q8_0: 11 and 8), so code · scale fits a float32,
    and (code - zero) · scale may be had as code · scale - zero · scale.
    """
    if len({(part.bits, part.group, part.minimums is None) for part in parts}) == 1:
        return concatenate(parts)
    bits, group = max(part.bits for part in parts), math.gcd(*(part.group for part in parts))
    has_minimums = any(part.minimums is not None for part in parts)
    return concatenate([_widened(part, bits, group, has_minimums) for part in parts])


def _widened(part: GroupedWeight, bits: int, group: int, has_minimums: bool) -> GroupedWeight:
    times = part.group // group
    minimums, zeros = part.minimums, part.zeros
    if has_minimums and minimums is None:
        assert zeros is not None
        minimums, zeros = _scaled(part.scales, zeros), None
    return GroupedWeight(
        part.codes,
        bits,
        _repeated(part.scales, times),
        zeros.repeat_interleave(times, dim=1) if isinstance(zeros, Tensor) else zeros,
        group,
        None,
        None if minimums is None else _repeated(minimums, times),
    )


def _scaled(numbers: Numbers, factor: Tensor | float) -> Numbers:
    if isinstance(numbers, FactoredNumbers) and not isinstance(factor, Tensor):
        return FactoredNumbers(numbers.codes, numbers.units * factor, numbers.per)
    return expand(numbers) * factor


def _repeated(numbers: Numbers, times: int) -> Numbers:
    if isinstance(numbers, FactoredNumbers):
        codes = numbers.codes.repeat_interleave(times, dim=1)
        return FactoredNumbers(codes, numbers.units, numbers.per * times)
    return numbers.repeat_interleave(times, dim=1)
