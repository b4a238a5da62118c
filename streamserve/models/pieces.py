"""Which tensors of a checkpoint make up a module of the decoder, row after row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from streamserve.models.names import WeightNames
from streamserve.models.parameters import Module
from streamserve.models.spec import DecoderSpec, ExpertsSpec
from streamserve.models.tensor_files import TensorFiles

Leaf = Literal["weight", "bias"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A checkpoint tensor that fills ``rows`` rows of a module; ``shape`` as the file keeps it.

    ``base`` is the name of the checkpoint's module, without ``.weight`` or ``.bias``. With
    ``expert`` the piece is that one's slice of a tensor of all experts, and of ``shape``.
    """

    name: str
    base: str
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
        base = template.format(layer=module.layer, expert=module.expert)
        expert = module.expert if is_sliced else None
        pieces.append(Piece(base + suffix, base, count, shape, expert))
    return pieces


def full_names(files: TensorFiles, names: WeightNames) -> dict[str, str]:
    """Full names to names as stored, of all parts but the skipped ones.

    A checkpoint may leave the optional prefix out.
    """
    stored = [name for name in files.names() if not name.startswith(names.skipped)]
    prefix = names.optional_prefix
    if not prefix or any(name.startswith(prefix) for name in stored):
        return {names.full(name): name for name in stored}
    head = names.modules["head"][0] + "."
    return {name if name.startswith(head) else prefix + name: name for name in stored}


def row_order(names: WeightNames, module: Module, spec: DecoderSpec) -> Tensor | None:
    """Where in the checkpoint's rows each of the module's is; None where they are in order."""
    if module.name in names.interleaved:
        rows = torch.arange(module.num_rows)
        return torch.cat((rows[0::2], rows[1::2]))
    if module.name == "layers.qkv" and names.qkv_layout == "grouped":
        assert module.layer is not None
        attention = spec.layers[module.layer].attention
        groups = attention.num_kv_heads
        heads = attention.num_heads // groups
        rows = torch.arange(module.num_rows).view(groups, heads + 2, attention.query_key_head_size)
        parts = (rows[:, :heads], rows[:, heads], rows[:, heads + 1])
        return torch.cat([part.flatten() for part in parts])
    return None


def num_experts(spec: DecoderSpec, module: Module) -> int:
    """How many experts the layer of an expert's module has."""
    assert module.layer is not None
    experts = spec.layers[module.layer].mlp
    assert isinstance(experts, ExpertsSpec)
    return experts.num_experts
