"""Instructions in the layout that C reads, and one run of them on the process's threads."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache

import torch

from streamserve_kernels.interface import PrefixGroups
from streamserve_kernels.native.library import MAX_ARGS, OPERATIONS, Instruction, load_library
from streamserve_kernels.pool import pool

_CODES = {name: code for code, name in enumerate(OPERATIONS)}
_INSTRUCTION = struct.Struct(f"={MAX_ARGS + 1}q")
_PADDING = (0,) * MAX_ARGS
_STEP = struct.Struct("=16q")
_NO_GROUPS = (0, 0, 0, 0)
_OUT_OF_RANGE = -2  # SS_OUT_OF_RANGE
_BAD_PLAN = -3  # SS_BAD_PLAN
_DOUBLE, _INT64 = struct.Struct("=d"), struct.Struct("=q")


def double_bits(value: float) -> int:
    """A float64 as the integer whose bits it has: how a scalar travels among the arguments."""
    return int(_INT64.unpack(_DOUBLE.pack(value))[0])


def pack_step(
    num_tokens: int,
    num_logits: int = 0,
    num_requests: int = 0,
    table_stride: int = 0,
    *addresses_and_groups: int,
) -> bytes:
    """``ss_step``; what is not given is 0."""
    rest = addresses_and_groups + (0,) * (12 - len(addresses_and_groups))
    return _STEP.pack(num_tokens, num_logits, num_requests, table_stride, *rest)


def group_fields(groups: PrefixGroups | None) -> tuple[int, int, int, int]:
    """What ``ss_step`` holds of them. Raises TypeError for numbers other than adjacent int32."""
    if groups is None:
        return _NO_GROUPS
    for tensor in groups:
        if tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise TypeError(f"prefix groups must be contiguous int32, got {tensor.dtype}")
    members, starts, num_blocks = groups
    return num_blocks.shape[0], members.data_ptr(), starts.data_ptr(), num_blocks.data_ptr()


def pack_instructions(instructions: Sequence[tuple[str, tuple[int, ...]]]) -> torch.Tensor:
    """[instructions, 1 + MAX_ARGS] int64: operations and their arguments, for C to read."""
    rows = [(_CODES[name], *args, *_PADDING[len(args) :]) for name, args in instructions]
    return torch.tensor(rows, dtype=torch.int64)


def done_flags() -> torch.Tensor:
    """Whether each thread has prepared its own rows, a line of the cache for each."""
    return torch.zeros(pool().threads(), 64, dtype=torch.uint8)


class Executable:
    """A row of instructions and the handle of the program that runs them.

    ``attention`` is (Hq, Hkv, Dv, S, whether one has a window, blocks of the caches) of its
    attention instructions, zeros without any. Not for two threads at a time.
    """

    def __init__(self, count: int, attention: tuple[int, ...] = (0,) * 6) -> None:
        library = load_library()
        assert library is not None, "the backend was chosen without asking why_not()"
        self._instructions = (Instruction * count)()
        dims = (ctypes.c_int64 * 6)(*attention)
        self._free = library.ss_program_free
        self._run = library.ss_run
        self._handle = library.ss_program_new(
            ctypes.addressof(self._instructions), count, ctypes.addressof(dims)
        )
        if not self._handle:
            raise MemoryError("no memory for a program of the native kernels")
        threads = pool()
        self._parallel = threads.parallel_address
        self._thread_num = threads.thread_num_address

    def __del__(self) -> None:
        # Of the interpreter's last things, when names of this module may be gone.
        if handle := getattr(self, "_handle", None):
            self._free(handle)

    def set(self, index: int, operation: str, *args: int) -> None:
        """Writes one instruction; arguments that are not given are 0."""
        _INSTRUCTION.pack_into(
            self._instructions,
            index * _INSTRUCTION.size,
            _CODES[operation],
            *args,
            *_PADDING[len(args) :],
        )

    def run(self, step: bytes, threads: int) -> None:
        """Runs all instructions. Lets go of the interpreter lock.

        Raises MemoryError, or IndexError for a token id or position outside its table, and for a
        block, slot or row that is not there: then nothing has run.
        """
        result = self._run(self._handle, step, threads, self._parallel, self._thread_num)
        if result == _OUT_OF_RANGE:
            raise IndexError("a token id or a position lies outside its embedding")
        if result == _BAD_PLAN:
            raise IndexError("the step's plan names blocks, slots or rows that are not there")
        if result:
            raise MemoryError("no memory for the scratch of the native kernels")


@lru_cache(maxsize=64)
def eager(count: int, attention: tuple[int, ...] = (0,) * 6) -> Executable:
    """The row of ``count`` instructions that functions on tensors share: set, and run at once."""
    return Executable(count, attention)
