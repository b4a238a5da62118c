"""Gemma 1, 2 and the text models of 3: a scaled embedding, norms whose weights are stored minus 1.

Gemma 1 is Llama but for that. The others norm before and after each half and have windows in turns:
Gemma 2 bounds scores and logits; Gemma 3 norms each query and key head instead, and turns the heads
of its windowed layers by frequencies of their own.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.families.llama import (
    ATTENTION_NAMES,
    LAYER,
    LLAMA_NAMES,
    MLP_NAMES,
    rotary_decoder,
)
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    QkNormSpec,
    RopeSpec,
    replace_attention,
)

NAMES = WeightNames(
    {
        **ATTENTION_NAMES,
        **MLP_NAMES,
        "layers.attention_post_norm": (LAYER + "post_attention_layernorm",),
        "layers.mlp_norm": (LAYER + "pre_feedforward_layernorm",),
        "layers.mlp_post_norm": (LAYER + "post_feedforward_layernorm",),
    },
    ignored=(r"rotary_emb\.inv_freq",),
)


def _refuse_looking_ahead(config: HfConfig) -> None:
    if config.flag_or(False, "use_bidirectional_attention"):
        raise UnsupportedModelError(
            f"{config.source}: use_bidirectional_attention is not supported: a decoder looks back"
        )


def _gemma(config: HfConfig) -> DecoderSpec:
    _refuse_looking_ahead(config)
    activation = config.activation_or("gelu_tanh", "hidden_act")
    bias = config.flag_or(False, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=MlpSpec(
            intermediate_size=config.integer("intermediate_size"),
            # The first releases say "gelu" and mean its tanh form.
            activation="gelu_tanh" if activation == "gelu" else activation,
            gated=True,
        ),
        default_context=8192,
        head_size=config.integer_or(256, "head_dim"),
        norm_offset=1.0,
        qkv_bias=bias,
        output_bias=bias,
    )
    return replace(
        spec,
        embedding_scale=spec.hidden_size**0.5,
        tied_head=config.flag_or(True, "tie_word_embeddings"),
    )


def _decoder(
    config: HfConfig,
    *,
    every: int,
    ropes: tuple[RopeSpec, RopeSpec],
    soft_cap: float | None,
    logit_soft_cap: float | None,
    qk_norm: bool,
) -> DecoderSpec:
    """One layer of ``every`` has no window. ``ropes``: of layers with a window, and without."""
    _refuse_looking_ahead(config)
    hidden_size = config.integer("hidden_size")
    size = config.integer_or(256, "head_dim")
    bias = config.flag_or(False, "attention_bias")
    norm = NormSpec("rms_norm", config.number_or(1e-6, "rms_norm_eps"), weight_offset=1.0)
    whole = LayerSpec(
        attention=AttentionSpec(
            num_heads=config.integer("num_attention_heads"),
            num_kv_heads=config.integer_or(4, "num_key_value_heads"),
            query_key_head_size=size,
            value_head_size=size,
            scale=config.number_or(256, "query_pre_attn_scalar") ** -0.5,
            rope=ropes[1],
            qk_norm=QkNormSpec(norm) if qk_norm else None,
            qkv_bias=bias,
            output_bias=bias,
            soft_cap=soft_cap,
        ),
        mlp=MlpSpec(
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation_or("gelu_tanh", "hidden_activation", "hidden_act"),
            gated=True,
        ),
        attention_norm=norm,
        mlp_norm=norm,
        attention_post_norm=norm,
        mlp_post_norm=norm,
    )
    window = config.integer_or(4096, "sliding_window")
    windowed = replace_attention(whole, window=window, rope=ropes[0])
    num_layers = config.integer("num_hidden_layers")
    windows: tuple[int | None, ...] = tuple(
        None if layer % every == every - 1 else window for layer in range(num_layers)
    )
    if config.values.get("layer_types") is not None:
        windows = config.layer_windows(num_layers, window)
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=tuple(whole if window is None else windowed for window in windows),
        final_norm=norm,
        embedding_scale=hidden_size**0.5,
        tied_head=config.flag_or(True, "tie_word_embeddings"),
        logit_soft_cap=logit_soft_cap,
    )


def _gemma2(config: HfConfig) -> DecoderSpec:
    rope = config.rope(config.integer_or(256, "head_dim"), default_context=8192)
    return _decoder(
        config,
        every=2,
        ropes=(rope, rope),
        soft_cap=config.optional_number(50.0, "attn_logit_softcapping"),
        logit_soft_cap=config.optional_number(30.0, "final_logit_softcapping"),
        qk_norm=False,
    )


def _gemma3(config: HfConfig) -> DecoderSpec:
    size = config.integer_or(256, "head_dim")
    local = config.rope(size, layer_type="sliding_attention", theta_names=("rope_local_base_freq",))
    everywhere = config.rope(
        size, layer_type="full_attention", default_theta=1e6, default_context=131_072
    )
    return _decoder(
        config,
        every=config.integer_or(6, "sliding_window_pattern", "_sliding_window_pattern"),
        ropes=(local, everywhere),
        soft_cap=config.optional_number(None, "attn_logit_softcapping"),
        logit_soft_cap=config.optional_number(None, "final_logit_softcapping"),
        qk_norm=True,
    )


FAMILIES = (
    Family(
        architecture="GemmaForCausalLM",
        model_type="gemma",
        series="Gemma",
        title="Gemma 1",
        spec=_gemma,
        max_positions=lambda config: config.integer_or(8192, "max_position_embeddings"),
        names=LLAMA_NAMES,
    ),
    Family(
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        series="Gemma",
        title="Gemma 2",
        spec=_gemma2,
        max_positions=lambda config: config.integer_or(8192, "max_position_embeddings"),
        names=NAMES,
    ),
    Family(
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        series="Gemma",
        title="Gemma 3 (text)",
        spec=_gemma3,
        max_positions=lambda config: config.integer_or(131_072, "max_position_embeddings"),
        names=NAMES,
    ),
)
