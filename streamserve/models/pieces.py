"""Which tensors of a checkpoint make up a module of the decoder, row after row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from streamserve.models.names import WeightNames
from streamserve.models.parameters import Module
from streamserve.models.spec import AttentionSpec, DecoderSpec, DeltaNetSpec, ExpertsSpec
from streamserve.models.tensor_files import TensorFiles

Leaf = Literal["weight", "bias"]


class RowGroups(NamedTuple):
    """Rows of several parts, group by group: in each ``sizes[i]`` of part i.

    The decoder has all of the first part, then all of the next.
    """

    groups: int
    sizes: tuple[int, ...]

    def order(self) -> Tensor:
        """Where in these rows each of the decoder's is, [N] int64."""
        rows = torch.arange(self.groups * sum(self.sizes)).view(self.groups, -1)
        return torch.cat([part.flatten() for part in rows.split_with_sizes(self.sizes, dim=1)])

    def copy(self, target: Tensor, tensor: Tensor) -> None:
        """Writes ``tensor`` [N, …], whose rows stand in these groups, as the decoder has them."""
        grouped = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        start = 0
        for part in grouped.split_with_sizes(self.sizes, dim=1):
            rows = self.groups * part.shape[1]
            target[start : start + rows].view(part.shape).copy_(part)
            start += rows


@dataclass(frozen=True, slots=True)
class Piece:
    """A checkpoint tensor that fills rows of a module from ``start``; ``shape`` is the file's.

    ``base`` is the name of the checkpoint's module, without ``.weight`` or ``.bias``. With
    ``expert`` the piece is that one's slice of a tensor of all experts, and of ``shape``.
    """

    name: str
    base: str
    start: int
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
    start = 0
    for template, count in zip(stored, rows, strict=True):
        shape: tuple[int, ...] = (count,)
        if module.role == "norm" and len(rows) < len(module.rows):  # of each head, in one tensor
            shape = (len(module.rows), module.rows[0])
        if leaf == "weight" and module.columns is not None:
            shape = (count, module.columns)
            if module.name in names.transposed:
                shape = (module.columns, count)
            if module.role == "convolution":  # of one input for each output
                shape = (count, 1, module.columns)
        base = template.format(layer=module.layer, expert=module.expert)
        expert = module.expert if is_sliced else None
        pieces.append(Piece(base + suffix, base, start, count, shape, expert))
        start += count
    return pieces


def full_names(files: TensorFiles, names: WeightNames) -> dict[str, str]:
    """Full names to names as stored, of all parts that are asked for.

    A checkpoint may leave the optional prefix out.
    """
    stored = names.asked(files.names())
    prefix = names.optional_prefix
    if not prefix or any(name.startswith(prefix) for name in stored):
        return {names.full(name): name for name in stored}
    head = names.modules["head"][0] + "."
    return {name if name.startswith(head) else prefix + name: name for name in stored}


def row_groups(
    names: WeightNames, module: Module, piece: Piece, spec: DecoderSpec
) -> RowGroups | None:
    """How the checkpoint orders a piece's rows; None: as the decoder does."""
    if module.name in names.interleaved:
        return RowGroups(piece.rows // 2, (1, 1))
    if module.layer is None or piece.start > 0:  # only a module's first piece has parts of many
        return None
    if module.name == "layers.qkv" and names.qkv_layout != "stacked":
        attention = spec.layers[module.layer].attention
        assert isinstance(attention, AttentionSpec)
        return _qkv_groups(names, attention)
    is_whole = piece.rows == module.num_rows  # a file may keep qkvz in parts, the gates as one
    if module.name.startswith("layers.delta.") and names.delta_layout == "grouped" and is_whole:
        delta_net = spec.layers[module.layer].attention
        assert isinstance(delta_net, DeltaNetSpec)
        return _delta_groups(module, delta_net)
    return None


def _qkv_groups(names: WeightNames, spec: AttentionSpec) -> RowGroups:
    size = spec.query_key_head_size
    if names.qkv_layout == "gated":
        return RowGroups(spec.num_heads, (size, spec.value_head_size))
    share = spec.num_heads // spec.num_kv_heads
    return RowGroups(spec.num_kv_heads, (share * size, size, spec.value_head_size))


def _delta_groups(module: Module, spec: DeltaNetSpec) -> RowGroups | None:
    share, size = spec.num_value_heads // spec.num_key_heads, spec.key_head_size
    values = share * spec.value_head_size
    if module.name == "layers.delta.qkvz":
        return RowGroups(spec.num_key_heads, (size, size, values, values))
    if module.name == "layers.delta.gates":
        return RowGroups(spec.num_key_heads, (share, share))
    return None


def row_order(names: WeightNames, module: Module, spec: DecoderSpec) -> Tensor | None:
    """Where in the checkpoint's rows each of the module's is; None where they are in order.

    None is in another piece.
    """
    first = module_pieces(names, module, "weight")[0]
    groups = row_groups(names, module, first, spec)
    if groups is None:
        return None
    return torch.cat((groups.order(), torch.arange(first.rows, module.num_rows)))


def num_experts(spec: DecoderSpec, module: Module) -> int:
    """How many experts the layer of an expert's module has."""
    assert module.layer is not None
    experts = spec.layers[module.layer].mlp
    assert isinstance(experts, ExpertsSpec)
    return experts.num_experts
