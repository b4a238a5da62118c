"""GGUF files of mixtures of experts, with the values that the converter writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import transformers

from tests.models.native import ENDS, ERNIE, GQA, LFM2, ROUTED

KV = {"attention.layer_norm_rms_epsilon": 1e-5, "attention.head_count_kv": 2}
HEADS = {"attention.key_length": 16, "attention.value_length": 16}
ROUTED_VALUES = {
    **KV,
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 24,
    "expert_shared_count": 1,
    "expert_gating_func": 2,
    "expert_weights_scale": 2.5,
    "leading_dense_block_count": 1,
}
ERNIE_VALUES = {
    **KV,
    "rope.freq_base": 500_000.0,
    "expert_count": 5,
    "expert_used_count": 2,
    "expert_feed_forward_length": 24,
    "interleave_moe_layer_step": 1,
    "leading_dense_block_count": 1,
    "expert_shared_count": 2,
    "expert_shared_feed_forward_length": 24,  # what is written, and what is true only for Baidu's
}

# As `CASES` of test_gguf.
MIXTURE_CASES: dict[str, tuple[str, Callable[[], Any], dict[str, Any], Callable[[], dict]]] = {
    # The last block, which no layer of the model is, guesses a further token.
    "glm4-moe": (
        "glm4moe",
        lambda: transformers.Glm4MoeConfig(
            **ROUTED, head_dim=16, use_qk_norm=True, attention_bias=True
        ),
        {
            **ROUTED_VALUES,
            **HEADS,
            "block_count": 4,
            "nextn_predict_layers": 1,
            "rope.dimension_count": 8,
            "expert_weights_norm": True,
        },
        lambda: {
            f"blk.3.{name}.weight": np.ones((32, 32), dtype=np.float32)
            for name in ("attn_q", "ffn_gate_inp", "ffn_norm", "nextn.eh_proj")
        },
    ),
    "glm4-moe-groups": (
        "glm4moe",
        lambda: transformers.Glm4MoeConfig(
            **ROUTED, n_group=4, topk_group=2, norm_topk_prob=False, tie_word_embeddings=True
        ),
        {
            **{k: v for k, v in ROUTED_VALUES.items() if k != "expert_gating_func"},
            "rope.dimension_count": 4,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
        },
        dict,
    ),
    "dots1": (
        "dots1",
        lambda: transformers.Dots1Config(**ROUTED, norm_topk_prob=True, rms_norm_eps=1e-5),
        {**ROUTED_VALUES, "expert_weights_norm": True, "expert_group_count": 1},
        dict,
    ),
    "ernie4.5": (
        "ernie4_5",
        lambda: transformers.Ernie4_5Config(**GQA, **ENDS, head_dim=16),
        {**KV, **HEADS, "rope.freq_base": 500_000.0},
        dict,
    ),
    "ernie4.5-moe": (
        "ernie4_5-moe",
        lambda: transformers.Ernie4_5_MoeConfig(**ERNIE),
        ERNIE_VALUES,
        dict,
    ),
    "olmoe": (
        "olmoe",
        lambda: transformers.OlmoeConfig(**GQA, **ENDS, num_experts=5, num_experts_per_tok=3),
        {**KV, "expert_count": 5, "expert_used_count": 3},
        dict,
    ),
    "k-exaone": (
        "exaone-moe",
        lambda: transformers.ExaoneMoeConfig(
            **GQA,
            **ENDS,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            sliding_window=6,
            sliding_window_pattern=2,
        ),
        {
            **KV,
            "attention.sliding_window": 6,
            "attention.sliding_window_pattern": [True, False, True],
            "expert_count": 6,
            "expert_used_count": 2,
            "expert_feed_forward_length": 24,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": 24,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "leading_dense_block_count": 1,
            "nextn_predict_layers": 0,
            "rope.scaling.type": "none",
        },
        dict,
    ),
    "hunyuan-moe": (
        "hunyuan-moe",
        lambda: transformers.HunYuanMoEV1Config(
            **GQA, **ENDS, head_dim=8, num_experts=4, moe_topk=2, tie_word_embeddings=True
        ),
        {
            **KV,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 48,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": 48,
        },
        dict,
    ),
    "minimax-m2": (
        "minimax-m2",
        lambda: transformers.MiniMaxM2Config(
            **GQA,
            **ENDS,
            head_dim=16,
            num_local_experts=5,
            num_experts_per_tok=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        ),
        {
            **KV,
            **HEADS,
            "rope.dimension_count": 8,
            "expert_count": 5,
            "expert_used_count": 2,
            "expert_feed_forward_length": 48,
            "expert_gating_func": 2,
        },
        dict,
    ),
    "lfm2-moe": (
        "lfm2moe",
        lambda: transformers.Lfm2MoeConfig(
            **LFM2,
            moe_intermediate_size=24,
            num_experts=5,
            num_experts_per_tok=3,
            num_dense_layers=1,
            layer_types=["conv", "full_attention", "conv"],
        ),
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.head_count_kv": [0, 2, 0],
            "rope.freq_base": 1e6,
            "shortconv.l_cache": 3,
            "vocab_size": 97,
            "expert_count": 5,
            "expert_used_count": 3,
            "expert_feed_forward_length": 24,
            "expert_gating_func": 2,
            "leading_dense_block_count": 1,
        },
        dict,
    ),
}
