"""From a checkpoint's tensors to the weights that a spec calls for, or random ones in their place.

A `WeightSource` does one thing: it fills a tensor, on whatever device, with the weight (or bias) of
a module. The parts that a checkpoint keeps apart go straight into their place in it, so that the
host never holds more than a part of one matrix, and the device no more than the one being built.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from streamserve.errors import ModelLoadError
from streamserve.models.names import WeightNames
from streamserve.models.parameters import Module, decoder_modules
from streamserve.models.pieces import (
    Leaf,
    Piece,
    full_names,
    module_pieces,
    num_experts,
    row_groups,
    row_order,
)
from streamserve.models.quantised.modules import StoredModules
from streamserve.models.quantised.reader import FormatReader, Tensors
from streamserve.models.spec import DecoderSpec
from streamserve.models.staging import Uploader
from streamserve.models.tensor_files import TensorFiles
from streamserve_kernels.stored import StoredWeight

_NAMED_IN_AN_ERROR = 8
# Stretches of rows that are read one by one.
_MAX_RUNS = 4


class WeightSource(Protocol):
    def stored(self, module: Module) -> StoredWeight | None:
        """The module's weight as the checkpoint quantised it, on the host; None: `fill` gives it.

        Its bias, where it has one, is filled in either case. Asked once for each module, in order.
        """
        ...

    def fill(self, module: Module, leaf: Leaf, target: Tensor) -> None:
        """Writes the module's weight (`Module.shape`) or bias (``[num_rows]``) into ``target``."""
        ...


class CheckpointSource:
    """Weights from files, checked as a whole before the first byte is copied.

    ``reader`` knows the quantised ones; ``path`` is where tensors were looked for. Raises
    ModelLoadError that names it and the tensors that are missing or left over, or the file and the
    tensor that is of a wrong shape or dtype.
    """

    def __init__(
        self,
        files: TensorFiles,
        names: WeightNames,
        spec: DecoderSpec,
        path: Path,
        reader: FormatReader | None = None,
    ) -> None:
        self._path = path
        self._files = files
        self._names = names = names.of_files(files.names())
        self._spec = spec
        self._uploader = Uploader()
        self._stored = full_names(files, names)
        self._unused = names.ignored if reader is None else (*names.ignored, *reader.unused)
        self._quantised: StoredModules | None = None
        if reader is not None:
            tensors = Tensors(files, self._stored)
            self._quantised = StoredModules(reader, tensors, names, spec)
        self._check()

    def _check(self) -> None:
        used: set[str] = set()
        missing: list[str] = []
        for module in decoder_modules(self._spec):
            for piece in module_pieces(self._names, module, "weight"):
                if self._quantised is not None and self._quantised.holds(module, piece):
                    found, absent = self._quantised.check(module, piece)
                    used.update(found, self._needless_bias(module, piece))
                    missing += absent
                else:
                    self._check_plain(module, piece, used, missing)
            for piece in module_pieces(self._names, module, "bias") if module.bias else ():
                self._check_plain(module, piece, used, missing)
        self._refuse(missing, self._surplus(used))

    def _check_plain(
        self, module: Module, piece: Piece, used: set[str], missing: list[str]
    ) -> None:
        used.add(piece.name)
        if piece.name not in self._stored:
            missing.append(piece.name)
            return
        shape = piece.shape
        if piece.expert is not None:
            shape = (num_experts(self._spec, module), *shape)
        name = self._stored[piece.name]
        found, dtype = self._files.shape(name), self._files.dtype(name)
        if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
            raise self._error(
                name,
                f"has dtype {dtype}: quantised weights, of which the config says nothing that is "
                "understood",
            )
        is_row = module.role == "vector" and found == (1, *shape)  # of a matrix that is no other
        if found != shape and not is_row:
            raise self._error(name, f"has shape {list(found)}; the config asks for {list(shape)}")

    def _error(self, name: str, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self._files.file(name)}: tensor {name} {what}")

    def _needless_bias(self, module: Module, piece: Piece) -> list[str]:
        """Packers give layers a bias that have none: zeros, which change nothing."""
        name = f"{piece.base}.bias"
        if module.bias or name not in self._stored:
            return []
        if self._files.read(self._stored[name]).any():
            raise self._error(self._stored[name], "is not all zeros, and this layer has no bias")
        return [name]

    def _surplus(self, used: set[str]) -> list[str]:
        ignored = re.compile("|".join(f"(?:{p})$" for p in self._unused) or r"(?!)")
        surplus = [
            name
            for full, name in self._stored.items()
            if full not in used and not ignored.search(full)
        ]
        if self._spec.tied_head:
            surplus = [name for name in surplus if not self._is_tied_copy(name)]
        return surplus

    def _refuse(self, missing: list[str], surplus: list[str]) -> None:
        problems = [
            f"{what} {len(found)} tensor{'s' if len(found) > 1 else ''}: {_listing(found)}"
            for what, found in (("it lacks", missing), ("it has no use for", surplus))
            if found
        ]
        if problems:
            raise ModelLoadError(
                f"{self._path}: the checkpoint does not fit the config: {'; '.join(problems)}"
            )

    def _is_tied_copy(self, name: str) -> bool:
        """Whether this is the head of a tied model, saved although it equals the embedding."""
        if name != f"{self._names.modules['head'][0]}.weight":
            return False
        embedding = self._stored.get(f"{self._names.modules['embedding'][0]}.weight")
        if embedding is None:
            return False
        if not torch.equal(self._files.read(name), self._files.read(embedding)):
            raise self._error(
                name, f"differs from {embedding}, and the config ties the head to the embedding"
            )
        self._files.release(name)
        self._files.release(embedding)
        return True

    def stored(self, module: Module) -> StoredWeight | None:
        return None if self._quantised is None else self._quantised.read(module)

    def fill(self, module: Module, leaf: Leaf, target: Tensor) -> None:
        for piece in module_pieces(self._names, module, leaf):
            part = target[piece.start : piece.start + piece.rows]
            kept = self._quantised if leaf == "weight" else None
            if kept is not None and kept.holds(module, piece):
                self._place(part, kept.read_piece(module, piece).dequantise(), module, piece)
            else:
                self._fill_piece(part, piece, module, leaf)
                self._files.release(self._stored[piece.name])

    def fill_part(
        self,
        module: Module,
        leaf: Leaf,
        target: Tensor,
        rows: Tensor | None,
        columns: slice,
    ) -> None:
        """As `fill`, of some ``rows`` ([N] int64, rising by parts; None: all) and ``columns`` only.

        Of a plain tensor no more is read than that.
        """
        wanted = torch.arange(module.num_rows) if rows is None else rows
        order = row_order(self._names, module, self._spec)
        if order is not None:  # of the rows of one fused tensor
            wanted = order[wanted]
        filled = 0
        for piece in module_pieces(self._names, module, leaf):
            end = piece.start + piece.rows
            here = wanted[(wanted >= piece.start) & (wanted < end)] - piece.start
            part = target[filled : filled + len(here)]
            kept = self._quantised if leaf == "weight" else None
            if kept is not None and kept.holds(module, piece):
                tensor = kept.read_piece(module, piece).dequantise()
                self._uploader.copy(part, tensor[here][:, columns])
            else:
                self._fill_rows(part, piece, module, leaf, here, columns)
                self._files.release(self._stored[piece.name])
            filled += len(here)

    def _fill_rows(
        self,
        part: Tensor,
        piece: Piece,
        module: Module,
        leaf: Leaf,
        rows: Tensor,
        columns: slice,
    ) -> None:
        name = self._stored[piece.name]
        is_matrix = leaf == "weight" and module.columns is not None
        if is_matrix and module.name in self._names.transposed:
            if piece.expert is None:
                tensor = self._files.read_rows(name, columns).t()
            else:
                tensor = self._files.read(name)[piece.expert][columns].t()
            self._uploader.copy(part, tensor[rows])
            return
        if module.role == "norm" and len(piece.shape) > 1:
            self._uploader.copy(part, self._files.read(name).flatten()[rows])
            return
        filled = 0
        for first, last, chosen in _runs(rows):
            if piece.expert is None:
                tensor = self._files.read_rows(name, slice(first, last))
            else:
                tensor = self._files.read(name)[piece.expert][first:last]
            if is_matrix:
                tensor = tensor[:, columns]
            if chosen is not None:
                tensor = tensor[chosen]
            self._uploader.copy(part[filled : filled + len(tensor)], tensor)
            filled += len(tensor)

    def _fill_piece(self, part: Tensor, piece: Piece, module: Module, leaf: Leaf) -> None:
        name = self._stored[piece.name]
        tensor = self._files.read(name)
        if piece.expert is not None:
            tensor = tensor[piece.expert]
        if leaf == "weight" and module.name in self._names.transposed:
            tensor = self._uploader.on_device(tensor, part.device).t()
        if module.role in ("convolution", "vector", "norm"):
            tensor = tensor.reshape(part.shape)
        self._place(part, tensor, module, piece)

    def _place(self, part: Tensor, tensor: Tensor, module: Module, piece: Piece) -> None:
        """Writes ``tensor``, as the checkpoint orders its rows, into ``part`` of a module's."""
        groups = row_groups(self._names, module, piece, self._spec)
        if groups is None:
            self._uploader.copy(part, tensor)
        else:
            groups.copy(part, self._uploader.on_device(tensor, part.device))


def _runs(rows: Tensor) -> list[tuple[int, int, Tensor | None]]:
    """(first, last + 1, which of these) of stretches of rows: a few whole ones, or one of some."""
    if not len(rows):
        return []
    breaks = (rows.diff() != 1).nonzero().flatten().add(1).tolist()
    if len(breaks) < _MAX_RUNS:
        edges = [0, *breaks, len(rows)]
        return [
            (int(rows[start]), int(rows[end - 1]) + 1, None)
            for start, end in itertools.pairwise(edges)
        ]
    first = int(rows.min())
    return [(first, int(rows.max()) + 1, rows - first)]


class RandomSource:
    """Weights drawn at random, the same for the same seed: for load tests without a checkpoint.

    They are drawn on the device that they are for, which has numbers of its own.
    """

    def __init__(self, seed: int = 0, std: float = 0.02) -> None:
        self._seed = seed
        self._std = std
        self._generators: dict[torch.device, torch.Generator] = {}

    def stored(self, module: Module) -> StoredWeight | None:
        return None

    def fill(self, module: Module, leaf: Leaf, target: Tensor) -> None:
        if leaf == "bias":
            target.zero_()
        elif module.role == "norm":
            target.fill_(1.0)
        else:
            target.normal_(0.0, self._std, generator=self._generator(target.device))

    def fill_part(
        self,
        module: Module,
        leaf: Leaf,
        target: Tensor,
        rows: Tensor | None,
        columns: slice,
    ) -> None:
        """All of it is drawn: a part of a model is a part of the same model."""
        shape = module.shape if leaf == "weight" else (module.num_rows,)
        whole = torch.empty(shape, dtype=target.dtype, device=target.device)
        self.fill(module, leaf, whole)
        if rows is not None:
            whole = whole[rows.to(whole.device)]
        target.copy_(whole[:, columns] if whole.dim() == 2 else whole)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED_IN_AN_ERROR])
    more = len(names) - _NAMED_IN_AN_ERROR
    return f"{shown} and {more} more" if more > 0 else shown
