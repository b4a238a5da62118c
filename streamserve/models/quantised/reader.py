"""What a reader of quantised checkpoints is, and how it looks at the tensors of one.

A format keeps a module ``model.layers.0.mlp.down_proj`` not as one ``….weight`` but as a few
tensors, ``….qweight``, ``….scales`` and so on. Which modules it keeps that way is told by the
tensors that are there; the config says how to read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamserve.errors import ModelLoadError
from streamserve.models.tensor_files import TensorFiles
from streamserve_kernels.stored import OneWeight, StoredFormat

Shape = tuple[int, ...]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Tensors:
    """A checkpoint's tensors by their full names; errors say the name that the file has."""

    def __init__(self, files: TensorFiles, stored: Mapping[str, str]) -> None:
        self._files = files
        self._stored = stored
        self._expert: int | None = None
        self._num_experts = 0

    def of_expert(self, expert: int, num_experts: int) -> Tensors:
        """The same tensors where each is of all experts: this one's slices of them."""
        view = Tensors(self._files, self._stored)
        view._expert, view._num_experts = expert, num_experts
        return view

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def has_any(self, name: str, *suffixes: str) -> bool:
        """Whether some of a module's tensors are there: what is missing then is an error."""
        return any(name + suffix in self._stored for suffix in suffixes)

    def shape(self, name: str) -> Shape:
        shape = self._files.shape(self._stored[name])
        if self._expert is None:
            return shape
        if shape[:1] != (self._num_experts,):
            raise self.error(
                name, f"has shape {list(shape)}; the config asks for {self._num_experts} experts"
            )
        return shape[1:]

    def whole(self, shape: Shape) -> Shape:
        """As the file has it: of all experts, where there are some."""
        return shape if self._expert is None else (self._num_experts, *shape)

    def dtype(self, name: str) -> torch.dtype | None:
        """None for one that is missing, or has no name here."""
        return self._files.dtype(self._stored[name]) if name in self._stored else None

    def read(self, name: str) -> Tensor:
        """A copy of the tensor: what was mapped is given back."""
        whole = self._files.read(self._stored[name])
        tensor = (whole if self._expert is None else whole[self._expert]).clone()
        self._files.release(self._stored[name])
        return tensor

    def error(self, name: str, what: str) -> ModelLoadError:
        if name not in self._stored:
            return ModelLoadError(f"tensor {name} {what}")
        stored = self._stored[name]
        return ModelLoadError(f"{self._files.file(stored)}: tensor {stored} {what}")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a quantised module: it has one of ``shapes`` and of ``dtypes``."""

    suffix: str
    shapes: Sequence[Shape]
    dtypes: Sequence[torch.dtype]
    optional: bool = False


class FormatReader(Protocol):
    """One format's way to keep a module; ``name`` is the module's in the checkpoint."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions of tensors that the format has and nobody needs here."""
        ...

    def holds(self, tensors: Tensors, name: str) -> bool:
        """Whether the checkpoint keeps this module quantised."""
        ...

    def parts(self, tensors: Tensors, name: str, rows: int, columns: int) -> Sequence[Part]:
        """The tensors that make up a module that it holds. Raises ModelLoadError."""
        ...

    def format(self, tensors: Tensors, name: str, rows: int, columns: int) -> StoredFormat:
        """What the module takes in memory at most, told by the headers of the files."""
        ...

    def read(self, tensors: Tensors, name: str, rows: int, columns: int) -> OneWeight:
        """The module's weight, after its parts were found right. Raises ModelLoadError."""
        ...


def number_bytes(tensors: Tensors, name: str) -> int:
    """Bytes of a scale as it will be held: numbers of float16 stay so, others are widened."""
    return 2 if tensors.dtype(name) == torch.float16 else 4


def one_if_equal(zeros: Tensor) -> Tensor | float:
    """Zeros [N, G], as one number if they are all the same: that takes no memory and no time."""
    first = zeros.flatten()[0]
    return float(first) if bool((zeros == first).all()) else zeros
