"""LFM 2 (Liquid AI): mostly short convolutions between two gates, some layers of attention.

Its mixtures have experts behind the first layers, chosen by the sigmoid of their logits and a
correction.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import family
from streamserve.models.families.llama import LAYER
from streamserve.models.families.routed import with_experts
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    QkNormSpec,
    RouterSpec,
    ShortConvSpec,
)

NAMES = WeightNames(
    {
        "embedding": ("model.embed_tokens",),
        "final_norm": ("model.embedding_norm",),
        "head": ("lm_head",),
        "layers.attention_norm": (LAYER + "operator_norm",),
        "layers.mlp_norm": (LAYER + "ffn_norm",),
        "layers.qkv": tuple(LAYER + f"self_attn.{name}_proj" for name in "qkv"),
        "layers.q_norm": (LAYER + "self_attn.q_layernorm",),
        "layers.k_norm": (LAYER + "self_attn.k_layernorm",),
        "layers.output": (LAYER + "self_attn.out_proj",),
        "layers.short_conv.input": (LAYER + "conv.in_proj",),
        "layers.short_conv.conv": (LAYER + "conv.conv",),
        "layers.short_conv.output": (LAYER + "conv.out_proj",),
        "layers.gate_up": (LAYER + "feed_forward.w1", LAYER + "feed_forward.w3"),
        "layers.down": (LAYER + "feed_forward.w2",),
    }
)

_EXPERT = LAYER + "feed_forward.experts.{expert}."
MOE_NAMES = replace(
    NAMES,
    modules={
        **NAMES.modules,
        "layers.router": (LAYER + "feed_forward.gate",),
        "layers.router.correction": (LAYER + "feed_forward.expert_bias",),
        "layers.experts.gate_up": (_EXPERT + "w1", _EXPERT + "w3"),
        "layers.experts.down": (_EXPERT + "w2",),
    },
)


def _kinds(config: HfConfig, num_layers: int) -> tuple[str, ...]:
    kinds = config.layer_kinds(num_layers, ("conv", "full_attention"))
    if kinds is not None:
        return kinds
    attending = config.values.get("full_attn_idxs")
    if attending is None:
        return ("full_attention",) * num_layers
    if not isinstance(attending, list) or not all(isinstance(layer, int) for layer in attending):
        raise UnsupportedModelError(
            f"{config.source}: full_attn_idxs must list numbers of layers, got {attending!r}"
        )
    return tuple("full_attention" if layer in attending else "conv" for layer in range(num_layers))


def _inner_size(config: HfConfig) -> int:
    """What is stated, cut to two thirds and rounded up, unless the config says to leave it."""
    stated = config.integer("block_ff_dim", "intermediate_size")
    if not config.flag_or(True, "block_auto_adjust_ff_dim"):
        return stated
    size = 2 * stated // 3
    factor = config.optional_number(1.0, "block_ffn_dim_multiplier")
    if factor is None:
        return size
    multiple = config.integer_or(256, "block_multiple_of")
    return -(-int(factor * size) // multiple) * multiple


def _decoder(config: HfConfig, inner_size: int) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_layers = config.integer("num_hidden_layers")
    num_heads = config.integer("num_attention_heads")
    size = config.head_size(hidden_size, num_heads)
    norm = NormSpec("rms_norm", config.number_or(1e-5, "norm_eps"))
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=config.integer_or(8, "num_key_value_heads"),
        query_key_head_size=size,
        value_head_size=size,
        scale=size**-0.5,
        rope=config.rope(size, default_theta=1e6, default_context=128_000),
        qk_norm=QkNormSpec(norm),
    )
    conv = ShortConvSpec(
        channels=hidden_size,
        conv_width=config.integer_or(3, "conv_L_cache", minimum=2),
        bias=config.flag_or(False, "conv_bias"),
    )
    mlp = MlpSpec(inner_size, "silu", gated=True)
    layers = {
        kind: LayerSpec(attention=held, mlp=mlp, attention_norm=norm, mlp_norm=norm)
        for kind, held in (("conv", conv), ("full_attention", attention))
    }
    tied = config.flag_or(True, "tie_word_embeddings")
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=tuple(layers[kind] for kind in _kinds(config, num_layers)),
        final_norm=norm,
        tied_head=config.flag_or(tied, "tie_embedding"),
    )


def _dense(config: HfConfig) -> DecoderSpec:
    return _decoder(config, _inner_size(config))


def _mixture(config: HfConfig) -> DecoderSpec:
    spec = _decoder(config, config.integer("intermediate_size"))
    renormalise = config.flag_or(True, "norm_topk_prob")
    experts = ExpertsSpec(
        num_experts=config.integer_or(32, "num_experts"),
        top_k=config.integer_or(4, "num_experts_per_tok"),
        intermediate_size=config.integer_or(1792, "moe_intermediate_size"),
        activation="silu",
        renormalise=renormalise,
        router=RouterSpec(
            scoring="sigmoid",
            correction=config.flag_or(True, "use_expert_bias"),
            eps=1e-6 if renormalise else 0.0,
            scale=config.number_or(1.0, "routed_scaling_factor"),
        ),
    )
    first = config.integer_or(2, "num_dense_layers", minimum=0)
    return with_experts(spec, experts, range(first, len(spec.layers)))


FAMILIES = (
    family("Lfm2ForCausalLM", "lfm2", "LFM", "LFM 2 (dense)", _dense, 128_000, NAMES),
    family("Lfm2MoeForCausalLM", "lfm2_moe", "LFM", "LFM 2 MoE", _mixture, 128_000, MOE_NAMES),
)
