"""Memory in huge pages: fewer faults while it is first touched, fewer misses while it streams."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20
_CHUNK = 32 * 2**20
_LINE = 64
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap has no name for it


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, a mapping of their own, in huge pages where the system has them.

    Zeroed memory is only promised until it is written. Raises MemoryError when the system
    refuses the mapping.
    """
    num_bytes = prod(shape) * dtype.itemsize
    if not hasattr(mmap, "MADV_HUGEPAGE") or num_bytes < HUGE_PAGE:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(_mapping(num_bytes), dtype=dtype).view(shape)


def touch(tensor: Tensor) -> None:
    """Has the system provide the pages of a contiguous tensor, which stays as it is.

    Lets go of the interpreter lock. Does nothing where the system cannot be asked: pages then come
    when they are first written.
    """
    _advise(tensor, _MADV_POPULATE_WRITE)


def drop(tensor: Tensor) -> None:
    """Gives back the pages of a contiguous tensor in a mapped file that nobody has written to.

    They come from the file again. Of other memory the contents would be lost.
    """
    _advise(tensor, mmap.MADV_DONTNEED)


def _advise(tensor: Tensor, advice: int) -> None:
    """Of the pages that are the tensor's alone."""
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.nbytes) // page * page
    if sys.platform.startswith("linux") and last > first:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(first, last - first, advice)


def _mapping(num_bytes: int) -> mmap.mmap:
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the system refuses {num_bytes} bytes: {error.strerror}") from error
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Arena:
    """Hands out zeroed tensors from large mappings, for weights: many of a megabyte each.

    A mapping goes when the last tensor in it does.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros of a shape, at a multiple of 64 bytes."""
        num_bytes = prod(shape) * dtype.itemsize
        with self._lock:
            if self._used + num_bytes > self._chunk.numel():
                size = -(-max(num_bytes, _CHUNK) // HUGE_PAGE) * HUGE_PAGE
                self._chunk = zeros((size,), torch.uint8)
                self._used = 0
            start = self._used
            self._used = -(-(start + num_bytes) // _LINE) * _LINE
            piece = self._chunk[start : start + num_bytes]
        return piece.view(dtype).view(shape)
