"""HunYuan, the dense ones: Llama with norms of queries and keys behind their rotation."""

from __future__ import annotations

from dataclasses import replace

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
from streamserve.models.spec import DecoderSpec, QkNormSpec, RopeSpec, replace_attention

NAMES = WeightNames(
    {
        **ATTENTION_NAMES,
        **MLP_NAMES,
        "layers.q_norm": (LAYER + "self_attn.query_layernorm",),
        "layers.k_norm": (LAYER + "self_attn.key_layernorm",),
    },
)


def _rope(config: HfConfig, head_size: int) -> RopeSpec:
    """What they call dynamic, and give an ``alpha``, is a larger base for every length."""
    rope = config.rope(head_size)
    given = config.values.get("rope_scaling") or config.values.get("rope_parameters") or {}
    alpha = HfConfig(given, f"{config.source}: rope").number_or(0.0, "alpha")
    if not alpha or rope.scaling is None or rope.scaling.kind != "dynamic":
        return rope
    return replace(rope, base=rope.base * alpha ** (head_size / (head_size - 2)), scaling=None)


def _spec(config: HfConfig) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    head_size = config.head_size(hidden_size, config.integer("num_attention_heads"))
    bias = config.flag_or(False, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=gated_mlp(config),
        default_eps=1e-5,
        rope=_rope(config, head_size),
        qkv_bias=bias,
        output_bias=bias,
    )
    assert spec.final_norm is not None
    norm = QkNormSpec(spec.final_norm, rotates_first=True)
    layers = tuple(replace_attention(layer, qk_norm=norm) for layer in spec.layers)
    return replace(spec, layers=layers)


FAMILIES = (
    Family(
        architecture="HunYuanDenseV1ForCausalLM",
        model_type="hunyuan_v1_dense",
        series="HunYuan",
        title="HunYuan 0.5B, 1.8B, 4B, 7B",
        spec=_spec,
        max_positions=lambda config: config.integer_or(2048, "max_position_embeddings"),
        names=NAMES,
    ),
)
