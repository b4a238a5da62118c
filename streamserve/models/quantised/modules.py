"""A quantised checkpoint's modules: what each takes in memory, and its weight as one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from streamserve.models.names import WeightNames
from streamserve.models.parameters import Module
from streamserve.models.pieces import Piece, module_pieces, num_experts, row_groups
from streamserve.models.quantised.reader import FormatReader, Tensors
from streamserve.models.spec import DecoderSpec
from streamserve_kernels.stored import (
    FactoredNumbers,
    Float8Weight,
    GroupedWeight,
    Numbers,
    OneWeight,
    StoredFormat,
    StoredWeight,
    TableWeight,
    concatenate,
)


class StoredModules:
    """Finds and reads the modules that a format's reader knows.

    A module of which some parts are plain is none of them: its parts are dequantised, each by
    itself, into a plain one.
    """

    def __init__(
        self, reader: FormatReader, tensors: Tensors, names: WeightNames, spec: DecoderSpec
    ) -> None:
        self._reader = reader
        self._tensors = tensors
        self._names = names
        self._spec = spec

    def holds(self, module: Module, piece: Piece) -> bool:
        """Whether the checkpoint keeps this part of the module quantised."""
        return module.columns is not None and self._reader.holds(self._tensors, piece.base)

    def _view(self, module: Module, piece: Piece) -> tuple[Tensors, str, int, int]:
        assert module.columns is not None  # or it were not held
        tensors = self._tensors
        if piece.expert is not None:
            tensors = tensors.of_expert(piece.expert, num_experts(self._spec, module))
        return tensors, piece.base, piece.rows, module.columns

    def check(self, module: Module, piece: Piece) -> tuple[list[str], list[str]]:
        """The names of the tensors that a part is read from, and of those that are missing.

        Raises ModelLoadError that names a tensor of a wrong shape or dtype.
        """
        used, missing = [], []
        view = self._view(module, piece)
        tensors = view[0]
        for part in self._reader.parts(*view):
            name = piece.base + part.suffix
            if name not in tensors:
                if not part.optional:
                    missing.append(name)
                continue
            used.append(name)
            shape, dtype = tensors.shape(name), tensors.dtype(name)
            if shape not in part.shapes:
                wanted = " or ".join(str(list(tensors.whole(wanted))) for wanted in part.shapes)
                found = list(tensors.whole(shape))
                raise tensors.error(name, f"has shape {found}; the config asks for {wanted}")
            if dtype not in part.dtypes:
                wanted = " or ".join(map(str, part.dtypes))
                raise tensors.error(name, f"has dtype {dtype}; its format has {wanted}")
        return used, missing

    def format(self, module: Module) -> StoredFormat | None:
        """What the module's weight takes as it is stored; None: it is not read that way."""
        if module.columns is None or not (module.role == "linear" or module.name == "embedding"):
            return None
        pieces = module_pieces(self._names, module, "weight")
        if not all(self.holds(module, piece) for piece in pieces):
            return None
        formats = [self._reader.format(*self._view(module, piece)) for piece in pieces]
        # Parts that are not kept alike are held each on its own: none takes more than this.
        row_bytes = max(found.row_bytes for found in formats)
        if any(found.reordered for found in formats):
            row_bytes += 12 * module.columns * (len(pieces) - 1) / module.num_rows
        return StoredFormat(
            bits=max(found.bits for found in formats),
            group=min(found.group or module.columns for found in formats),
            group_bytes=max(found.group_bytes for found in formats),
            row_bytes=row_bytes,
            reordered=any(found.reordered for found in formats),
            step=max(found.step for found in formats),
        )

    def read_piece(self, module: Module, piece: Piece) -> OneWeight:
        """A part's weight, rows in the checkpoint's order."""
        return self._reader.read(*self._view(module, piece))

    def read(self, module: Module) -> StoredWeight | None:
        """The module's weight, rows in our order; None where `format` is."""
        if self.format(module) is None:
            return None
        pieces = module_pieces(self._names, module, "weight")
        weights = []
        for piece in pieces:
            weight = self.read_piece(module, piece)
            groups = row_groups(self._names, module, piece, self._spec)
            weights.append(weight if groups is None else select_rows(weight, groups.order()))
        return concatenate(weights)


def select_rows(weight: OneWeight, rows: Tensor) -> OneWeight:
    """The weight's outputs ``rows`` [N], in their order: all of them, or some."""
    if isinstance(weight, GroupedWeight):
        zeros = weight.zeros
        minimums = weight.minimums
        return replace(
            weight,
            codes=weight.codes[rows],
            scales=_selected(weight.scales, rows),
            zeros=zeros[rows] if isinstance(zeros, Tensor) else zeros,
            minimums=None if minimums is None else _selected(minimums, rows),
        )
    if isinstance(weight, TableWeight):
        sparse = weight.sparse
        if sparse is not None:
            places = rows.new_full((weight.codes.shape[0],), -1)
            places[rows] = torch.arange(len(rows))
            at = places[sparse[0]]
            chosen = at >= 0
            sparse = (at[chosen], sparse[1][chosen], sparse[2][chosen])
        return replace(
            weight,
            codes=weight.codes[rows],
            table=weight.table if len(weight.table) == 1 else weight.table[rows],
            scales=None if weight.scales is None else _selected(weight.scales, rows),
            sparse=sparse,
        )
    # Not every operation knows float8; bytes they all do.
    values = weight.values.view(torch.uint8)[rows].view(weight.values.dtype)
    block = None if weight.block is None else (1, weight.block[1])
    return Float8Weight(values, weight.row_scales()[rows], block)


def _selected(numbers: Numbers, rows: Tensor) -> Numbers:
    if isinstance(numbers, FactoredNumbers):
        return replace(numbers, codes=numbers.codes[rows], units=numbers.units[rows])
    return numbers[rows]
