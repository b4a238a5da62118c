"""EXAONE 4: norms behind each half, and of each query and key head.

The 32B has windows in all but every fourth layer, and rotates in these only.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.models.families.family import Family
from streamserve.models.families.llama import gated_mlp, rotary_decoder
from streamserve.models.families.olmo import POST_NORM_NAMES, post_normed
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec, replace_attention


def _spec(config: HfConfig) -> DecoderSpec:
    num_layers = config.integer("num_hidden_layers")
    window = config.optional_integer("sliding_window", default=4096)
    every = None if window is None else config.integer_or(4, "sliding_window_pattern")
    windows = config.layer_windows(num_layers, window, every)
    spec = rotary_decoder(
        config,
        windows=windows,
        mlp=gated_mlp(config),
        default_kv_heads=32,
        default_eps=1e-5,
        qk_norm=True,
    )
    if window is not None:
        layers = tuple(
            replace_attention(layer, rope=None) if window is None else layer
            for layer, window in zip(spec.layers, windows, strict=True)
        )
        spec = replace(spec, layers=layers)
    return post_normed(spec)


FAMILIES = (
    Family(
        architecture="Exaone4ForCausalLM",
        model_type="exaone4",
        series="EXAONE",
        title="EXAONE 4",
        spec=_spec,
        max_positions=lambda config: config.integer_or(2048, "max_position_embeddings"),
        names=POST_NORM_NAMES,
    ),
)
