"""OLMo, in its three generations.

The first is Llama with layer norms that have no weights. The others norm after each half instead of
before it, and queries and keys over all heads at once; the third has windows in all but every
fourth layer, and stretches the positions of the others only.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.models.families.family import family
from streamserve.models.families.llama import (
    ATTENTION_NAMES,
    LAYER,
    LLAMA_NAMES,
    MLP_NAMES,
    gated_mlp,
    over_all_heads,
    rotary_decoder,
)
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec, NormSpec, replace_attention, replace_attentions

POST_NORM_NAMES = WeightNames(
    {
        **ATTENTION_NAMES,
        **MLP_NAMES,
        "layers.attention_post_norm": (LAYER + "post_attention_layernorm",),
        "layers.mlp_post_norm": (LAYER + "post_feedforward_layernorm",),
    },
)


def post_normed(spec: DecoderSpec) -> DecoderSpec:
    """With the norms of each half behind it."""
    layers = (
        replace(
            layer,
            attention_norm=None,
            mlp_norm=None,
            attention_post_norm=layer.attention_norm,
            mlp_post_norm=layer.mlp_norm,
        )
        for layer in spec.layers
    )
    return replace(spec, layers=tuple(layers))


def _olmo(config: HfConfig) -> DecoderSpec:
    bias = config.flag_or(False, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=gated_mlp(config),
        norm=NormSpec("layer_norm", 1e-5, weight=False),
        qkv_bias=bias,
        output_bias=bias,
    )
    limit = config.optional_number(None, "clip_qkv")
    return replace_attentions(spec, qkv_limit=limit)


def _normed_heads(
    config: HfConfig, windows: tuple[int | None, ...], default_theta: float
) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    head_size = config.head_size(hidden_size, config.integer("num_attention_heads"))
    rope = config.rope(head_size, layer_type="full_attention", default_theta=default_theta)
    bias = config.flag_or(False, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=windows,
        mlp=gated_mlp(config),
        default_eps=1e-5,
        rope=rope,
        qkv_bias=bias,
        output_bias=bias,
    )
    return post_normed(over_all_heads(spec))


def _olmo2(config: HfConfig) -> DecoderSpec:
    return _normed_heads(config, (None,) * config.integer("num_hidden_layers"), 10_000.0)


def _olmo3(config: HfConfig) -> DecoderSpec:
    num_layers = config.integer("num_hidden_layers")
    window = config.optional_integer("sliding_window", default=4096)
    windows = config.layer_windows(num_layers, window, every=4)
    spec = _normed_heads(config, windows, 500_000.0)
    kinds = config.layer_windows(num_layers, 1, every=4)
    head_size = spec.attentions()[0].query_key_head_size
    nearby = config.rope(head_size, layer_type="sliding_attention", default_theta=500_000.0)
    layers = tuple(
        replace_attention(layer, rope=nearby) if kind else layer
        for layer, kind in zip(spec.layers, kinds, strict=True)
    )
    return replace(spec, layers=layers)


FAMILIES = (
    family("OlmoForCausalLM", "olmo", "OLMo", "OLMo 1", _olmo, 2048, LLAMA_NAMES),
    family("Olmo2ForCausalLM", "olmo2", "OLMo", "OLMo 2", _olmo2, 2048, POST_NORM_NAMES),
    family("Olmo3ForCausalLM", "olmo3", "OLMo", "OLMo 3", _olmo3, 2048, POST_NORM_NAMES),
)
