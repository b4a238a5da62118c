"""A GGUF file's weights for the loader: packed ones stay packed, module by module."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from streamserve.models.checkpoint import CheckpointSource
from streamserve.models.gguf.kinds import Kind
from streamserve.models.gguf.tensors import GgufTensors
from streamserve.models.names import WeightNames
from streamserve.models.parameters import Module
from streamserve.models.pieces import module_pieces, row_groups
from streamserve.models.quantised.modules import select_rows
from streamserve.models.spec import DecoderSpec
from streamserve_kernels.stored import StoredFormat, StoredWeight, concatenate

# These decide, or are read in another way than by products and rows.
_NEVER_PACKED = (
    "layers.router",
    "layers.shared.gate",
    "layers.delta.gates",
    "position_embedding",
)


@dataclass(frozen=True, slots=True)
class GgufQuantization:
    """Which modules of a file are packed, and what they take.

    ``plain`` are modules that the decoder does more with than multiply.
    """

    tensors: GgufTensors
    names: WeightNames
    plain: tuple[str, ...] = ()
    name: str = "gguf"

    @classmethod
    def of(cls, tensors: GgufTensors, names: WeightNames, spec: DecoderSpec) -> GgufQuantization:
        return cls(tensors, names, ("head",) if spec.normalised_head else ())

    def kinds(self, module: Module) -> list[Kind] | None:
        """The kinds of the parts of a module that stays packed; None for any other.

        Packed parts beside a plain one are dequantised: it would lose something if it were packed.
        """
        if module.columns is None or module.name in (*_NEVER_PACKED, *self.plain):
            return None
        kinds = []
        for piece in module_pieces(self.names, module, "weight"):
            kind = self.tensors.kind_or_none(piece.name)
            if kind is None or kind.unpack is None:
                return None
            kinds.append(kind)
        return kinds

    def format(self, module: Module) -> StoredFormat | None:
        kinds = self.kinds(module)
        if kinds is None:
            return None
        # Parts of unlike kinds are held each on its own: none takes more than this.
        group = math.gcd(*(kind.group for kind in kinds))
        # Rows of several tables have each its own.
        row_bytes = 4.0 * 16 if len({kind.table for kind in kinds if kind.table}) > 1 else 0.0
        return StoredFormat(
            max(kind.bits for kind in kinds),
            group,
            max(kind.group_bytes for kind in kinds),
            row_bytes,
        )


class GgufSource(CheckpointSource):
    def __init__(
        self, tensors: GgufTensors, names: WeightNames, spec: DecoderSpec, path: Path
    ) -> None:
        super().__init__(tensors, names, spec, path)
        self._gguf = tensors
        self._quantization = GgufQuantization.of(tensors, names, spec)

    def stored(self, module: Module) -> StoredWeight | None:
        if self._quantization.kinds(module) is None:
            return None
        pieces = module_pieces(self._names, module, "weight")
        parts = []
        for piece in pieces:
            part = self._gguf.stored(piece.name)
            assert part is not None
            groups = row_groups(self._names, module, piece, self._spec)
            parts.append(part if groups is None else select_rows(part, groups.order()))
        # Q4_K_M has q and k in Q4_K and v in Q6_K, in half of its layers.
        weight = concatenate(parts)
        for piece in pieces:
            self._gguf.release(piece.name)
        return weight
