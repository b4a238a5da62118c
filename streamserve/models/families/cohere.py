"""Command R and Aya: both halves in parallel behind one layer norm, neighbours turned together.

The largest of the first generation norm each query and key head by weights of its own. The second
(R7B, A) has windows in all but every fourth layer, and rotates in these only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from streamserve.models.families.family import Family
from streamserve.models.families.llama import (
    LLAMA_NAMES,
    gated_mlp,
    rotary_decoder,
    rotated_where_windowed,
    with_head_norms,
)
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec, NormSpec


def _decoder(
    config: HfConfig, windows: tuple[int | None, ...], default_theta: float
) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    head_size = config.head_size(hidden_size, config.integer("num_attention_heads"))
    bias = config.flag_or(False, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=windows,
        mlp=gated_mlp(config),
        rope=config.rope(
            head_size, default_theta=default_theta, default_context=8192, interleaved=True
        ),
        norm=NormSpec("layer_norm", config.number_or(1e-5, "layer_norm_eps")),
        qkv_bias=bias,
        output_bias=bias,
    )
    return replace(
        spec,
        layers=tuple(replace(layer, mlp_norm=None, residual="parallel") for layer in spec.layers),
        tied_head=config.flag_or(True, "tie_word_embeddings"),
        logit_scale=config.number_or(0.0625, "logit_scale"),
    )


def _cohere(config: HfConfig) -> DecoderSpec:
    spec = _decoder(config, (None,) * config.integer("num_hidden_layers"), 500_000.0)
    return with_head_norms(spec) if config.flag_or(False, "use_qk_norm") else spec


def _cohere2(config: HfConfig) -> DecoderSpec:
    num_layers = config.integer("num_hidden_layers")
    window = config.optional_integer("sliding_window", default=4096)
    every = config.integer_or(4, "sliding_window_pattern")
    windows = config.layer_windows(num_layers, window, every)
    return rotated_where_windowed(_decoder(config, windows, 10_000.0))


def _family(
    architecture: str, model_type: str, title: str, spec: Callable[[HfConfig], DecoderSpec]
) -> Family:
    return Family(
        architecture=architecture,
        model_type=model_type,
        series="Cohere",
        title=title,
        spec=spec,
        # The first ones say how far they were trained elsewhere than transformers looks.
        max_positions=lambda config: config.integer_or(
            8192, "model_max_length", "max_position_embeddings"
        ),
        names=LLAMA_NAMES,
    )


FAMILIES = (
    _family("CohereForCausalLM", "cohere", "Command R, R+; Aya 23, Expanse", _cohere),
    _family("Cohere2ForCausalLM", "cohere2", "Command R7B, A; Tiny Aya", _cohere2),
)
