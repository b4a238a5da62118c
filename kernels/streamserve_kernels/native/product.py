"""How a weight tells which instructions multiply rows by it, and what these have in common.

A function on tensors runs them at once (`multiply`), the recorder writes them down, and a layer of
experts has each expert tell its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from streamserve_kernels.interface import NotRecordableError
from streamserve_kernels.native.execute import (
    Instruction,
    done_flags,
    double_bits,
    pack_step,
    run_at_once,
)
from streamserve_kernels.pool import pool

# Weight bytes below which one thread is enough.
_PARALLEL_BYTES = 65536
_OWN_ROWS = 4  # OWN_ROWS of output.h
_LINE = 64
_ONE = double_bits(1.0)


class Product(NamedTuple):
    """What the arguments of all instructions of a weight [N, K] begin with: see output.h.

    Addresses are of the first of R rows, strides in elements; the last four fields are of memory
    for what is made of the rows before they are multiplied.
    """

    y: int  # [R, N], bfloat16 or float32
    x: int  # [R, K], bfloat16, or float32 where it is quantised
    inputs: int  # K, or what rows are padded to
    y_stride: int
    x_stride: int
    rows_kind: int = 0
    y_float32: int = 0
    x_float32: int = 0
    best: int = 0
    scale: int = _ONE
    cap: int = 0
    work: int = 0
    own: int = 0
    own_stride: int = 0
    done: int = 0

    def with_work(self, memory: Memory, row_bytes: int) -> Product:
        """The same with memory for what is made of each row."""
        return Product(*self[:-4], *memory.work(row_bytes))


class Memory(Protocol):
    """What the instructions of one product ask for, of its R rows."""

    def work(self, row_bytes: int) -> tuple[int, int, int, int]:
        """The last fields of `Product`, with so many bytes for each row."""

    def rows(self, width: int) -> int:
        """The address of [R, width] bfloat16."""


class Work:
    """Memory for what is made of rows before a product: of all, and of each thread's own few.

    Shared by instructions that run one after the other. Not for two threads at a time.
    """

    def __init__(self, rows: int, row_bytes: int) -> None:
        stride = -(-_OWN_ROWS * row_bytes // _LINE) * _LINE
        own_bytes = pool().threads() * stride
        self._memory = torch.empty(own_bytes + rows * row_bytes, dtype=torch.uint8)
        address = self._memory.data_ptr()
        self.fields = (address + own_bytes, address, stride)


class HeldMemory:
    """Memory for instructions that are run at once: as long as this is held."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._held: list[object] = []

    def work(self, row_bytes: int) -> tuple[int, int, int, int]:
        work, done = Work(self._num_rows, row_bytes), done_flags()
        self._held += work, done
        return (*work.fields, done.data_ptr())

    def rows(self, width: int) -> int:
        rows = torch.empty(self._num_rows, width, dtype=torch.bfloat16)
        self._held.append(rows)
        return rows.data_ptr()


class NativeWeight(ABC):
    """A weight [N, K] that the C side multiplies rows by."""

    __slots__ = ()

    @abstractmethod
    def instructions(self, product: Product, memory: Memory) -> list[Instruction]:
        """What makes y of x. Their arguments begin with a `Product`: this, or one with `memory`.

        What does not depend on the weight has arguments that do not, so that a layer's experts can
        share it. `memory` is held until they have run. Raises NotRecordableError for rows, or a
        form of results, that the weight does not take.
        """

    def embedding(self, out: int, *, is_float32: bool = False) -> Instruction:
        """What writes rows of the weight to out [T, K], bfloat16 or float32, for ids [T] of a step.

        Raises NotRecordableError where no operation does.
        """
        raise NotRecordableError(f"an embedding by {type(self).__name__}")


def as_rows(x: Tensor) -> Tensor:
    """Rows [R, K] of x [..., K], each with its elements side by side; x itself if it is that."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def multiply(weight: NativeWeight, nbytes: int, x: Tensor, y: Tensor) -> None:
    """Writes x [R, K] @ weightᵀ + bias to y [..., N], rows together; those of x at any stride.

    Whether one thread does it, or all, is decided by `nbytes` of the weight.
    """
    num_rows, width = x.shape
    floats = y.dtype == torch.float32, x.dtype == torch.float32
    strides = y.shape[-1], x.stride(0)
    product = Product(y.data_ptr(), x.data_ptr(), width, *strides, 0, *floats)
    memory = HeldMemory(num_rows)
    threads = 1 if nbytes < _PARALLEL_BYTES else pool().threads()
    run_at_once(weight.instructions(product, memory), pack_step(num_rows), threads)
