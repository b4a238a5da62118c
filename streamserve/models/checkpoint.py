"""From a checkpoint's tensors to the weights that a spec calls for, or random ones in their place.

A `WeightSource` does one thing: it fills a tensor, on whatever device, with the weight (or bias) of
a module. The parts that a checkpoint keeps apart go straight into their place in it, so that the
host never holds more than a part of one matrix, and the device no more than the one being built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from streamserve.errors import ModelLoadError
from streamserve.models import mxfp4
from streamserve.models.names import WeightNames
from streamserve.models.parameters import Module, decoder_modules
from streamserve.models.spec import DecoderSpec, ExpertsSpec
from streamserve.models.staging import Uploader
from streamserve.models.tensor_files import TensorFiles
from streamserve_kernels.stored import StoredWeight

Leaf = Literal["weight", "bias"]
_NAMED_IN_AN_ERROR = 8


class WeightSource(Protocol):
    def stored(self, module: Module) -> StoredWeight | None:
        """The module's weight as the checkpoint quantised it, on the host; None: `fill` gives it.

        Its bias, where it has one, is filled in either case. Asked once for each module, in order.
        """
        ...

    def fill(self, module: Module, leaf: Leaf, target: Tensor) -> None:
        """Writes the module's weight (`Module.shape`) or bias (``[num_rows]``) into ``target``."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A checkpoint tensor that fills ``rows`` rows of a module; ``shape`` as the file keeps it.

    With ``expert`` it is that one's slice of a tensor of all experts, and of ``shape``.
    """

    name: str
    rows: int
    shape: tuple[int, ...]
    expert: int | None = None


def module_pieces(names: WeightNames, module: Module, leaf: Leaf) -> list[Piece]:
    """The checkpoint tensors that make up a module's weight or bias, in row order."""
    stored = names.modules[module.name]
    rows = module.rows if len(stored) == len(module.rows) else (module.num_rows,)
    is_sliced = module.name in names.sliced
    suffix = "" if module.role == "vector" else f".{leaf}"
    if is_sliced:
        suffix = "_bias" if leaf == "bias" else ""
    pieces = []
    for template, count in zip(stored, rows, strict=True):
        shape: tuple[int, ...] = (count,)
        if leaf == "weight" and module.columns is not None:
            shape = (count, module.columns)
            if module.name in names.transposed:
                shape = (module.columns, count)
        name = template.format(layer=module.layer, expert=module.expert) + suffix
        pieces.append(Piece(name, count, shape, module.expert if is_sliced else None))
    return pieces


class CheckpointSource:
    """Weights from files, checked as a whole before the first byte is copied.

    Raises ModelLoadError that names the tensors that are missing, left over or of a wrong shape.
    """

    def __init__(self, files: TensorFiles, names: WeightNames, spec: DecoderSpec) -> None:
        self._files = files
        self._names = names
        self._spec = spec
        self._uploader = Uploader()
        self._stored = self._index(files, names)
        self._check()

    @staticmethod
    def _index(files: TensorFiles, names: WeightNames) -> dict[str, str]:
        """Full names to names as stored: a checkpoint may leave the optional prefix out."""
        stored = list(files.names())
        prefix = names.optional_prefix
        if not prefix or any(name.startswith(prefix) for name in stored):
            return {name: name for name in stored}
        head = names.modules["head"][0] + "."
        return {name if name.startswith(head) else prefix + name: name for name in stored}

    def _check(self) -> None:
        used: set[str] = set()
        missing: list[str] = []
        for module in decoder_modules(self._spec):
            for piece in self._all_pieces(module):
                for name, shape in self._tensors(module, piece):
                    used.add(name)
                    if name not in self._stored:
                        missing.append(name)
                        continue
                    found = self._files.shape(self._stored[name])
                    if found != shape:
                        raise ModelLoadError(
                            f"tensor {self._stored[name]} has shape {list(found)}; "
                            f"the config asks for {list(shape)}"
                        )
        ignored = re.compile("|".join(f"(?:{p})$" for p in self._names.ignored) or r"(?!)")
        surplus = [
            name
            for full, name in self._stored.items()
            if full not in used and not ignored.search(full)
        ]
        if self._spec.tied_head:
            surplus = [name for name in surplus if not self._is_tied_copy(name)]
        problems = [
            f"{what} {len(found)} tensor{'s' if len(found) > 1 else ''}: {_listing(found)}"
            for what, found in (("it lacks", missing), ("it has no use for", surplus))
            if found
        ]
        if problems:
            raise ModelLoadError(f"the checkpoint does not fit the config: {'; '.join(problems)}")

    def _all_pieces(self, module: Module) -> Iterator[Piece]:
        yield from module_pieces(self._names, module, "weight")
        if module.bias:
            yield from module_pieces(self._names, module, "bias")

    def _tensors(self, module: Module, piece: Piece) -> list[tuple[str, tuple[int, ...]]]:
        """The tensors that a piece is read from, and their shapes as the config has it."""
        if piece.expert is None:
            return [(piece.name, piece.shape)]
        assert module.layer is not None
        experts = self._spec.layers[module.layer].mlp
        assert isinstance(experts, ExpertsSpec)
        if self._is_mxfp4(piece):
            assert module.columns is not None
            blocks = (experts.num_experts, piece.rows, module.columns // mxfp4.BLOCK)
            return [
                (piece.name + mxfp4.CODES, (*blocks, mxfp4.BLOCK // 2)),
                (piece.name + mxfp4.SCALES, blocks),
            ]
        return [(piece.name, (experts.num_experts, *piece.shape))]

    def _is_mxfp4(self, piece: Piece) -> bool:
        return piece.name not in self._stored and piece.name + mxfp4.CODES in self._stored

    def _is_tied_copy(self, name: str) -> bool:
        """Whether this is the head of a tied model, saved although it equals the embedding."""
        if name != f"{self._names.modules['head'][0]}.weight":
            return False
        embedding = self._stored.get(f"{self._names.modules['embedding'][0]}.weight")
        if embedding is None:
            return False
        if not torch.equal(self._files.read(name), self._files.read(embedding)):
            raise ModelLoadError(
                f"the config ties the head to the embedding, but {name} differs from {embedding}"
            )
        self._files.release(name)
        self._files.release(embedding)
        return True

    def stored(self, module: Module) -> StoredWeight | None:
        piece = module_pieces(self._names, module, "weight")[0]
        if not self._is_mxfp4(piece):
            return None
        names = [self._stored[piece.name + suffix] for suffix in (mxfp4.CODES, mxfp4.SCALES)]
        blocks, scales = (self._files.read(name)[piece.expert] for name in names)
        if module.name in self._names.interleaved:
            blocks, scales = (torch.cat((part[0::2], part[1::2])) for part in (blocks, scales))
        weight = mxfp4.table_weight(blocks, scales)
        for name in names:
            self._files.release(name)
        return weight

    def fill(self, module: Module, leaf: Leaf, target: Tensor) -> None:
        start = 0
        for piece in module_pieces(self._names, module, leaf):
            self._fill_piece(target[start : start + piece.rows], piece, module, leaf)
            self._files.release(self._stored[piece.name])
            start += piece.rows

    def _fill_piece(self, part: Tensor, piece: Piece, module: Module, leaf: Leaf) -> None:
        name = self._stored[piece.name]
        tensor = self._files.read(name)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
            raise ModelLoadError(f"tensor {name} has dtype {tensor.dtype}: quantised weights")
        if piece.expert is not None:
            tensor = tensor[piece.expert]
        if leaf == "weight" and module.name in self._names.transposed:
            tensor = self._uploader.on_device(tensor, part.device).t()
        self._place(part, tensor, module)

    def _place(self, part: Tensor, tensor: Tensor, module: Module) -> None:
        """Writes ``tensor``, as the checkpoint orders its rows, into ``part`` of a module's."""
        if module.name == "layers.qkv" and self._names.qkv_layout == "grouped":
            assert module.layer is not None
            landed = self._uploader.on_device(tensor, part.device)
            self._copy_grouped(part, landed, module.layer)
        elif module.name in self._names.interleaved:
            half = part.shape[0] // 2
            landed = self._uploader.on_device(tensor, part.device)
            part[:half].copy_(landed[0::2])
            part[half:].copy_(landed[1::2])
        else:
            self._uploader.copy(part, tensor)

    def _copy_grouped(self, target: Tensor, tensor: Tensor, layer: int) -> None:
        """``[kv heads, (queries of the group, key, value), head size]`` to all q, all k, all v."""
        attention = self._spec.layers[layer].attention
        groups = attention.num_kv_heads
        heads = attention.num_heads // groups
        head_size = attention.query_key_head_size
        grouped = tensor.reshape(groups, heads + 2, head_size, *tensor.shape[1:])
        parts = (grouped[:, :heads], grouped[:, heads : heads + 1], grouped[:, heads + 1 :])
        start = 0
        for part in parts:
            rows = part.shape[0] * part.shape[1] * part.shape[2]
            target[start : start + rows].view(part.shape).copy_(part)
            start += rows


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

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED_IN_AN_ERROR])
    more = len(names) - _NAMED_IN_AN_ERROR
    return f"{shown} and {more} more" if more > 0 else shown
