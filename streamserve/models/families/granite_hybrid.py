"""Granite 4's hybrids: Granite's scales around state spaces (Mamba 2), some layers of attention."""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.families.granite import MOE_NAMES, experts, scaled_decoder
from streamserve.models.families.llama import LAYER
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import (
    DecoderSpec,
    ExpertsSpec,
    MlpSpec,
    NormSpec,
    StateSpaceSpec,
    replace_attention,
)

_SPACE = LAYER + "mamba."
_SHARED = LAYER + "shared_mlp."
# Without experts the MLP that all tokens go to is the only one.
NAMES = replace(
    MOE_NAMES,
    modules={
        **MOE_NAMES.modules,
        "layers.space.input": (_SPACE + "in_proj",),
        "layers.space.conv": (_SPACE + "conv1d",),
        "layers.space.decay": (_SPACE + "A_log",),
        "layers.space.time_bias": (_SPACE + "dt_bias",),
        "layers.space.skip": (_SPACE + "D",),
        "layers.space.norm": (_SPACE + "norm",),
        "layers.space.output": (_SPACE + "out_proj",),
        "layers.gate_up": (_SHARED + "input_linear",),
        "layers.down": (_SHARED + "output_linear",),
        "layers.shared.gate_up": (_SHARED + "input_linear",),
        "layers.shared.down": (_SHARED + "output_linear",),
    },
)
_NO_LIMITS = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])  # the latter in JSON
_ATTENDING = ("attention", "full_attention")
_KINDS = ("mamba", "linear_attention", *_ATTENDING)


def check_time_steps(config: HfConfig) -> None:
    """Raises UnsupportedModelError for limits of them."""
    limits = config.values.get("time_step_limit")
    if limits is not None and list(limits) not in _NO_LIMITS:
        raise UnsupportedModelError(
            f"{config.source}: time_step_limit must be [0, infinity], got {limits!r}"
        )


def _state_space(config: HfConfig) -> StateSpaceSpec:
    check_time_steps(config)
    inner_size = config.integer_or(2, "mamba_expand") * config.integer("hidden_size")
    num_heads = config.integer_or(128, "mamba_n_heads")
    return StateSpaceSpec(
        num_heads=num_heads,
        head_size=inner_size // num_heads,
        num_groups=config.integer_or(1, "mamba_n_groups"),
        state_size=config.integer_or(256, "mamba_d_state"),
        conv_width=config.integer_or(4, "mamba_d_conv", minimum=2),
        norm=NormSpec("rms_norm", config.number_or(1e-6, "rms_norm_eps")),
        conv_bias=config.flag_or(True, "mamba_conv_bias"),
        bias=config.flag_or(False, "mamba_proj_bias"),
    )


def _mlp(config: HfConfig) -> MlpSpec | ExpertsSpec:
    config.require_silu()
    shared = MlpSpec(config.integer_or(1024, "shared_intermediate_size"), "silu", gated=True)
    if config.values.get("num_local_experts", 8) in (0, None):
        return shared
    return replace(experts(config), shared=shared, shared_gate=False)


def _spec(config: HfConfig) -> DecoderSpec:
    spec = scaled_decoder(config, _mlp(config))
    positions = config.values.get("position_embedding_type")
    if positions not in (None, "nope", "rope"):
        raise UnsupportedModelError(
            f"{config.source}: position_embedding_type {positions!r} is not supported; "
            "these are: rope, nope"
        )
    kinds = config.layer_kinds(len(spec.layers), _KINDS) or ("mamba",) * len(spec.layers)
    space = _state_space(config)
    layers = []
    for kind, layer in zip(kinds, spec.layers, strict=True):
        if kind not in _ATTENDING:
            layers.append(replace(layer, attention=space))
        elif positions == "rope":
            layers.append(layer)
        else:
            layers.append(replace_attention(layer, rope=None))
    return replace(spec, layers=tuple(layers))


FAMILIES = (
    Family(
        architecture="GraniteMoeHybridForCausalLM",
        model_type="granitemoehybrid",
        series="Granite",
        title="Granite 4",
        spec=_spec,
        max_positions=lambda config: config.integer_or(2048, "max_position_embeddings"),
        names=NAMES,
    ),
)
