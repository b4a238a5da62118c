"""The kernels of streamserve: one contract (`Kernels`), several backends, chosen once at start-up.

    kernels = load("cpu", dtype=torch.bfloat16)  # the fastest backend for the device and the model
    kernels = load("cpu", "naive")               # an explicit choice: one of BACKENDS

Importing this package imports torch and nothing heavier.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import TYPE_CHECKING, cast

import torch

from streamserve_kernels.interface import (
    ActivationKind,
    ExpertKind,
    GatedKind,
    HeadsLinear,
    Kernels,
    NotRecordableError,
    PackedLinear,
    PrefixGroups,
    QuantLinear,
    RecordedStep,
    WritingLinear,
)
from streamserve_kernels.pool import pool
from streamserve_kernels.quantised import QUANTIZATIONS, Quantization
from streamserve_kernels.sampling import SamplingKernels

if TYPE_CHECKING:
    from streamserve_kernels.native.sampling import RowDraws

__all__ = [
    "BACKENDS",
    "QUANTIZATIONS",
    "ActivationKind",
    "ExpertKind",
    "GatedKind",
    "HeadsLinear",
    "Kernels",
    "NotRecordableError",
    "PackedLinear",
    "PrefixGroups",
    "QuantLinear",
    "Quantization",
    "RecordedStep",
    "SamplingKernels",
    "WritingLinear",
    "bfloat16_pays",
    "load",
    "load_row_draws",
    "load_sampling",
    "row_draws_bytes",
]

BACKENDS = ("naive", "cpu", "native", "triton")


def load(
    device: torch.device | str,
    override: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    head_sizes: tuple[tuple[int, int], ...] = (),
    block_size: int = 16,
) -> Kernels:
    """The backend for tensors on `device`: called once, the result is passed on explicitly.

    Without an override, on a CPU: `native` for bfloat16, where it was built and the CPU has the
    instructions and the caches can take the sizes (`head_sizes` are pairs of a query and a value
    head's); else `cpu`, or `naive` with a warning if numba is not installed. On an NVIDIA GPU:
    `triton`, or `naive` with a warning if it is not installed. `naive` elsewhere.
    Raises ValueError for a backend that is unknown or cannot serve the device, ImportError when one
    was asked for that cannot run here.
    """
    device_type = torch.device(device).type
    chosen = override or _choose(device_type, dtype, head_sizes, block_size)
    if chosen not in BACKENDS:
        raise ValueError(f"kernel backend {chosen!r} is not one of {', '.join(BACKENDS)}")
    if chosen == "triton" and (reason := _why_not_triton(device_type)) is not None:
        raise ValueError(f"kernel backend 'triton' cannot serve device {str(device)!r}: {reason}")
    if chosen in ("cpu", "native") and device_type != "cpu":
        raise ValueError(f"kernel backend {chosen!r} cannot serve device {str(device)!r}")
    if chosen == "native" and (reason := _why_not_native()) is not None:
        raise ImportError(f"kernel backend 'native' cannot run here: {reason}")
    if chosen == "triton":
        from streamserve_kernels.triton.runtime import prepare_disk_cache

        prepare_disk_cache()
    return cast(Kernels, importlib.import_module(f"{__name__}.{chosen}"))


def bfloat16_pays(head_sizes: tuple[tuple[int, int], ...], block_size: int = 16) -> bool:
    """Whether on this CPU the fastest kernels for a model of these sizes are those for bfloat16."""
    return _why_not_native() is None and _native_takes(head_sizes, block_size)


def load_sampling(kernels: Kernels) -> SamplingKernels:
    """What samples on the device that a backend serves."""
    module = "triton.sampling" if kernels.name == "triton" else "naive_sampling"
    return cast(SamplingKernels, importlib.import_module(f"{__name__}.{module}"))


def load_row_draws(vocab_size: int) -> RowDraws | None:
    """What draws from rows of logits on a CPU, whatever backend made them; None: not here."""
    if _why_not_native() is not None:
        return None
    from streamserve_kernels.native.sampling import RowDraws

    return RowDraws(vocab_size)


def row_draws_bytes(vocab_size: int, max_rows: int) -> int:
    """Bytes that `load_row_draws(vocab_size)` comes to hold for steps of up to so many rows."""
    if _why_not_native() is not None:
        return 0
    from streamserve_kernels.native.sampling import work_bytes

    return min(max_rows, pool().threads()) * work_bytes(vocab_size)


def _why_not_native() -> str | None:
    from streamserve_kernels.native.library import why_not

    return why_not()


def _native_takes(head_sizes: tuple[tuple[int, int], ...], block_size: int) -> bool:
    return block_size % 16 == 0 and all(
        head % 2 == 0 and value % 16 == 0 for head, value in head_sizes
    )


def _why_not_triton(device_type: str) -> str | None:
    if device_type == "cuda":
        return None
    if device_type != "cpu":
        return "it runs on NVIDIA GPUs"
    from streamserve_kernels.triton.runtime import INTERPRETED

    return (
        None if INTERPRETED else "on a CPU only Triton's interpreter runs it (TRITON_INTERPRET=1)"
    )


def _choose(
    device_type: str,
    dtype: torch.dtype | None,
    head_sizes: tuple[tuple[int, int], ...],
    block_size: int,
) -> str:
    if device_type == "cuda" and torch.version.hip is None:
        if importlib.util.find_spec("triton") is not None:
            return "triton"
        warnings.warn(
            "triton is not installed: falling back to the naive kernels, which are many times "
            "slower (pip install triton)",
            RuntimeWarning,
            stacklevel=3,
        )
    if device_type != "cpu":
        return "naive"
    if dtype == torch.bfloat16:
        reason = _why_not_native()
        if reason is None and _native_takes(head_sizes, block_size):
            return "native"
        if reason is not None:
            warnings.warn(
                f"the native kernels cannot serve bfloat16 here, slower ones do: {reason}",
                RuntimeWarning,
                stacklevel=3,
            )
    if importlib.util.find_spec("numba") is None:
        warnings.warn(
            "numba is not installed: falling back to the naive kernels, which are several "
            "times slower (pip install numba)",
            RuntimeWarning,
            stacklevel=3,
        )
        return "naive"
    return "cpu"
