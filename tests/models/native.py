"""Tiny configs of the families that our decoder runs, and the plain models that judge some."""

from __future__ import annotations

import json
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models import references

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GQA = {**BASE, "num_key_value_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
MINISTRAL_ROPE = {
    **YARN_ROPE,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.4,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.1, 1.3, 1.7, 2.5, 3.0, 3.5, 4.0],
}
# Longer heads, of which a part can be turned, and that hold all of longrope's factors.
PHI3 = {**BASE, **ENDS, "num_attention_heads": 2, "num_key_value_heads": 1}
GEMMA = {**GQA, **ENDS, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 6}
GEMMA4 = {
    **GQA,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 6,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.5,
            "rope_theta": 1e6,
        },
    },
}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
SCALES = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
    "logits_scaling": 4.0,
}
SPACE = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "shared_intermediate_size": 40,
    "mamba_n_heads": 4,
    "mamba_d_state": 16,
}
FALCON = {**BASE, **ENDS, "ffn_hidden_size": 48}
FALCON.pop("intermediate_size")
QWEN = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 128,
    "max_position_embeddings": 128,
}
BAICHUAN_13B = {**BASE, "num_attention_heads": 6, "hidden_size": 48, "model_max_length": 128}
BAICHUAN_13B.pop("max_position_embeddings")
CHATGLM = {
    "padded_vocab_size": 97,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "seq_length": 128,
}
DEEPSEEK = {
    **GQA,
    "moe_intermediate_size": 24,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
}
# Every size is another.
LATENT = {
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
LATENT_EXPERTS = {
    **BASE,
    **ENDS,
    **LATENT,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
# Every size of a delta net is another in each of these.
DELTA = {
    **GQA,
    **ENDS,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
DELTA_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
DELTA_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
LFM2 = {**GQA, **ENDS}
# The first layer plain, then DeepSeek's kind of mixture.
ROUTED = {
    **GQA,
    **ENDS,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
ERNIE = {
    **GQA,
    **ENDS,
    "moe_intermediate_size": 24,
    "moe_num_experts": 5,
    "moe_k": 2,
}
FALCON_H1 = {**GQA, **ENDS, "head_dim": 16, "mamba_n_heads": 4, "mamba_d_state": 16}
NEMOTRON_H = {
    **GQA,
    **ENDS,
    "num_hidden_layers": None,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "ssm_state_size": 16,
    "time_step_min": 1e-30,
}
LFM3 = {**LFM2, "head_dim": 16, "sliding_window": 6}
# What a model serves by default is shorter than what is asked of these.
LONGER = {"qwen1-long": 128}

NATIVE = {
    "llama2": lambda: transformers.LlamaConfig(**BASE),
    "llama3": lambda: transformers.LlamaConfig(
        **GQA, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "llama-biases": lambda: transformers.LlamaConfig(
        **GQA, attention_bias=True, mlp_bias=True, head_dim=16
    ),
    "llama-linear": lambda: transformers.LlamaConfig(
        **GQA, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "llama-mqa": lambda: transformers.LlamaConfig(**{**GQA, "num_key_value_heads": 1}),
    "mistral": lambda: transformers.MistralConfig(**GQA, sliding_window=7),
    "ministral": lambda: transformers.MinistralConfig(
        **GQA,
        head_dim=16,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "ministral3": lambda: transformers.Ministral3Config(
        **GQA, **ENDS, head_dim=16, sliding_window=30, rope_parameters=MINISTRAL_ROPE
    ),
    "mistral-nemo": lambda: transformers.MistralConfig(**GQA, sliding_window=None, head_dim=16),
    "qwen2": lambda: transformers.Qwen2Config(**GQA, tie_word_embeddings=True),
    "qwen2-windows": lambda: transformers.Qwen2Config(
        **GQA, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3-layer-types": lambda: transformers.Qwen3Config(
        **GQA,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2.5-yarn": lambda: transformers.Qwen2Config(**GQA, rope_parameters=YARN_ROPE),
    "qwen3": lambda: transformers.Qwen3Config(**GQA, head_dim=16, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, **ENDS),
    "gpt2-by-layer": lambda: transformers.GPT2Config(
        **GPT2, **ENDS, n_inner=40, scale_attn_by_inverse_layer_idx=True, activation_function="relu"
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**BASE),
    "gpt-neox-sequential": lambda: transformers.GPTNeoXConfig(
        **BASE,
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={"rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    ),
    "phi": lambda: transformers.PhiConfig(**BASE),
    "phi-qk-norm": lambda: transformers.PhiConfig(**GQA, qk_layernorm=True),
    "gpt-j": lambda: transformers.GPTJConfig(**GPT2, **ENDS, rotary_dim=4),
    "falcon-7b": lambda: transformers.FalconConfig(**FALCON),
    "falcon-11b": lambda: transformers.FalconConfig(
        **FALCON, num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1
    ),
    "falcon-40b": lambda: transformers.FalconConfig(
        **FALCON, num_kv_heads=2, new_decoder_architecture=True, tie_word_embeddings=False
    ),
    "falcon-rw": lambda: transformers.FalconConfig(
        **FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "starcoder2": lambda: transformers.Starcoder2Config(**GQA, **ENDS, sliding_window=7),
    "starcoder2-unbiased": lambda: transformers.Starcoder2Config(**GQA, **ENDS, use_bias=False),
    "olmo2": lambda: transformers.Olmo2Config(**GQA, **ENDS),
    "phi3": lambda: transformers.Phi3Config(**PHI3, sliding_window=7),
    # Every sequence that is compared grows past these 32 tokens.
    "phi3-long": lambda: transformers.Phi3Config(
        **PHI3, rope_parameters=LONGROPE, original_max_position_embeddings=32
    ),
    "phi4-mini": lambda: transformers.Phi3Config(
        **PHI3,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 10_000.0, "partial_rotary_factor": 0.75},
    ),
    "glm": lambda: transformers.GlmConfig(**GQA, **ENDS, head_dim=16),
    "glm4": lambda: transformers.Glm4Config(**GQA, **ENDS, head_dim=16, attention_bias=False),
    "gemma": lambda: transformers.GemmaConfig(**GQA, **ENDS, head_dim=16, hidden_act="gelu"),
    "gemma2": lambda: transformers.Gemma2Config(
        **GEMMA,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        attn_implementation="eager",
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GEMMA,
        final_logit_softcapping=5.0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    ),
    "olmo": lambda: transformers.OlmoConfig(**GQA, **ENDS),
    "olmo-1.7": lambda: transformers.OlmoConfig(**GQA, **ENDS, clip_qkv=0.5),
    "olmo3": lambda: transformers.Olmo3Config(
        **GQA,
        **ENDS,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            "full_attention": {**YARN_ROPE, "rope_theta": 5e5},
        },
    ),
    "exaone4": lambda: transformers.Exaone4Config(
        **GQA,
        **ENDS,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=LLAMA3_ROPE,
    ),
    "exaone4-small": lambda: transformers.Exaone4Config(
        **GQA,
        **ENDS,
        tie_word_embeddings=True,
        sliding_window=None,
        layer_types=["full_attention"] * 3,
    ),
    "seed-oss": lambda: transformers.SeedOssConfig(**GQA, **ENDS, head_dim=16),
    "hunyuan-dense": lambda: transformers.HunYuanDenseV1Config(
        **GQA,
        **ENDS,
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0},
    ),
    "arcee": lambda: transformers.ArceeConfig(**GQA, **ENDS, rope_parameters=YARN_ROPE),
    "nemotron": lambda: transformers.NemotronConfig(**GQA, **ENDS),
    "stablelm": lambda: transformers.StableLmConfig(**GQA, **ENDS, use_qkv_bias=True),
    "stablelm-12b": lambda: transformers.StableLmConfig(
        **GQA, **ENDS, qk_layernorm=True, use_parallel_residual=True
    ),
    "gpt-bigcode": lambda: transformers.GPTBigCodeConfig(**GPT2, **ENDS),
    "gpt-bigcode-heads": lambda: transformers.GPTBigCodeConfig(
        **GPT2, **ENDS, multi_query=False, n_inner=40
    ),
    "opt": lambda: transformers.OPTConfig(**BASE, **ENDS, ffn_dim=48),
    "galactica": lambda: transformers.OPTConfig(
        **BASE,
        **ENDS,
        ffn_dim=48,
        activation_function="gelu",
        enable_bias=False,
        layer_norm_elementwise_affine=False,
    ),
    "helium": lambda: transformers.HeliumConfig(**GQA, **ENDS, head_dim=8),
    "cohere": lambda: transformers.CohereConfig(
        **GQA, **ENDS, logit_scale=0.3, attention_bias=True, tie_word_embeddings=False
    ),
    "command-r-plus": lambda: transformers.CohereConfig(**GQA, **ENDS, use_qk_norm=True),
    "cohere2": lambda: transformers.Cohere2Config(
        **{**GQA, "num_hidden_layers": 4}, **ENDS, sliding_window=6
    ),
    # As the largest one: values that are keys, and other heads, in full attention.
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **GEMMA4,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        final_logit_softcapping=5.0,
    ),
    # As the smallest: the last layers attend to what the first of their kinds left.
    "gemma4-per-layer": lambda: transformers.Gemma4TextConfig(
        **{**GEMMA4, "num_hidden_layers": 6, "num_key_value_heads": 1},
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97,
    ),
    "gemma4-shares-all": lambda: transformers.Gemma4TextConfig(
        **GEMMA4,
        layer_types=["full_attention"] * 3,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=97,
        hidden_activation="silu",
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    ),
    "gemma4-moe": lambda: transformers.Gemma4TextConfig(
        **GEMMA4,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
    ),
    "gemma4-unified": lambda: transformers.Gemma4UnifiedTextConfig(
        **GEMMA4,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=5.0,
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**GQA, **ENDS, no_rope_layer_interval=2),
    "smollm3-windows": lambda: transformers.SmolLM3Config(
        **GQA, **ENDS, no_rope_layers=[0, 1, 0], use_sliding_window=True, sliding_window=6
    ),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **GQA,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **GQA,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
    "qwen1": lambda: references.Qwen(**QWEN),
    "qwen1-long": lambda: references.Qwen(
        **{**QWEN, "seq_length": 20}, served=128, use_dynamic_ntk=True, use_logn_attn=True
    ),
    "baichuan1-7b": lambda: references.Baichuan(
        "BaiChuanForCausalLM", **BASE, tie_word_embeddings=False
    ),
    "baichuan1-13b": lambda: references.Baichuan(**BAICHUAN_13B),
    "baichuan2-7b": lambda: references.Baichuan(**BASE, z_loss_weight=0),
    "baichuan2-13b": lambda: references.Baichuan(**BAICHUAN_13B, z_loss_weight=0),
    "chatglm2": lambda: references.ChatGlm(**CHATGLM),
    "chatglm-biases": lambda: references.ChatGlm(
        "ChatGLMForConditionalGeneration",
        **{**CHATGLM, "multi_query_attention": False, "add_bias_linear": True, "rmsnorm": False},
    ),
    "glm4-remote": lambda: references.ChatGlm(
        **{**CHATGLM, "layernorm_epsilon": 1.5625e-7}, rope_ratio=500
    ),
    "deepseek-moe": lambda: references.Deepseek(**DEEPSEEK),
    "deepseek-moe-renormalised": lambda: references.Deepseek(
        **{**DEEPSEEK, "norm_topk_prob": True, "moe_layer_freq": 2, "first_k_dense_replace": 0}
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **GQA,
        **ENDS,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=6,
        rope_parameters={**YARN_ROPE, "truncate": False},
    ),
    "granite": lambda: transformers.GraniteConfig(**GQA, **SCALES, mlp_bias=True),
    "granite-moe": lambda: transformers.GraniteMoeConfig(
        **GQA, **SCALES, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek-v2": lambda: transformers.DeepseekV2Config(
        **{**LATENT_EXPERTS, "topk_method": "group_limited_greedy"}, rope_parameters=YARN_ROPE
    ),
    "deepseek-v2-lite": lambda: transformers.DeepseekV2Config(
        **{**LATENT_EXPERTS, "q_lora_rank": None},
        rope_parameters={**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 0.7},
    ),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(**LATENT_EXPERTS),
    "kimi-k2": lambda: transformers.DeepseekV3Config(
        **{**LATENT_EXPERTS, "n_group": 1, "topk_group": 1, "qk_nope_head_dim": 6},
        rope_interleave=False,
        norm_topk_prob=False,
    ),
    "glm-flash": lambda: transformers.Glm4MoeLiteConfig(
        **{**LATENT_EXPERTS, "n_group": 1, "topk_group": 1},
    ),
    "minicpm3": lambda: transformers.MiniCPM3Config(**BASE, **LATENT, scale_depth=0.9),
    "minicpm3-plain": lambda: transformers.MiniCPM3Config(
        **BASE,
        **{**LATENT, "q_lora_rank": None, "v_head_dim": None},
        dim_model_base=None,
        scale_emb=1.0,
        tie_word_embeddings=False,
    ),
    "youtu": lambda: transformers.YoutuConfig(
        **BASE, **LATENT, rope_parameters={**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.8}
    ),
    # ALiBi with a number of heads that is no power of two.
    "bloom": lambda: transformers.BloomConfig(
        **ENDS, vocab_size=97, hidden_size=48, n_layer=3, n_head=6
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**GQA, **ENDS, num_experts=5, num_experts_per_tok=3),
    "glm4-moe": lambda: transformers.Glm4MoeConfig(
        **ROUTED, head_dim=16, use_qk_norm=True, attention_bias=True
    ),
    "glm4-moe-groups": lambda: transformers.Glm4MoeConfig(
        **{**ROUTED, "n_shared_experts": 2},
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        tie_word_embeddings=True,
    ),
    "dots1": lambda: transformers.Dots1Config(
        **{**ROUTED, "first_k_dense_replace": 0},
        sliding_window=6,
        max_window_layers=1,
        n_group=2,
        norm_topk_prob=True,
    ),
    "k-exaone": lambda: transformers.ExaoneMoeConfig(
        **GQA,
        **ENDS,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        num_shared_experts=1,
        sliding_window=6,
        sliding_window_pattern=2,
        n_group=2,
    ),
    "k-exaone-as-published": lambda: transformers.ExaoneMoeConfig(
        **GQA,
        **ENDS,
        architectures=["ExaoneMoEForCausalLM"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    ),
    "hunyuan-moe": lambda: transformers.HunYuanMoEV1Config(
        **GQA, **ENDS, head_dim=16, num_experts=4, moe_topk=[2, 2, 2]
    ),
    "solar-open": lambda: transformers.SolarOpenConfig(
        **{
            k: v
            for k, v in ROUTED.items()
            if k not in ("intermediate_size", "first_k_dense_replace")
        },
        head_dim=16,
    ),
    "minimax-m2": lambda: transformers.MiniMaxM2Config(
        **GQA,
        **ENDS,
        head_dim=16,
        num_local_experts=5,
        num_experts_per_tok=2,
        rope_parameters={"rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    ),
    "ernie4.5": lambda: transformers.Ernie4_5Config(**GQA, **ENDS, head_dim=16, use_bias=True),
    "ernie4.5-as-published": lambda: transformers.Ernie4_5Config(
        **GQA, **ENDS, head_dim=8, architectures=["Ernie4_5_ForCausalLM"]
    ),
    "ernie4.5-moe": lambda: transformers.Ernie4_5_MoeConfig(
        **ERNIE, moe_layer_start_index=0, moe_layer_interval=2
    ),
    "mixtral": lambda: transformers.MixtralConfig(**GQA, num_local_experts=4),
    "mixtral-window": lambda: transformers.MixtralConfig(
        **GQA, num_local_experts=3, num_experts_per_tok=1, sliding_window=5
    ),
}

HYBRID = {
    "qwen3-next": lambda: transformers.Qwen3NextConfig(
        **DELTA, **DELTA_EXPERTS, mlp_only_layers=[1]
    ),
    "qwen3.5": lambda: transformers.Qwen3_5TextConfig(
        **{**DELTA, "layer_types": None, "linear_num_key_heads": 3, "linear_num_value_heads": 3},
        linear_conv_kernel_dim=3,
        rms_norm_eps=1e-5,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    # Its last layer is no attention: only some rows of it are worth finishing.
    "qwen3.5-last": lambda: transformers.Qwen3_5TextConfig(
        **{**DELTA, "layer_types": [*reversed(DELTA["layer_types"])]},
        rope_parameters={**DELTA_ROPE, "mrope_section": [1, 1, 0], "mrope_interleaved": True},
    ),
    "granite-4": lambda: transformers.GraniteMoeHybridConfig(
        **GQA, **SCALES, **SPACE, num_local_experts=4, num_experts_per_tok=2
    ),
    # Positions that are rotated, no experts, biases, and groups.
    "granite-4-dense": lambda: transformers.GraniteMoeHybridConfig(
        **{**GQA, **SPACE, "mamba_n_heads": 8, "mamba_d_state": 8},
        mamba_n_groups=2,
        mamba_d_conv=3,
        rms_norm_eps=1e-5,
        num_local_experts=0,
        position_embedding_type="rope",
        attention_bias=True,
        mamba_proj_bias=True,
        mamba_conv_bias=False,
        tie_word_embeddings=True,
    ),
    "qwen3.5-moe": lambda: transformers.Qwen3_5MoeTextConfig(
        **{**DELTA, "linear_key_head_dim": 16, "linear_value_head_dim": 16}, **DELTA_EXPERTS
    ),
    "lfm2": lambda: transformers.Lfm2Config(**LFM2, full_attn_idxs=[1], block_multiple_of=16),
    "lfm2-moe": lambda: transformers.Lfm2MoeConfig(
        **LFM2,
        moe_intermediate_size=24,
        num_experts=5,
        num_experts_per_tok=3,
        num_dense_layers=1,
        routed_scaling_factor=1.5,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "lfm3": lambda: transformers.Lfm3Config(
        **LFM3, layer_types=["conv", "full_attention", "sliding_attention"]
    ),
    # The kinds of layers and the rotary positions that a config need not say.
    "lfm3-plain": lambda: transformers.Lfm3Config(
        **{**LFM3, "num_hidden_layers": 5},
        use_sandwich_norm=False,
        use_attention_gate=False,
        attention_bias=True,
        conv_bias=True,
        conv_L_cache=4,
        norm_eps=1e-6,
        tie_word_embeddings=False,
    ),
    "falcon-h1": lambda: transformers.FalconH1Config(
        **FALCON_H1,
        mamba_d_ssm=48,
        attention_in_multiplier=0.8,
        attention_out_multiplier=0.7,
        key_multiplier=0.6,
        embedding_multiplier=3.0,
        lm_head_multiplier=0.5,
        mlp_multipliers=[0.9, 0.6],
        ssm_multipliers=[0.35, 0.25, 0.7, 0.5, 0.3],
        ssm_in_multiplier=1.25,
        ssm_out_multiplier=0.8,
    ),
    "nemotron-h": lambda: transformers.NemotronHConfig(
        **NEMOTRON_H, layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"]
    ),
    # A state space is the last layer, and an MLP the first.
    "nemotron-h-biases": lambda: transformers.NemotronHConfig(
        **NEMOTRON_H,
        layers_block_type=["mlp", "full_attention", "linear_attention"],
        mlp_bias=True,
        use_bias=True,
        use_conv_bias=False,
        conv_kernel=2,
    ),
    "nemotron-h-moe": lambda: transformers.NemotronHConfig(
        **NEMOTRON_H,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        n_routed_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=40,
        routed_scaling_factor=2.5,
    ),
    # Normed behind the gate, in groups; what multiplies is 1.
    "falcon-h1-normed": lambda: transformers.FalconH1Config(
        **FALCON_H1,
        mamba_d_ssm=None,
        mamba_n_groups=2,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        mamba_conv_bias=False,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "lfm2-biases": lambda: transformers.Lfm2Config(
        **{**LFM2, "hidden_size": 64, "tie_word_embeddings": False},
        layer_types=["conv", "full_attention", "conv"],
        conv_bias=True,
        conv_L_cache=4,
        norm_eps=1e-6,
        block_auto_adjust_ff_dim=False,
    ),
}
"""Layers that keep a state in the place of keys and values."""


def config_values(name: str) -> dict[str, Any]:
    """The config.json that a case saves."""
    made = {**NATIVE, **HYBRID}[name]()
    if isinstance(made, references.Reference):
        return made.values()
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[made.model_type]
    return {"architectures": [architecture], **json.loads(made.to_json_string(use_diff=False))}
