"""The memory of a forward that is being written down."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from streamserve_kernels import huge_pages
from streamserve_kernels.interface import NotRecordableError
from streamserve_kernels.native.execute import Instruction, done_flags
from streamserve_kernels.native.product import Work
from streamserve_kernels.native.symbol import LOGITS, TOKENS, RecordedBatch, Symbol


class _Memory:
    """A buffer that goes back to the recorder when no symbol points into it any more."""

    __slots__ = ("_give_back", "tensor")

    def __init__(self, tensor: Tensor, give_back: Callable[[Tensor], None]) -> None:
        self.tensor = tensor
        self._give_back = give_back

    def __del__(self) -> None:
        self._give_back(self.tensor)


class ProductMemory:
    """Memory for the products of so many rows, until no instruction of theirs is to come."""

    def __init__(self, recorder: RecorderMemory, rows: int) -> None:
        self._recorder = recorder
        self._rows = rows
        self._symbols: list[Symbol] = []

    def work(self, row_bytes: int) -> tuple[int, int, int, int]:
        return self._recorder._work(self._rows, row_bytes)

    def rows(self, width: int) -> int:
        self._symbols.append(self._recorder._new(self._rows, width))
        return self._symbols[-1].address


class RecorderMemory:
    """The instructions written down so far, and what their addresses point to.

    Buffers are used again as soon as no symbol points into them.
    """

    def __init__(self, max_tokens: int, max_logits: int) -> None:
        self.batch = RecordedBatch()
        self.max_tokens = max_tokens
        self.max_logits = max_logits
        self.instructions: list[Instruction] = []
        self.keep: list[object] = []  # what the instructions' addresses point to
        # Hq, Hkv, Dv and S of attention: whether one such has a window, blocks of their caches
        self.attentions: dict[tuple[int, ...], tuple[bool, int]] = {}
        self._buffers: list[Tensor] = []  # free, to be used again
        self._works: dict[tuple[int, int], Work] = {}  # by rows and bytes for each
        self._slots: tuple[Tensor, Tensor] | None = None  # of tokens and logits, with adapters
        self._low: dict[int, Tensor] = {}  # what adapters make between their products, by width
        self._scales: dict[int, Tensor] = {}  # what rules know of each row, by width
        self._given: Tensor | None = None  # hidden states

    def give_hidden_states(self, width: int) -> None:
        """Has the batch have some, of tokens, which a step copies from its own."""
        self.batch.hidden_states = given = self._new(TOKENS, width)
        self._given = self._memory_of(given)

    def _new(self, rows: int, *tail: int) -> Symbol:
        width = prod(tail)
        count = self._most_rows(rows) * width
        fitting = [i for i, buffer in enumerate(self._buffers) if buffer.numel() >= count]
        if fitting:
            tensor = self._buffers.pop(min(fitting, key=lambda i: self._buffers[i].numel()))
        else:
            tensor = huge_pages.zeros((count,), torch.bfloat16)
            huge_pages.touch(tensor)
            self.keep.append(tensor)
        memory = _Memory(tensor, self._buffers.append)
        return Symbol(self, memory, tensor.data_ptr(), rows, width, *tail)

    def _most_rows(self, rows: int) -> int:
        if rows == LOGITS or rows > 0:
            return self.max_logits * max(1, rows)
        return self.max_tokens * max(1, -2 - rows)

    def _memory_of(self, x: Symbol) -> Tensor:
        """All rows that x may have."""
        memory: Tensor = x.memory.tensor
        start = (x.address - memory.data_ptr()) // memory.itemsize
        return memory.as_strided((self._most_rows(x.rows), x.width), (x.stride, 1), start)

    def _work(self, rows: int, row_bytes: int) -> tuple[int, int, int, int]:
        """See `Memory.work`; products that follow one another share all but the flags."""
        key = max(self._most_rows(rows), self.max_tokens), row_bytes
        work = self._works.get(key) or self._works.setdefault(key, Work(*key))
        done = done_flags()
        self.keep += work, done
        return (*work.fields, done.data_ptr())

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        if not tensor.is_contiguous():
            raise NotRecordableError(f"a weight of shape {tuple(tensor.shape)} with gaps")
        self.keep.append(tensor)
        return tensor.data_ptr()

    def _add(self, operation: str, *args: int) -> None:
        self.instructions.append((operation, args))
