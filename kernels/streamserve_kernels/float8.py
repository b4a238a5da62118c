"""Caches of eight bits: which backends hold them."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn


def refuse_float8(backend: str, *caches: Tensor) -> None:
    """Raises ValueError if a cache is one that a CPU backend does not hold."""
    for cache in caches:
        if cache.dtype == FLOAT8:
            raise ValueError(
                f"kernel backend {backend!r} holds no KV cache of dtype float8_e4m3fn: "
                "the GPU kernels and 'naive' do"
            )
