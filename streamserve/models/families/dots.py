"""dots.llm1 (rednote-hilab): Qwen 3's attention, then DeepSeek's kind of mixture."""

from __future__ import annotations

from streamserve.models.families import routed
from streamserve.models.families.family import Family
from streamserve.models.families.llama import gated_mlp, later_windows, rotary_decoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec


def _spec(config: HfConfig) -> DecoderSpec:
    num_layers = config.integer("num_hidden_layers")
    window = config.optional_integer("sliding_window", default=4096)
    bias = config.flag_or(False, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=later_windows(config, window, default_first=62),
        mlp=gated_mlp(config),
        default_kv_heads=None if "num_key_value_heads" in config.values else 32,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
    experts = routed.routed_experts(
        config,
        num_experts=config.integer("n_routed_experts"),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer_or(1408, "moe_intermediate_size"),
        num_shared=config.integer("n_shared_experts", minimum=0),
        renormalise=config.flag_or(False, "norm_topk_prob"),
    )
    first = config.integer_or(0, "first_k_dense_replace", minimum=0)
    return routed.with_experts(spec, experts, range(first, num_layers))


FAMILIES = (
    Family(
        architecture="Dots1ForCausalLM",
        model_type="dots1",
        series="dots",
        title="dots.llm1",
        spec=_spec,
        max_positions=lambda config: config.integer_or(2048, "max_position_embeddings"),
        names=routed.NAMES,
    ),
)
