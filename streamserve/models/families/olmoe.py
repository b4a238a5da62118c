"""OLMoE: queries and keys normed over all heads at once, experts in every layer."""

from __future__ import annotations

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.families.llama import over_all_heads, rotary_decoder
from streamserve.models.families.qwen_moe import NAMES
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec, ExpertsSpec


def _spec(config: HfConfig) -> DecoderSpec:
    if config.values.get("clip_qkv") is not None:
        raise UnsupportedModelError(
            f"{config.source}: clip_qkv {config.values['clip_qkv']!r} is not supported for this "
            "architecture"
        )
    bias = config.flag_or(False, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=ExpertsSpec(
            num_experts=config.integer_or(64, "num_experts", "num_local_experts"),
            top_k=config.integer_or(8, "num_experts_per_tok"),
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation_or("silu", "hidden_act"),
            renormalise=config.flag_or(False, "norm_topk_prob"),
        ),
        default_eps=1e-5,
        default_context=4096,
        qkv_bias=bias,
        output_bias=bias,
    )
    return over_all_heads(spec)


FAMILIES = (
    Family(
        architecture="OlmoeForCausalLM",
        model_type="olmoe",
        series="OLMo",
        title="OLMoE",
        spec=_spec,
        max_positions=lambda config: config.integer_or(4096, "max_position_embeddings"),
        names=NAMES,
    ),
)
