"""Tiny configs of families that only transformers has, and of one that we have too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers

from tests.models import native

BASE = {**native.BASE, **native.ENDS}
GQA = {**BASE, "num_key_value_heads": 2}
WINDOWS = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_routed_experts": 4}
# Heads whose keys are wider than their values, from a latent of a few numbers.
MLA = {
    **BASE,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
DEEPSEEK = {
    **MLA,
    **EXPERTS,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}


def _config(name: str, *parts: Mapping[str, Any], **values: Any) -> Callable[[], Any]:
    merged: dict[str, Any] = {}
    for part in (*parts, values):
        merged.update(part)
    return lambda: getattr(transformers, name)(**merged)


FOREIGN = {
    "apertus": _config("ApertusConfig", GQA),
    "codegen": _config(
        "CodeGenConfig", BASE, n_embd=64, n_inner=48, n_head=4, n_layer=3, rotary_dim=4, n_ctx=128
    ),
    "cohere": _config("CohereConfig", GQA, logit_scale=0.3),
    "cohere2": _config("Cohere2Config", GQA, WINDOWS),
    "deepseek-v2": _config(
        "DeepseekV2Config", DEEPSEEK, topk_method="group_limited_greedy", rope_parameters=YARN
    ),
    "deepseek-v3": _config("DeepseekV3Config", DEEPSEEK, rope_parameters=YARN),
    "exaone4": _config("Exaone4Config", GQA, WINDOWS),
    "gemma3n": _config(
        "Gemma3nTextConfig",
        GQA,
        WINDOWS,
        head_dim=8,
        num_kv_shared_layers=1,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0, 0.0, 0.0],
    ),
    "granite": _config(
        "GraniteConfig", GQA, logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0
    ),
    "granite-moe": _config(
        "GraniteMoeConfig", GQA, num_local_experts=4, num_experts_per_tok=2, logits_scaling=2.0
    ),
    "granite-swa": _config("GraniteSWAConfig", GQA, WINDOWS),
    "llama": _config("LlamaConfig", GQA, tie_word_embeddings=True),
    "nemotron": _config("NemotronConfig", GQA),
    "olmo": _config("OlmoConfig", GQA, clip_qkv=0.5),
    "olmo3": _config("Olmo3Config", GQA, WINDOWS),
    "olmoe": _config("OlmoeConfig", GQA, num_experts=4, num_experts_per_tok=2),
    "opt": _config("OPTConfig", BASE, ffn_dim=48, word_embed_proj_dim=16),
    "persimmon": _config("PersimmonConfig", BASE),
    "stablelm": _config("StableLmConfig", GQA, qk_layernorm=True, use_parallel_residual=True),
    "vaultgemma": _config(
        "VaultGemmaConfig",
        GQA,
        WINDOWS,
        head_dim=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        attn_implementation="eager",
    ),
}
