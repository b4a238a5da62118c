"""GLM 4 as transformers carries it: half of each head turns, interleaved; gate and up are one.

The models of April 2025 (`Glm4ForCausalLM`) norm after each half as well.
"""

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
from streamserve.models.spec import DecoderSpec

NAMES = WeightNames(
    {
        **ATTENTION_NAMES,
        **MLP_NAMES,
        "layers.gate_up": (LAYER + "mlp.gate_up_proj",),
        "layers.attention_post_norm": (LAYER + "post_self_attn_layernorm",),
        "layers.mlp_post_norm": (LAYER + "post_mlp_layernorm",),
    },
    ignored=(r"rotary_emb\.inv_freq",),
)


def _glm(config: HfConfig) -> DecoderSpec:
    head_size = config.integer_or(128, "head_dim")
    return rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=gated_mlp(config),
        rope=config.rope(head_size, default_partial=0.5, default_context=131_072, interleaved=True),
        head_size=head_size,
        default_kv_heads=2,
        default_eps=1.5625e-7,
        qkv_bias=config.flag_or(True, "attention_bias"),
    )


def _glm4(config: HfConfig) -> DecoderSpec:
    spec = _glm(config)
    layers = (
        replace(layer, attention_post_norm=layer.attention_norm, mlp_post_norm=layer.mlp_norm)
        for layer in spec.layers
    )
    return replace(spec, layers=tuple(layers))


FAMILIES = tuple(
    Family(
        architecture=architecture,
        model_type=model_type,
        series="GLM",
        title=title,
        spec=spec,
        max_positions=lambda config: config.integer_or(131_072, "max_position_embeddings"),
        names=NAMES,
    )
    for architecture, model_type, title, spec in (
        ("GlmForCausalLM", "glm", "GLM 4 9B", _glm),
        ("Glm4ForCausalLM", "glm4", "GLM 4-0414", _glm4),
    )
)
