"""What all Triton kernels share: how they are compiled, counted and given their sizes."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
import weakref
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl

# Triton's interpreter runs kernels as numpy on a CPU (TRITON_INTERPRET=1). Kernels take it as a
# constexpr where they must differ: its tl.dot is wrong for bfloat16, so operands become float32.
INTERPRETED: bool = triton.knobs.runtime.interpret

_INTERPRETED = tl.constexpr(INTERPRETED)

_kernels: list[Any] = []


def jit(function: Any = None, **options: Any) -> Any:
    """`triton.jit`, with or without its options, and the kernel's compilations are counted."""
    if function is None:
        return partial(jit, **options)
    kernel = triton.jit(function, **options)
    _kernels.append(kernel)
    return kernel


def compilations() -> int:
    """Kernels that were compiled, or read from Triton's disk cache, by this process so far."""
    return sum(compiled_kernels().values())


def compiled_kernels() -> dict[str, int]:
    """How often each kernel was compiled so far."""
    compiled: dict[str, int] = {}
    for kernel in _kernels:
        # A tuple at once: another thread may be compiling.
        for of_device in tuple(getattr(kernel, "device_caches", {}).values()):
            name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
            compiled[name] = compiled.get(name, 0) + len(of_device[0])
    return compiled


def forget_with(owner: torch.Tensor, known: dict[Any, Any], key: Any) -> None:
    """Takes `key`, made of the address of `owner` and more, out of `known` when that is freed."""
    weakref.finalize(owner, known.pop, key, None).atexit = False


def prepare_disk_cache() -> None:
    """Makes the folder of Triton's disk cache, without which nothing can be compiled.

    Where that cannot be written to, a folder of this process takes its place, with a warning.
    """
    wanted = triton.knobs.cache.dir
    try:
        os.makedirs(wanted, exist_ok=True)
        if os.access(wanted, os.W_OK):
            return
    except OSError:
        pass
    triton.knobs.cache.dir = folder = tempfile.mkdtemp(prefix="streamserve-triton-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    warnings.warn(
        f"compiled kernels cannot be kept for the next start: {wanted} may not be written to "
        "(TRITON_CACHE_DIR names another place)",
        RuntimeWarning,
        stacklevel=3,
    )


@cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels may start while the ones before them run: programmatic dependent launch.

    A kernel that is launched so (`launch_pdl`) waits (`gdc_wait`) in every program before it
    touches what a kernel has written or may still read: the kernel after it relies on it for all
    that came before. Weights and tables may be read earlier, and what a copy has brought, which no
    kernel passes: of a step's inputs its lengths, block tables, groups, positions and slots, but
    not its token ids. (A tensor made by a kernel is there early too, once another one that is
    launched otherwise has followed, as each step's `resolve_tokens` and embedding are.)
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors, which a grid has to fill; a few for the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def bring_to_l2(pointers):
    """Has the cache lines that hold these [...] brought to L2, where others may still write.

    The interpreter loads from them: so it is checked that they are somebody's.
    """
    if _INTERPRETED:
        tl.load(pointers)
    else:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
