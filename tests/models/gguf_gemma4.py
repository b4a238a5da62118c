"""GGUF files of Gemma 4's sizes, as llama.cpp's converter writes them: see test_gguf.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.models.native import NATIVE

_VALUES = {
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.head_count_kv": 2,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "attention.shared_kv_layers": 0,
    "attention.sliding_window": 6,
    "embedding_length_per_layer_input": 0,
    "rope.dimension_count": 32,
    "rope.dimension_count_swa": 16,
    "rope.freq_base": 1e6,
    "rope.freq_base_swa": 1e4,
}
_SCALES = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
_SCALE = re.compile(r"model\.layers\.(\d+)\.(router\.\w+)$")


def name_of_scale(name: str) -> str | None:
    """`Gemma4Model.modify_tensors`."""
    found = _SCALE.match(name)
    return found and f"blk.{found[1]}.{_SCALES[found[2]]}"


def _rope_freqs() -> dict[str, np.ndarray]:
    """`Gemma4Model.generate_extra_tensors`: half of the pairs of a head of 32 turn."""
    return {"rope_freqs.weight": np.array([1.0] * 8 + [1e30] * 8, dtype=np.float32)}


GEMMA4_CASES: dict[str, tuple[str, Callable[[], Any], dict[str, Any], Callable[[], dict]]] = {
    "gemma4": (
        "gemma4",
        NATIVE["gemma4"],
        {
            **_VALUES,
            "attention.head_count_kv": [1, 2, 1],
            "attention.sliding_window_pattern": [False, True, False],
            "final_logit_softcapping": 5.0,
        },
        _rope_freqs,
    ),
    "gemma4-per-layer": (
        "gemma4",
        NATIVE["gemma4-per-layer"],
        {
            **_VALUES,
            "attention.head_count_kv": 1,
            "attention.sliding_window_pattern": [True, False] * 3,
            "attention.shared_kv_layers": 3,
            "embedding_length_per_layer_input": 8,
            "feed_forward_length": [48] * 3 + [96] * 3,
        },
        _rope_freqs,
    ),
    "gemma4-moe": (
        "gemma4",
        NATIVE["gemma4-moe"],
        {
            **_VALUES,
            "attention.head_count_kv": [2, 2, 1],
            "attention.sliding_window_pattern": [True, True, False],
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 24,
        },
        _rope_freqs,
    ),
}
