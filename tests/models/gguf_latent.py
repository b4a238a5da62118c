"""GGUF files of models with latent attention: what `CASES` of ``test_gguf`` has of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import transformers

from tests.models.native import BASE, LATENT, NATIVE, YARN_ROPE

_EXPERTS = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_shared_count": 2,
    "expert_feed_forward_length": 24,
    "expert_weights_scale": 1.5,
    "leading_dense_block_count": 1,
}
_HEADS = {
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.head_count_kv": 1,
    "attention.kv_lora_rank": 16,
    "attention.key_length": 20,
    "attention.value_length": 16,
    "attention.key_length_mla": 12,
    "attention.value_length_mla": 10,
    "rope.dimension_count": 4,
}
_RANK = {"attention.q_lora_rank": 20}
_GROUPS = {"expert_group_count": 4, "expert_group_used_count": 2}
_SIGMOID = {"expert_gating_func": 2, "expert_weights_norm": True}
_YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}

LATENT_CASES: dict[str, tuple[str, Callable[[], Any], dict[str, Any], Callable[[], dict]]] = {
    "deepseek-v2-lite": (
        "deepseek2",
        NATIVE["deepseek-v2-lite"],
        {**_HEADS, **_EXPERTS, **_YARN, "rope.scaling.yarn_log_multiplier": 0.07},
        dict,
    ),
    # Groups by their best expert, and a scale of queries and keys that the file does not change.
    "deepseek-v2": (
        "deepseek2",
        NATIVE["deepseek-v2"],
        {**_HEADS, **_RANK, **_EXPERTS, **_GROUPS, **_YARN, "expert_gating_func": 1},
        dict,
    ),
    "deepseek-v3": (
        "deepseek2",
        NATIVE["deepseek-v3"],
        {**_HEADS, **_RANK, **_EXPERTS, **_GROUPS, **_SIGMOID},
        dict,
    ),
    # Its files have one block more, which guesses a further token.
    "glm-flash": (
        "deepseek2",
        NATIVE["glm-flash"],
        {
            **_HEADS,
            **_RANK,
            **_EXPERTS,
            **_SIGMOID,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "block_count": 4,
            "nextn_predict_layers": 1,
        },
        lambda: {"blk.3.nextn.eh_proj.weight": np.ones((32, 64), dtype=np.float32)},
    ),
    "youtu": (
        "deepseek2",
        lambda: transformers.YoutuConfig(
            **BASE, **LATENT, rope_parameters={**YARN_ROPE, "mscale": 0.8, "mscale_all_dim": 0.8}
        ),
        {**_HEADS, **_RANK, **_YARN, "rope.scaling.yarn_log_multiplier": 0.08},
        dict,
    ),
    "minicpm3": (
        "minicpm3",
        lambda: transformers.MiniCPM3Config(**BASE, **{**LATENT, "v_head_dim": None}),
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.head_count_kv": 4,
            "attention.kv_lora_rank": 16,
            "attention.key_length": 12,
            "rope.dimension_count": 4,
            **_RANK,
        },
        dict,
    ),
}
