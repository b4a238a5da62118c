"""Granite 3 and its mixtures: Llama with scales on embedding, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from streamserve.models.families.family import family
from streamserve.models.families.llama import (
    ATTENTION_NAMES,
    LAYER,
    LLAMA_NAMES,
    gated_mlp,
    rotary_decoder,
)
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec, ExpertsSpec, MlpSpec, replace_attention

_EXPERTS = LAYER + "block_sparse_moe."
MOE_NAMES = WeightNames(
    {
        **ATTENTION_NAMES,
        "layers.router": (_EXPERTS + "router.layer",),
        "layers.experts.gate_up": (_EXPERTS + "input_linear.weight",),
        "layers.experts.down": (_EXPERTS + "output_linear.weight",),
    },
    sliced=frozenset({"layers.experts.gate_up", "layers.experts.down"}),
    ignored=(r"rotary_emb\.inv_freq",),
)


def scaled_decoder(config: HfConfig, mlp: MlpSpec | ExpertsSpec) -> DecoderSpec:
    bias = config.flag_or(False, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=mlp,
        qkv_bias=bias,
        output_bias=bias,
    )
    scale = config.number_or(1.0, "attention_multiplier")
    added = config.number_or(1.0, "residual_multiplier")
    layers = tuple(
        replace(replace_attention(layer, scale=scale), residual_scale=added)
        for layer in spec.layers
    )
    return replace(
        spec,
        layers=layers,
        embedding_scale=config.number_or(1.0, "embedding_multiplier"),
        logit_scale=1.0 / config.number_or(1.0, "logits_scaling"),
    )


def _granite(config: HfConfig) -> DecoderSpec:
    return scaled_decoder(config, gated_mlp(config, bias=config.flag_or(False, "mlp_bias")))


def experts(config: HfConfig) -> ExpertsSpec:
    return ExpertsSpec(
        num_experts=config.integer_or(8, "num_local_experts"),
        top_k=config.integer_or(2, "num_experts_per_tok"),
        intermediate_size=config.integer("intermediate_size"),
        activation=config.activation_or("silu", "hidden_act"),
    )


def _granite_moe(config: HfConfig) -> DecoderSpec:
    return scaled_decoder(config, experts(config))


FAMILIES = (
    family(
        "GraniteForCausalLM",
        "granite",
        "Granite",
        "Granite 3, 4 (dense)",
        _granite,
        2048,
        LLAMA_NAMES,
    ),
    family(
        "GraniteMoeForCausalLM",
        "granitemoe",
        "Granite",
        "Granite 3 MoE",
        _granite_moe,
        2048,
        MOE_NAMES,
    ),
)
