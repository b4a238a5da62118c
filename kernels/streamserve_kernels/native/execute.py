"""Instructions in the layout that C reads, and one run of them on the process's threads."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from threading import get_ident

import torch

from streamserve_kernels.interface import PrefixGroups
from streamserve_kernels.native.library import MAX_ARGS, OPERATIONS, PackedInstruction, load_library
from streamserve_kernels.pool import pool
from streamserve_kernels.recurrent import StepStates

Instruction = tuple[str, tuple[int, ...]]
"""An operation and its arguments; those that are not given are 0."""

_CODES = {name: code for code, name in enumerate(OPERATIONS)}
_INSTRUCTION = struct.Struct(f"={MAX_ARGS + 1}q")
_PADDING = (0,) * MAX_ARGS
_STEP_FIELDS = 18
_STEP = struct.Struct(f"={_STEP_FIELDS}q")
_NO_GROUPS = (0, 0, 0, 0)
_OUT_OF_RANGE = -2  # SS_OUT_OF_RANGE
_BAD_PLAN = -3  # SS_BAD_PLAN
_DOUBLE, _INT64 = struct.Struct("=d"), struct.Struct("=q")


def double_bits(value: float) -> int:
    """A float64 as the integer whose bits it has: how a scalar travels among the arguments."""
    return int(_INT64.unpack(_DOUBLE.pack(value))[0])


def pack_step(num_tokens: int, *fields: int) -> bytes:
    """``ss_step``, its fields in order; what is not given is 0."""
    return _STEP.pack(num_tokens, *fields, *_PADDING[len(fields) : _STEP_FIELDS - 1])


def group_fields(groups: PrefixGroups | None) -> tuple[int, int, int, int]:
    """What ``ss_step`` holds of them. Raises TypeError for numbers other than adjacent int32."""
    if groups is None:
        return _NO_GROUPS
    for tensor in groups:
        if tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise TypeError(f"prefix groups must be contiguous int32, got {tensor.dtype}")
    members, starts, num_blocks = groups
    return num_blocks.shape[0], members.data_ptr(), starts.data_ptr(), num_blocks.data_ptr()


def state_fields(states: StepStates | None) -> tuple[int, int]:
    """What ``ss_step`` holds of them. Raises TypeError for numbers other than adjacent int32."""
    if states is None:
        return 0, 0
    for tensor in states:
        if tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise TypeError(f"slots of states must be contiguous int32, got {tensor.dtype}")
    return states.slots.data_ptr(), states.saves.data_ptr()


def pack_instructions(instructions: Sequence[Instruction]) -> torch.Tensor:
    """[instructions, 1 + MAX_ARGS] int64: operations and their arguments, for C to read."""
    rows = [(_CODES[name], *args, *_PADDING[len(args) :]) for name, args in instructions]
    return torch.tensor(rows, dtype=torch.int64)


def done_flags() -> torch.Tensor:
    """Whether each thread has prepared its own rows, a line of the cache for each.

    A product clears its own before a step: no two have the same.
    """
    return torch.empty(pool().threads(), 64, dtype=torch.uint8)


class Executable:
    """A row of instructions and the handle of the program that runs them.

    ``attention`` is (Hq, Hkv, Dv, S, whether one has a window, blocks of the caches) of its
    attention instructions, for each of the sizes that there are. Not for two threads at a time.
    """

    def __init__(self, count: int, attention: Sequence[tuple[int, ...]] = ()) -> None:
        library = load_library()
        assert library is not None, "the backend was chosen without asking why_not()"
        self._instructions = (PackedInstruction * count)()
        dims = (ctypes.c_int64 * (6 * len(attention)))(*chain.from_iterable(attention))
        self._free = library.ss_program_free
        self._run = library.ss_run
        self._handle = library.ss_program_new(
            ctypes.addressof(self._instructions), count, ctypes.addressof(dims), len(attention)
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

    def set(self, instructions: Sequence[Instruction]) -> None:
        """Writes all of its instructions."""
        for index, (operation, args) in enumerate(instructions):
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
def eager(thread: int, count: int, *attention: int) -> Executable:
    """What functions on tensors share that one thread calls: another may run its own meanwhile."""
    return Executable(count, (attention,) if attention else ())


def run_at_once(
    instructions: Sequence[Instruction], step: bytes, threads: int, attention: tuple[int, ...] = ()
) -> None:
    """Runs instructions that are not recorded; raises as `Executable.run`."""
    executable = eager(get_ident(), len(instructions), *attention)
    executable.set(instructions)
    executable.run(step, threads)
