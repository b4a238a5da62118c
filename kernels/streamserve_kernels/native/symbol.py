"""What stands for a tensor while a step is recorded: a place in memory, and no values."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from streamserve_kernels.interface import NotRecordableError

TOKENS, LOGITS = -1, -2
"""The first dimension of a symbol: the step's tokens, or its rows that need logits."""


def pairs(rows: int, top_k: int) -> int:
    """The same of pairs of such a row and one of its `top_k` experts."""
    return -2 - top_k if rows == TOKENS else top_k


def rows_kind(rows: int) -> int:
    """Such a dimension as C knows it: see `ss_rows`."""
    return -1 - rows


class Symbol:
    """Rows of bfloat16, `stride` elements apart, of a shape [rows, *tail].

    Behaves as far like a tensor as a decoder's forward asks: views along a row, sums, products, a
    choice of rows. `memory` keeps what it points into from being handed out again.
    """

    __slots__ = ("address", "memory", "recorder", "rows", "stride", "tail")

    def __init__(
        self, recorder: Any, memory: Any, address: int, rows: int, stride: int, *tail: int
    ) -> None:
        self.recorder = recorder
        self.memory = memory
        self.address = address
        self.rows = rows
        self.stride = stride
        self.tail = tail

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.tail)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return prod(self.tail)

    @property
    def is_dense(self) -> bool:
        """Whether rows lie one right after the other."""
        return self.stride == self.width

    def view(self, *shape: Any) -> Symbol:
        """Another shape of the same row; a first dimension other than the rows' splits each row."""
        dims: Sequence[int] = shape[0] if len(shape) == 1 else shape
        tail = list(dims[1:])
        if -1 in tail:
            known = -prod(tail)
            tail[tail.index(-1)] = self.width // known
        if prod(tail) != self.width:
            if len(tail) != 1 or self.width % tail[0]:
                raise NotRecordableError(f"a view of {self.shape} as {tuple(dims)}")
            # [T, heads, D] as [T * heads, D]: what an operation on each head sees
            tail = [self.width // tail[0], tail[0]]
        return Symbol(self.recorder, self.memory, self.address, self.rows, self.stride, *tail)

    reshape = view

    def split_with_sizes(self, sizes: Sequence[int], dim: int) -> tuple[Symbol, ...]:
        """Pieces along the first dimension of a row."""
        assert dim == 1
        inner = prod(self.tail[1:])
        pieces, start = [], self.address
        for size in sizes:
            pieces.append(
                Symbol(
                    self.recorder, self.memory, start, self.rows, self.stride, size, *self.tail[1:]
                )
            )
            start += 2 * size * inner
        return tuple(pieces)

    def index_select(self, dim: int, rows: object) -> Symbol:
        """The rows that need logits."""
        assert dim == 0
        assert rows is self.recorder.batch.logits_indices
        return self.recorder.gather(self)  # type: ignore[no-any-return]

    def clamp_(self, low: float, high: float) -> Symbol:
        if low != -high:
            raise NotRecordableError("rows between limits of unlike sizes")
        self.recorder.clip(self, high)
        return self

    def __add__(self, other: Symbol) -> Symbol:
        return self.recorder.add(self, other)  # type: ignore[no-any-return]

    def __mul__(self, factor: float | Symbol | Tensor) -> Symbol:
        """Times a number, other rows, or one row [N] for all."""
        if isinstance(factor, Tensor):
            return self.recorder.multiply_columns(self, factor)  # type: ignore[no-any-return]
        if isinstance(factor, Symbol):
            return self.recorder.multiply(self, factor)  # type: ignore[no-any-return]
        return self.recorder.scale(self, factor)  # type: ignore[no-any-return]


def as_symbol(x: object) -> Symbol | None:
    """What a packed weight is called with, if it is not a tensor."""
    return x if isinstance(x, Symbol) else None


class Index:
    """What stands for one of the step's integer tensors; `offset` is what was added to it."""

    __slots__ = ("name", "offset", "shape")

    def __init__(self, name: str, rows: int, offset: int = 0) -> None:
        self.name = name
        self.shape = (rows,)
        self.offset = offset

    def __add__(self, offset: int) -> Index:
        return Index(self.name, self.shape[0], self.offset + offset)


class RecordedBatch:
    """What stands for a ``ForwardBatch`` while a forward is recorded."""

    def __init__(self) -> None:
        self.input_ids = Index("input_ids", TOKENS)
        self.positions = Index("positions", TOKENS)
        self.slot_mapping = Index("slot_mapping", TOKENS)
        self.query_start_loc = Index("query_start_loc", 0)
        self.seq_lens = Index("seq_lens", 0)
        self.block_table = Index("block_table", 0)
        self.logits_indices = Index("logits_indices", LOGITS)
        # A step's own are read when it runs; a layer's window is heeded there as well.
        self.prefix_groups = None
        self.max_query_len = self.max_seq_len = None
        self.adapters = None
        self.states = Index("states", TOKENS)
        self.hidden_states: Symbol | None = None
