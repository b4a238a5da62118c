"""The kernels of streamserve: one contract (`Kernels`), several backends, chosen once at start-up.

    kernels = load("cpu")                 # the fastest backend for the device
    kernels = load("cpu", "naive")        # an explicit choice: "naive", "cpu" (later "triton")

Importing this package imports torch and nothing heavier.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import cast

import torch

from streamserve_kernels.interface import ActivationKind, GatedKind, Kernels, PackedLinear

__all__ = ["BACKENDS", "ActivationKind", "GatedKind", "Kernels", "PackedLinear", "load"]

BACKENDS = ("naive", "cpu", "triton")


def load(device: torch.device | str, override: str | None = None) -> Kernels:
    """The backend for tensors on `device`: called once, the result is passed on explicitly.

    Without an override: `cpu` on a CPU (or `naive` with a warning if numba is not installed),
    `naive` elsewhere. Raises ValueError for a backend that is unknown or cannot serve the device,
    ImportError when `cpu` was asked for and numba is missing, NotImplementedError for `triton`.
    """
    device_type = torch.device(device).type
    chosen = override
    if chosen is None:
        chosen = "cpu" if device_type == "cpu" else "naive"
        if chosen == "cpu" and importlib.util.find_spec("numba") is None:
            warnings.warn(
                "numba is not installed: falling back to the naive kernels, which are several "
                "times slower (pip install numba)",
                RuntimeWarning,
                stacklevel=2,
            )
            chosen = "naive"
    if chosen not in BACKENDS:
        raise ValueError(f"kernel backend {chosen!r} is not one of {', '.join(BACKENDS)}")
    if chosen == "triton":
        raise NotImplementedError("the triton kernels are not written yet; use 'naive' or 'cpu'")
    if chosen == "cpu" and device_type != "cpu":
        raise ValueError(f"kernel backend 'cpu' cannot serve device {str(device)!r}")
    return cast(Kernels, importlib.import_module(f"{__name__}.{chosen}"))
