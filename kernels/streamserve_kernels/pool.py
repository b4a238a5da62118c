"""One compute pool per process: our C functions run on the threads of torch's own libgomp.

Torch's operators run on libgomp's threads, which spin for a while after each region. A second pool
(Numba's `prange`, say) would fight them for the same cores at every layer, so kernels are plain C
functions handed to `GOMP_parallel`, the entry point that gcc emits for `#pragma omp parallel`, of
the very library that torch has loaded. Without a libgomp (macOS, Windows) they run on the calling
thread alone.

A libgomp pool belongs to the thread that opens the region: call every kernel from one thread.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


def _libgomp_path() -> str | None:
    """The libgomp that torch has mapped; None elsewhere than on Linux or with another OpenMP."""
    if not sys.platform.startswith("linux"):
        return None
    return find_libgomp(Path("/proc/self/maps").read_bytes(), str(Path(torch.__file__).parent))


def find_libgomp(maps: bytes, torch_directory: str) -> str | None:
    """The libgomp in ``maps``, torch's own if there are several; its path may have spaces."""
    lines = [os.fsdecode(line).split(maxsplit=5) for line in maps.splitlines()]
    paths = {fields[5] for fields in lines if len(fields) == 6}
    found = [path for path in paths if Path(path).name.startswith("libgomp")]
    return min(found, key=lambda path: (not path.startswith(torch_directory), path), default=None)


class Pool:
    """Runs C bodies `void f(int64 *args)` on one thread or on torch's threads."""

    def __init__(self, libgomp: str | None) -> None:
        self._parallel: Any = None
        self._addresses: tuple[int, ...] = (0, 0, 0)
        if libgomp is None:
            return
        library = ctypes.CDLL(libgomp)
        self._parallel = library.GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None
        self._addresses = tuple(
            ctypes.cast(function, ctypes.c_void_p).value or 0
            for function in (
                library.omp_get_thread_num,
                library.omp_get_num_threads,
                library.GOMP_barrier,
            )
        )

    @property
    def parallel_address(self) -> int:
        """The address of `GOMP_parallel`, 0 without a libgomp."""
        if self._parallel is None:
            return 0
        return ctypes.cast(self._parallel, ctypes.c_void_p).value or 0

    @property
    def thread_num_address(self) -> int:
        """The address of `omp_get_thread_num`, 0 without a libgomp."""
        return self._addresses[0]

    @property
    def is_parallel(self) -> bool:
        return self._parallel is not None

    def threads(self) -> int:
        """Threads that a parallel region gets: what torch uses, or 1 without libgomp."""
        return torch.get_num_threads() if self.is_parallel else 1

    def kernel(self, compiled: Any, layout: str) -> Callable[..., None]:
        """A callable `(threads, *args)` that packs args by a `struct` layout and runs the body.

        `layout` has one letter an argument: q for addresses and integers, d for float64.
        """
        pack = struct.Struct(f"=3q{layout}").pack
        address = compiled.address
        direct = _C_FUNCTION(address)
        parallel = self._parallel
        thread_num, num_threads, barrier = self._addresses

        def run(threads: int, *args: float) -> None:
            if threads == 1 or parallel is None:
                direct(pack(0, 0, 0, *args))
            else:
                parallel(address, pack(thread_num, num_threads, barrier, *args), threads, 0)

        return run


@lru_cache(maxsize=1)
def pool() -> Pool:
    """The process's pool, made at the first call."""
    return Pool(_libgomp_path())
