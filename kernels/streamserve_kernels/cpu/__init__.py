"""The CPU backend: the names of `naive`, each from where it is fastest."""

from __future__ import annotations

from ..naive import (
    activation,
    compilations,
    copy_blocks,
    embedding,
    gated_activation,
    kv_cache_shape,
    layer_norm,
    moe,
    paged_attention,
    rms_norm,
    rotary_embedding,
    rotary_write_kv,
    warm_up,
    write_kv,
)
from .linear import linear, prepare_linear

__all__ = [
    "activation",
    "compilations",
    "copy_blocks",
    "embedding",
    "gated_activation",
    "kv_cache_shape",
    "layer_norm",
    "linear",
    "moe",
    "name",
    "paged_attention",
    "prepare_linear",
    "rms_norm",
    "rotary_embedding",
    "rotary_write_kv",
    "warm_up",
    "write_kv",
]

name = "cpu"
