"""EXAONE 4: norms behind each half, and of each query and key head.

The 32B has windows in all but every fourth layer, and rotates in these only. K-EXAONE, a mixture of
DeepSeek's kind, does so too, and norms before each half; its layers that guess further tokens are
not read.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import UnsupportedModelError
from streamserve.models.families import routed
from streamserve.models.families.family import family
from streamserve.models.families.llama import (
    LAYER,
    gated_mlp,
    rotary_decoder,
    rotated_where_windowed,
)
from streamserve.models.families.olmo import POST_NORM_NAMES, post_normed
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec

MOE_NAMES = replace(
    routed.NAMES,
    modules={
        **routed.NAMES.modules,
        "layers.router.correction": (LAYER + "mlp.e_score_correction_bias",),
    },
    skipped=("mtp.",),
)


def _rotated_where_windowed(config: HfConfig) -> DecoderSpec:
    num_layers = config.integer("num_hidden_layers")
    window = config.optional_integer("sliding_window", default=4096)
    every = None
    if window is not None and config.values.get("layer_types") is None:
        every = config.integer_or(4, "sliding_window_pattern")  # else it may be letters
    windows = config.layer_windows(num_layers, window, every)
    spec = rotary_decoder(
        config,
        windows=windows,
        mlp=gated_mlp(config),
        default_kv_heads=32,
        default_eps=1e-5,
        qk_norm=True,
    )
    return spec if window is None else rotated_where_windowed(spec)


def _dense(config: HfConfig) -> DecoderSpec:
    return post_normed(_rotated_where_windowed(config))


def _mixture(config: HfConfig) -> DecoderSpec:
    spec = _rotated_where_windowed(config)
    experts = routed.routed_experts(
        config,
        num_experts=config.integer_or(64, "num_experts"),
        top_k=config.integer_or(8, "num_experts_per_tok"),
        intermediate_size=config.integer_or(1024, "moe_intermediate_size"),
        num_shared=config.integer_or(1, "num_shared_experts", minimum=0),
        renormalise=config.flag_or(True, "norm_topk_prob"),
        default_scale=2.5,
    )
    num_layers = len(spec.layers)
    first = config.integer_or(1, "first_k_dense_replace", minimum=0)
    implied = ["dense"] * first + ["sparse"] * (num_layers - first)
    kinds = config.values.get("mlp_layer_types") or implied
    if kinds != implied:
        raise UnsupportedModelError(
            f"{config.source}: mlp_layer_types other than {first} dense layers before the sparse "
            f"ones are not supported, got {kinds!r}"
        )
    return routed.with_experts(spec, experts, range(first, num_layers))


FAMILIES = (
    family("Exaone4ForCausalLM", "exaone4", "EXAONE", "EXAONE 4", _dense, 2048, POST_NORM_NAMES),
    family("ExaoneMoeForCausalLM", "exaone_moe", "EXAONE", "K-EXAONE", _mixture, 2048, MOE_NAMES),
    family("ExaoneMoEForCausalLM", "exaone_moe", "EXAONE", "K-EXAONE", _mixture, 2048, MOE_NAMES),
)
