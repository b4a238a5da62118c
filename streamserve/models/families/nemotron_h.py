"""Nemotron H, Nano 2 and Nano 3: state spaces (Mamba 2), attention, MLPs and experts, each a layer.

Positions are not rotated. The steps of a state space have no lower limit, as in NVIDIA's own code
and in vLLM; transformers 5 keeps those of a prompt above ``time_step_min``.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.families.granite_hybrid import check_time_steps
from streamserve.models.families.routed import routed_experts
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    StateSpaceSpec,
)

_LAYER = "model.layers.{layer}."
_MIXER = _LAYER + "mixer."
NAMES = WeightNames(
    {
        "embedding": ("model.embeddings",),
        "final_norm": ("model.norm_f",),
        "head": ("lm_head",),
        "layers.attention_norm": (_LAYER + "norm",),
        "layers.mlp_norm": (_LAYER + "norm",),
        "layers.qkv": tuple(_MIXER + f"{name}_proj" for name in "qkv"),
        "layers.output": (_MIXER + "o_proj",),
        "layers.space.input": (_MIXER + "in_proj",),
        "layers.space.conv": (_MIXER + "conv1d",),
        "layers.space.decay": (_MIXER + "A_log",),
        "layers.space.time_bias": (_MIXER + "dt_bias",),
        "layers.space.skip": (_MIXER + "D",),
        "layers.space.norm": (_MIXER + "norm",),
        "layers.space.output": (_MIXER + "out_proj",),
        "layers.up": (_MIXER + "up_proj",),
        "layers.down": (_MIXER + "down_proj",),
        "layers.router": (_MIXER + "gate",),
        "layers.router.correction": (_MIXER + "gate.e_score_correction_bias",),
        "layers.experts.up": (_MIXER + "experts.{expert}.up_proj",),
        "layers.experts.down": (_MIXER + "experts.{expert}.down_proj",),
        "layers.shared.up": (_MIXER + "shared_experts.up_proj",),
        "layers.shared.down": (_MIXER + "shared_experts.down_proj",),
    },
    renamed=(("backbone.", "model."),),
    skipped=("mtp.",),  # layers that guess further tokens
)
_SPACE, _ATTENTION, _MLP, _EXPERTS = "linear_attention", "full_attention", "mlp", "moe"
_LETTERS = {"M": _SPACE, "*": _ATTENTION, "-": _MLP, "E": _EXPERTS}
_OLDER = {"mamba": _SPACE, "attention": _ATTENTION}


def _kinds(config: HfConfig) -> list[str]:
    """Each layer's; their number is that of these, whatever else the config says."""
    given = config.values.get("layers_block_type", config.values.get("layer_types"))
    if given is None:
        pattern = config.values.get("hybrid_override_pattern", "ME*-")
        given = [_LETTERS.get(letter, letter) for letter in pattern]
    known = tuple(_LETTERS.values())
    kinds = [_OLDER.get(kind, kind) for kind in given]
    for kind in kinds:
        if kind not in known:
            raise UnsupportedModelError(
                f"{config.source}: layer type {kind!r} is not supported; "
                f"these are: {', '.join(known)}"
            )
    return kinds


def _state_space(config: HfConfig, norm: NormSpec) -> StateSpaceSpec:
    check_time_steps(config)
    if (activation := config.values.get("mamba_hidden_act", "silu")) != "silu":
        raise UnsupportedModelError(
            f"{config.source}: mamba_hidden_act {activation!r} is not supported; these are: silu"
        )
    return StateSpaceSpec(
        num_heads=config.integer_or(128, "mamba_num_heads"),
        head_size=config.integer_or(64, "mamba_head_dim"),
        num_groups=config.integer_or(8, "mamba_n_groups", "n_groups"),
        state_size=config.integer_or(128, "ssm_state_size"),
        conv_width=config.integer_or(4, "mamba_d_conv", "conv_kernel", minimum=2),
        norm=norm,
        conv_bias=config.flag_or(config.flag_or(True, "use_conv_bias"), "mamba_conv_bias"),
        bias=config.flag_or(False, "use_bias"),
    )


def _attention(config: HfConfig) -> AttentionSpec:
    num_heads = config.integer_or(32, "num_attention_heads")
    size = config.integer_or(128, "head_dim")
    kv_heads = config.optional_integer("num_key_value_heads", default=8)
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=kv_heads or num_heads,
        query_key_head_size=size,
        value_head_size=size,
        scale=size**-0.5,
    )


def _experts(config: HfConfig, mlp: MlpSpec) -> ExpertsSpec:
    if (size := config.values.get("moe_latent_size")) is not None:
        raise UnsupportedModelError(f"{config.source}: moe_latent_size {size!r} is not supported")
    experts = routed_experts(
        config,
        num_experts=config.integer_or(8, "n_routed_experts"),
        top_k=config.integer_or(2, "num_experts_per_tok"),
        intermediate_size=config.integer_or(7688, "moe_intermediate_size"),
        num_shared=1,
        renormalise=config.flag_or(True, "norm_topk_prob"),
    )
    shared = config.integer_or(7688, "moe_shared_expert_intermediate_size")
    return replace(
        experts,
        activation=mlp.activation,
        shared=replace(mlp, intermediate_size=shared),
        gated=False,
    )


def _spec(config: HfConfig) -> DecoderSpec:
    kinds = _kinds(config)
    norm = NormSpec("rms_norm", config.number_or(1e-5, "layer_norm_epsilon"))
    mlp = MlpSpec(
        intermediate_size=config.integer("intermediate_size"),
        activation=config.activation_or("relu2", "mlp_hidden_act"),
        gated=False,
        bias=config.flag_or(False, "mlp_bias"),
    )
    layers = {
        _SPACE: LayerSpec(_state_space(config, norm), None, norm, None),
        _ATTENTION: LayerSpec(_attention(config), None, norm, None),
        _MLP: LayerSpec(None, mlp, None, norm),
    }
    if _EXPERTS in kinds:
        layers[_EXPERTS] = LayerSpec(None, _experts(config, mlp), None, norm)
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        layers=tuple(layers[kind] for kind in kinds),
        final_norm=norm,
        tied_head=config.flag_or(False, "tie_word_embeddings"),
    )


FAMILIES = (
    Family(
        architecture="NemotronHForCausalLM",
        model_type="nemotron_h",
        series="Nemotron",
        title="Nemotron H, Nemotron Nano 2 and 3",
        spec=_spec,
        max_positions=lambda config: config.integer_or(4096, "max_position_embeddings"),
        names=NAMES,
    ),
)
