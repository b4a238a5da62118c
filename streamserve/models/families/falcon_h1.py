"""Falcon H1: attention and a state space (Mamba 2) side by side in each layer, many multipliers.

What multiplies queries, keys and values is one scale of scores and one of what attention makes; the
gates, inputs, B, C and time steps of the state space have one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.families.granite_hybrid import NAMES as GRANITE_NAMES
from streamserve.models.families.granite_hybrid import check_time_steps
from streamserve.models.families.llama import ATTENTION_NAMES, LAYER, gated_mlp, rotary_decoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    NormSpec,
    SideBySideSpec,
    StateSpaceSpec,
)

_SPACE = {name: held for name, held in GRANITE_NAMES.modules.items() if ".space." in name}
NAMES = WeightNames(
    {
        **ATTENTION_NAMES,
        **_SPACE,
        "final_norm": ("model.final_layernorm",),
        "layers.mlp_norm": (LAYER + "pre_ff_layernorm",),
        "layers.gate_up": (LAYER + "feed_forward.gate_proj", LAYER + "feed_forward.up_proj"),
        "layers.down": (LAYER + "feed_forward.down_proj",),
    },
    ignored=(r"rotary_emb\.inv_freq", r"mamba\.mup_vector"),
)


def _multipliers(config: HfConfig, name: str, count: int) -> tuple[float, ...]:
    given = config.values.get(name)
    if given is None:
        return (1.0,) * count
    are_numbers = isinstance(given, Sequence) and all(isinstance(m, int | float) for m in given)
    if not are_numbers or len(given) != count:
        raise ModelLoadError(f"{config.source}: {name} must list {count} numbers, got {given!r}")
    return tuple(map(float, given))


def _norm(config: HfConfig) -> NormSpec | None:
    """Of what the state space found; it is gated first."""
    if not config.flag_or(False, "mamba_rms_norm"):
        return None
    if config.flag_or(True, "mamba_norm_before_gate"):
        raise UnsupportedModelError(
            f"{config.source}: mamba_norm_before_gate true is not supported with mamba_rms_norm"
        )
    return NormSpec("rms_norm", config.number_or(1e-5, "rms_norm_eps"))


def _state_space(config: HfConfig) -> StateSpaceSpec:
    check_time_steps(config)
    for name in ("mamba_proj_bias", "projectors_bias"):
        if config.flag_or(False, name):
            raise UnsupportedModelError(f"{config.source}: {name} true is not supported")
    inner_size = config.optional_integer("mamba_d_ssm", default=1024)
    if inner_size is None:
        inner_size = config.integer_or(2, "mamba_expand") * config.integer("hidden_size")
    num_heads = config.integer_or(128, "mamba_n_heads")
    before = config.number_or(1.0, "ssm_in_multiplier")
    scales = tuple(before * scale for scale in _multipliers(config, "ssm_multipliers", 5))
    return StateSpaceSpec(
        num_heads=num_heads,
        head_size=inner_size // num_heads,
        num_groups=config.integer_or(1, "mamba_n_groups"),
        state_size=config.integer_or(256, "mamba_d_state"),
        conv_width=config.integer_or(4, "mamba_d_conv", minimum=2),
        norm=_norm(config),
        conv_bias=config.flag_or(True, "mamba_conv_bias"),
        input_scales=None
        if set(scales) == {1.0}
        else cast(tuple[float, float, float, float, float], scales),
    )


def _spec(config: HfConfig) -> DecoderSpec:
    config.require_silu()
    bias = config.flag_or(False, "attention_bias")
    before = config.number_or(1.0, "attention_in_multiplier")
    if bias and before != 1.0:
        raise UnsupportedModelError(
            f"{config.source}: attention_in_multiplier {before} is not supported with "
            "attention_bias"
        )
    gate_scale, output_scale = _multipliers(config, "mlp_multipliers", 2)
    mlp = gated_mlp(config, bias=config.flag_or(False, "mlp_bias"))
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=replace(mlp, gate_scale=gate_scale, output_scale=output_scale),
        default_kv_heads=8 if "num_key_value_heads" not in config.values else None,
        default_eps=1e-5,
        default_context=8192,
        qkv_bias=bias,
        output_bias=bias,
    )
    [layer] = set(spec.layers)
    attention = layer.attention
    assert isinstance(attention, AttentionSpec)
    scores = before * before * config.number_or(1.0, "key_multiplier")
    mixing = SideBySideSpec(
        replace(attention, scale=attention.scale * scores),
        _state_space(config),
        attention_scale=before * config.number_or(1.0, "attention_out_multiplier"),
        space_scale=config.number_or(1.0, "ssm_out_multiplier"),
    )
    return replace(
        spec,
        layers=(replace(layer, attention=mixing),) * len(spec.layers),
        embedding_scale=config.number_or(1.0, "embedding_multiplier"),
        logit_scale=config.number_or(1.0, "lm_head_multiplier"),
    )


FAMILIES = (
    Family(
        architecture="FalconH1ForCausalLM",
        model_type="falcon_h1",
        series="Falcon",
        title="Falcon H1",
        spec=_spec,
        max_positions=lambda config: config.integer_or(8192, "max_position_embeddings"),
        names=NAMES,
    ),
)
