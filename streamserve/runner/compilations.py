"""What was compiled so far: after warm-up it must not grow, whoever compiles."""

from __future__ import annotations

import sys

from streamserve_kernels import Kernels


def num_compilations(kernels: Kernels) -> int:
    """Compilations of this process: our kernels' (Numba, Triton) and ``torch.compile``'s graphs."""
    # Importing it takes seconds; where nobody has, nothing was compiled by it.
    dynamo = sys.modules.get("torch._dynamo.utils")
    graphs = 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]
    return kernels.compilations() + int(graphs)
