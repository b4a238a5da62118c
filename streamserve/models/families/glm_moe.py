"""GLM 4.5, 4.6 and 4.7, and Air: half of each head turns, then DeepSeek's kind of mixture.

Checkpoints carry one more layer, which guesses a further token; it is not read. Solar Open is the
same with whole heads that turn and experts in every layer.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.models.families import routed
from streamserve.models.families.family import family
from streamserve.models.families.llama import gated_mlp, rotary_decoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec, ExpertsSpec


def _spec(config: HfConfig) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_layers = config.integer("num_hidden_layers")
    head_size = config.head_size(hidden_size, config.integer("num_attention_heads"))
    spec = rotary_decoder(
        config,
        windows=(None,) * num_layers,
        mlp=gated_mlp(config),
        rope=config.rope(head_size, default_partial=0.5, default_context=131_072),
        head_size=head_size,
        default_kv_heads=8,
        default_eps=1e-5,
        qkv_bias=config.flag_or(False, "attention_bias"),
        qk_norm=config.flag_or(False, "use_qk_norm"),
    )
    first = config.integer_or(1, "first_k_dense_replace", minimum=0)
    return routed.with_experts(spec, _experts(config, 1408), range(first, num_layers))


def _experts(config: HfConfig, default_size: int) -> ExpertsSpec:
    return routed.routed_experts(
        config,
        num_experts=config.integer_or(128, "n_routed_experts"),
        top_k=config.integer_or(8, "num_experts_per_tok"),
        intermediate_size=config.integer_or(default_size, "moe_intermediate_size"),
        num_shared=config.integer_or(1, "n_shared_experts", minimum=0),
        renormalise=config.flag_or(True, "norm_topk_prob"),
    )


def _solar_open(config: HfConfig) -> DecoderSpec:
    return rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=_experts(config, 1280),
        head_size=config.integer_or(128, "head_dim"),
        default_kv_heads=8,
        default_eps=1e-5,
        default_theta=1e6,
        default_context=131_072,
        qkv_bias=config.flag_or(False, "attention_bias"),
    )


def _names(spec: DecoderSpec) -> WeightNames:
    return replace(routed.NAMES, skipped=(f"model.layers.{len(spec.layers)}.",))


FAMILIES = (
    family(
        "Glm4MoeForCausalLM", "glm4_moe", "GLM", "GLM 4.5, 4.6, 4.7, Air", _spec, 131_072, _names
    ),
    family(
        "SolarOpenForCausalLM",
        "solar_open",
        "Solar",
        "Solar Open",
        _solar_open,
        131_072,
        routed.NAMES,
    ),
)
