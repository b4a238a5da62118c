"""LFM 3 (Liquid AI): LFM 2's short convolutions and attention, some of it in windows.

Each half is normed before and after, and each head has a gate. Windows and full attention have
rotary positions of their own.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.models.families import lfm2
from streamserve.models.families.family import Family
from streamserve.models.families.layer_rope import layer_rope
from streamserve.models.families.llama import LAYER
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import (
    AttentionSpec,
    CacheSpec,
    DecoderSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    QkNormSpec,
    ShortConvSpec,
)

NAMES = replace(
    lfm2.NAMES,
    modules={
        **lfm2.NAMES.modules,
        "layers.attention_post_norm": (LAYER + "post_operator_norm",),
        "layers.mlp_post_norm": (LAYER + "post_ffn_norm",),
        "layers.q_norm": (LAYER + "self_attn.q_norm",),
        "layers.k_norm": (LAYER + "self_attn.k_norm",),
        "layers.head_gate": (LAYER + "self_attn.gate_proj",),
        "layers.output": (LAYER + "self_attn.o_proj",),
    },
    # As transformers writes it beside a vision tower.
    respelled=((".self_attn.g_proj.", ".self_attn.gate_proj."),),
)
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPES = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}


def _default_kind(layer: int) -> str:
    if layer % 4 == 2:
        return _FULL
    return _SLIDING if layer % 4 == 0 and layer > 0 else "conv"


def _attention(config: HfConfig, norm: NormSpec, kind: str) -> AttentionSpec:
    num_heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    size = config.optional_integer("head_dim", default=128) or hidden_size // num_heads
    bias = config.flag_or(False, "attention_bias")
    window = config.optional_integer("sliding_window", default=256)
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=config.integer_or(4, "num_key_value_heads"),
        query_key_head_size=size,
        value_head_size=size,
        scale=size**-0.5,
        window=window if kind == _SLIDING else None,
        rope=layer_rope(config, kind, size, _ROPES),
        qk_norm=QkNormSpec(norm),
        qkv_bias=bias,
        output_bias=bias,
        head_gate=config.flag_or(True, "use_attention_gate"),
    )


def _spec(config: HfConfig) -> DecoderSpec:
    hidden_size, num_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    norm = NormSpec("rms_norm", config.number_or(1e-5, "norm_eps", "rms_norm_eps"))
    post_norm = norm if config.flag_or(True, "use_sandwich_norm") else None
    kinds = config.layer_kinds(num_layers, ("conv", _FULL, _SLIDING))
    kinds = kinds or tuple(map(_default_kind, range(num_layers)))
    held: dict[str, CacheSpec] = {
        kind: _attention(config, norm, kind) for kind in set(kinds) - {"conv"}
    }
    held["conv"] = ShortConvSpec(
        channels=hidden_size,
        conv_width=config.integer_or(7, "conv_L_cache", minimum=2),
        bias=config.flag_or(False, "conv_bias"),
    )
    mlp = MlpSpec(config.integer("intermediate_size"), "silu", gated=True)
    layers = {
        kind: LayerSpec(
            attention=held[kind],
            mlp=mlp,
            attention_norm=norm,
            mlp_norm=norm,
            attention_post_norm=post_norm,
            mlp_post_norm=post_norm,
        )
        for kind in kinds
    }
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=tuple(layers[kind] for kind in kinds),
        final_norm=norm,
        tied_head=config.flag_or(True, "tie_word_embeddings"),
    )


FAMILIES = (
    Family(
        architecture="Lfm3ForCausalLM",
        model_type="lfm3",
        series="LFM",
        title="LFM 3",
        spec=_spec,
        max_positions=lambda config: config.integer_or(128_000, "max_position_embeddings"),
        names=NAMES,
    ),
)
