"""Qwen's mixtures: Qwen 2's and 3's attention before experts, some layers without.

Qwen 2's have one more expert that every token goes to, as far as a gate of its own lets it.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.families.llama import (
    ATTENTION_NAMES,
    LAYER,
    MLP_NAMES,
    gated_mlp,
    rotary_decoder,
)
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec, ExpertsSpec, MlpSpec

_EXPERT = LAYER + "mlp.experts.{expert}."
_SHARED = LAYER + "mlp.shared_expert."
NAMES = WeightNames(
    {
        **ATTENTION_NAMES,
        **MLP_NAMES,
        "layers.router": (LAYER + "mlp.gate",),
        "layers.experts.gate_up": (_EXPERT + "gate_proj", _EXPERT + "up_proj"),
        "layers.experts.down": (_EXPERT + "down_proj",),
        "layers.shared.gate": (LAYER + "mlp.shared_expert_gate",),
        "layers.shared.gate_up": (_SHARED + "gate_proj", _SHARED + "up_proj"),
        "layers.shared.down": (_SHARED + "down_proj",),
    },
    ignored=(r"rotary_emb\.inv_freq",),
)

_STACKED = frozenset({"layers.experts.gate_up", "layers.experts.down"})
# Of later checkpoints: all experts of a layer in one tensor.
ONE_TENSOR_NAMES = replace(
    NAMES,
    modules={
        **NAMES.modules,
        "layers.experts.gate_up": (LAYER + "mlp.experts.gate_up_proj",),
        "layers.experts.down": (LAYER + "mlp.experts.down_proj",),
    },
    transposed=_STACKED,
    sliced=_STACKED,
)


def _without_experts(config: HfConfig, num_layers: int) -> frozenset[int]:
    named = config.values.get("mlp_only_layers") or []
    if not isinstance(named, list) or not all(isinstance(layer, int) for layer in named):
        raise UnsupportedModelError(
            f"{config.source}: mlp_only_layers must list numbers of layers, got {named!r}"
        )
    step = config.integer_or(1, "decoder_sparse_step")
    return frozenset(named) | {layer for layer in range(num_layers) if (layer + 1) % step}


def experts(config: HfConfig, *, default_top_k: int, shared_size: int | None) -> ExpertsSpec:
    activation = config.activation_or("silu", "hidden_act")
    return ExpertsSpec(
        num_experts=config.integer("num_experts", "num_local_experts"),
        top_k=config.integer_or(default_top_k, "num_experts_per_tok"),
        intermediate_size=config.integer("moe_intermediate_size"),
        activation=activation,
        renormalise=config.flag_or(False, "norm_topk_prob"),
        shared=None if shared_size is None else MlpSpec(shared_size, activation, gated=True),
    )


def some_plain(config: HfConfig, spec: DecoderSpec) -> DecoderSpec:
    """The same, with a plain MLP in the layers that the config names."""
    if config.flag_or(False, "use_sliding_window"):
        raise UnsupportedModelError(
            f"{config.source}: use_sliding_window is not supported for this architecture"
        )
    plain = gated_mlp(config)
    without = _without_experts(config, len(spec.layers))
    layers = tuple(
        replace(layer, mlp=plain) if index in without else layer
        for index, layer in enumerate(spec.layers)
    )
    return replace(spec, layers=layers)


def _qwen2_moe(config: HfConfig) -> DecoderSpec:
    shared_size = config.integer_or(5632, "shared_expert_intermediate_size")
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=experts(config, default_top_k=4, shared_size=shared_size),
        default_context=32_768,
        qkv_bias=config.flag_or(True, "qkv_bias"),
    )
    return some_plain(config, spec)


def _qwen3_moe(config: HfConfig) -> DecoderSpec:
    bias = config.flag_or(False, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=experts(config, default_top_k=8, shared_size=None),
        default_kv_heads=4,
        default_context=32_768,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
    return some_plain(config, spec)


FAMILIES = tuple(
    Family(
        architecture=architecture,
        model_type=model_type,
        series="Qwen",
        title=title,
        spec=spec,
        max_positions=lambda config: config.integer_or(32_768, "max_position_embeddings"),
        names=NAMES,
    )
    for architecture, model_type, title, spec in (
        ("Qwen2MoeForCausalLM", "qwen2_moe", "Qwen 1.5, 2 MoE", _qwen2_moe),
        ("Qwen3MoeForCausalLM", "qwen3_moe", "Qwen 3 MoE", _qwen3_moe),
    )
)
