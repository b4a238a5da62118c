"""DeepSeek-MoE, the first generation (Dai et al. 2024; `modeling_deepseek.py`, not run here).

Llama with many small experts in the MLP's place, but for the first layers. What every token goes to
besides are several experts in one matrix, without a gate. Later generations keep latents in place
of keys and values, which is another attention.
"""

from __future__ import annotations

from streamserve.errors import UnsupportedModelError
from streamserve.models.families import routed
from streamserve.models.families.family import Family
from streamserve.models.families.llama import (
    ATTENTION_NAMES,
    MLP_NAMES,
    gated_mlp,
    rotary_decoder,
)
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec, ExpertsSpec

NAMES = WeightNames(
    {
        **ATTENTION_NAMES,
        **MLP_NAMES,
        **routed.EXPERT_NAMES,
    },
    ignored=(r"rotary_emb\.inv_freq",),
)


def _experts(config: HfConfig) -> ExpertsSpec:
    scoring = config.values.get("scoring_func", "softmax")
    if scoring != "softmax":
        raise UnsupportedModelError(
            f"{config.source}: scoring_func {scoring!r} is not supported; these are: softmax"
        )
    activation = config.activation_or("silu", "hidden_act")
    size = config.integer_or(1407, "moe_intermediate_size")
    num_shared = config.optional_integer("n_shared_experts", minimum=0) or 0
    top_k = config.integer("num_experts_per_tok")
    return ExpertsSpec(
        num_experts=config.integer("n_routed_experts"),
        top_k=top_k,
        intermediate_size=size,
        activation=activation,
        renormalise=top_k > 1 and config.flag_or(False, "norm_topk_prob"),
        shared=routed.shared_mlp(num_shared * size, activation),
        shared_gate=False,
    )


def _spec(config: HfConfig) -> DecoderSpec:
    num_layers = config.integer("num_hidden_layers")
    bias = config.flag_or(False, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=(None,) * num_layers,
        mlp=gated_mlp(config),
        qkv_bias=bias,
        output_bias=bias,
    )
    if config.values.get("n_routed_experts") is None:
        return spec
    first = config.integer_or(0, "first_k_dense_replace", minimum=0)
    step = config.integer_or(1, "moe_layer_freq")
    layers = range(first + -first % step, num_layers, step)
    return routed.with_experts(spec, _experts(config), layers)


FAMILIES = (
    Family(
        architecture="DeepseekForCausalLM",
        model_type="deepseek",
        series="DeepSeek",
        title="DeepSeek-MoE (the first)",
        spec=_spec,
        max_positions=lambda config: config.integer_or(2048, "max_position_embeddings"),
        names=NAMES,
    ),
)
