"""GGUF files of models whose layers keep states, with the values that the converter writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import transformers

from tests.models.native import DELTA, DELTA_EXPERTS, DELTA_ROPE, FALCON_H1, HYBRID, LFM2

DELTA_VALUES = {
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "rope.freq_base": 10_000.0,
    "rope.dimension_count": 4,
    "rope.dimension_sections": [11, 11, 10, 0],
    "ssm.conv_kernel": 4,
    "ssm.state_size": 8,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 48,
    "attention.recurrent_layers": [True, False, True, False],
    "full_attention_interval": 4,
}
EXPERT_VALUES = {
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_feed_forward_length": 24,
    "expert_shared_feed_forward_length": 40,
}
EACH = {**DELTA, "layer_types": None, "linear_num_key_heads": 3, "linear_num_value_heads": 3}
EACH_VALUES = {
    **{k: v for k, v in DELTA_VALUES.items() if k != "attention.recurrent_layers"},
    "ssm.group_count": 3,
    "ssm.time_step_rank": 3,
    "ssm.inner_size": 36,
    "full_attention_interval": 4,
}

GRANITE_SCALES = {
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.scale": 0.3,
    "embedding_scale": 3.0,
    "logit_scale": 4.0,
    "residual_scale": 0.4,
}

NEMOTRON_H_VALUES = {
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 2,
    "ssm.inner_size": 48,
    "ssm.time_step_rank": 4,
}
FALCON_H1_VALUES = {
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
}

# As `CASES` of test_gguf.
HYBRID_CASES: dict[str, tuple[str, Callable[[], Any], dict[str, Any], Callable[[], dict]]] = {
    # As many value heads as key heads: nothing is in another order.
    "qwen3.5-each": (
        "qwen35",
        lambda: transformers.Qwen3_5TextConfig(**EACH, tie_word_embeddings=True),
        EACH_VALUES,
        dict,
    ),
    "qwen3.5": (
        "qwen35",
        lambda: transformers.Qwen3_5TextConfig(**DELTA, rope_parameters=DELTA_ROPE),
        DELTA_VALUES,
        dict,
    ),
    # The last block, which no layer of the model is, guesses further tokens.
    "qwen3.5-guesses": (
        "qwen35",
        lambda: transformers.Qwen3_5TextConfig(**{**DELTA, "linear_num_value_heads": 6}),
        {
            **DELTA_VALUES,
            "ssm.time_step_rank": 6,
            "ssm.inner_size": 72,
            "block_count": 5,
            "nextn_predict_layers": 1,
            "attention.recurrent_layers": [True, False, True, False, False],
        },
        lambda: {
            f"blk.4.{name}.weight": np.ones((32, 32), dtype=np.float32)
            for name in ("attn_q", "attn_qkv", "ffn_up", "nextn.eh_proj")
        },
    ),
    "qwen3.5-moe": (
        "qwen35moe",
        lambda: transformers.Qwen3_5MoeTextConfig(**DELTA, **DELTA_EXPERTS),
        {**DELTA_VALUES, **EXPERT_VALUES},
        dict,
    ),
    "qwen3-next": (
        "qwen3next",
        lambda: transformers.Qwen3NextConfig(**DELTA, **DELTA_EXPERTS),
        {**DELTA_VALUES, **EXPERT_VALUES},
        dict,
    ),
    # No rotary positions, and experts beside what all use.
    "granite-4": (
        "granitehybrid",
        HYBRID["granite-4"],
        {
            **GRANITE_SCALES,
            "attention.head_count_kv": [0, 2, 0],
            "rope.scaling.finetuned": False,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_shared_feed_forward_length": 40,
            "ssm.conv_kernel": 4,
            "ssm.state_size": 16,
            "ssm.group_count": 1,
            "ssm.inner_size": 64,
            "ssm.time_step_rank": 4,
        },
        dict,
    ),
    "granite-4-dense": (
        "granitehybrid",
        HYBRID["granite-4-dense"],
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.scale": 1.0,
            "attention.head_count_kv": [0, 2, 0],
            "feed_forward_length": 40,
            "ssm.conv_kernel": 3,
            "ssm.state_size": 8,
            "ssm.group_count": 2,
            "ssm.inner_size": 64,
            "ssm.time_step_rank": 8,
        },
        dict,
    ),
    "nemotron-h": (
        "nemotron_h",
        HYBRID["nemotron-h"],
        {
            **NEMOTRON_H_VALUES,
            "attention.head_count_kv": [0, 0, 2, 0],
            "feed_forward_length": [0, 48, 0, 48],
        },
        dict,
    ),
    "nemotron-h-moe": (
        "nemotron_h_moe",
        HYBRID["nemotron-h-moe"],
        {
            **NEMOTRON_H_VALUES,
            "attention.head_count_kv": [0, 0, 2, 0],
            "feed_forward_length": [0, 24, 0, 24],
            "expert_count": 5,
            "expert_used_count": 2,
            "expert_feed_forward_length": 24,
            "expert_shared_feed_forward_length": 40,
            "expert_shared_count": 1,
            "expert_group_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
        },
        dict,
    ),
    "falcon-h1": (
        "falcon-h1",
        lambda: transformers.FalconH1Config(**FALCON_H1, mamba_d_ssm=48),
        {**FALCON_H1_VALUES, "ssm.group_count": 1, "ssm.inner_size": 48},
        dict,
    ),
    "falcon-h1-normed": (
        "falcon-h1",
        HYBRID["falcon-h1-normed"],
        {**FALCON_H1_VALUES, "ssm.group_count": 2, "ssm.inner_size": 64},
        dict,
    ),
    "lfm2": (
        "lfm2",
        lambda: transformers.Lfm2Config(
            **LFM2,
            layer_types=["conv", "full_attention", "conv"],
            block_auto_adjust_ff_dim=False,
        ),
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.head_count_kv": [0, 2, 0],
            "rope.freq_base": 1e6,
            "shortconv.l_cache": 3,
            "vocab_size": 97,
        },
        dict,
    ),
}
