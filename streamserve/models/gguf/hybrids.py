"""GGUF files of models whose layers keep states, in the words of our families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from streamserve.errors import UnsupportedModelError
from streamserve.models.gguf.architecture import Architecture, Values, rotary_factor
from streamserve.models.gguf.mixtures import (
    ROUTED,
    qwen2_moe,
    require_sigmoid,
    weights_scale,
)

if TYPE_CHECKING:
    from streamserve.models.gguf.reading import Reading


def _delta_net(reading: Reading) -> Values:
    num_value_heads = reading.count("ssm.time_step_rank")
    rotary_dim = reading.integer_or(reading.head_size, "rope.dimension_count")
    recurrent = reading.file.metadata.numbers(reading.key("attention.recurrent_layers"))
    kinds = ("full_attention", "linear_attention")
    return {
        "linear_num_key_heads": reading.count("ssm.group_count"),
        "linear_num_value_heads": num_value_heads,
        "linear_key_head_dim": reading.integer("ssm.state_size"),
        "linear_value_head_dim": reading.integer("ssm.inner_size") // num_value_heads,
        "linear_conv_kernel_dim": reading.integer("ssm.conv_kernel"),
        "full_attention_interval": reading.optional_integer("full_attention_interval"),
        "layer_types": [kinds[bool(r)] for r in recurrent[: reading.num_layers]] or None,
        "partial_rotary_factor": rotary_factor(rotary_dim, reading.head_size),
        "mtp_num_hidden_layers": reading.integer_or(0, "nextn_predict_layers"),
    }


def _delta_net_moe(reading: Reading) -> Values:
    return {**_delta_net(reading), **qwen2_moe(reading, renormalise=True)}


def some_kv_heads(reading: Reading) -> int | None:
    """Where layers without any are those that do not attend."""
    key = reading.key("attention.head_count_kv")
    found = sorted(set(reading.file.metadata.numbers(key)) - {0})
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{reading.file.path}: {key} differs among the layers that attend ({found}), "
            "which is not supported"
        )
    return found[0] if found else None


def state_space(reading: Reading) -> Values:
    """By the names of transformers' families with Mamba 2."""
    layers = range(reading.num_layers)
    return {
        "mamba_n_heads": reading.count("ssm.time_step_rank"),
        "mamba_n_groups": reading.count("ssm.group_count"),
        "mamba_d_state": reading.integer("ssm.state_size"),
        "mamba_d_conv": reading.integer("ssm.conv_kernel"),
        "mamba_conv_bias": any(reading.has_tensor(f"blk.{n}.ssm_conv1d.bias") for n in layers),
        "mamba_proj_bias": any(reading.has_tensor(f"blk.{n}.ssm_in.bias") for n in layers),
    }


def _falcon_h1(reading: Reading) -> Values:
    """What multiplies is in the weights: `FalconH1Model.modify_tensors`."""
    return {
        **state_space(reading),
        "mamba_d_ssm": reading.integer("ssm.inner_size"),
        "mamba_rms_norm": reading.has_tensor("blk.0.ssm_norm.weight"),
        "mamba_norm_before_gate": False,
    }


def _widest(reading: Reading) -> int:
    """Of layers of which some are no MLP."""
    return int(max(reading.file.metadata.numbers(reading.key("feed_forward_length")), default=0))


def _nemotron_h(reading: Reading) -> Values:
    metadata, space, layers = reading.file.metadata, state_space(reading), range(reading.num_layers)
    heads = metadata.numbers(reading.key("attention.head_count_kv"))
    inner = metadata.numbers(reading.key("feed_forward_length"))
    num_experts = reading.integer_or(0, "expert_count")
    kinds = [
        "full_attention" if heads[n] else "linear_attention" if not inner[n] else "mlp"
        for n in layers
    ]
    eps = reading.optional_number("attention.layer_norm_rms_epsilon")
    values = {
        "layers_block_type": kinds,
        # The converter writes it by either name.
        "layer_norm_epsilon": eps or reading.optional_number("attention.layer_norm_epsilon"),
        "mamba_num_heads": space["mamba_n_heads"],
        "mamba_head_dim": reading.integer("ssm.inner_size") // space["mamba_n_heads"],
        "n_groups": space["mamba_n_groups"],
        "ssm_state_size": space["mamba_d_state"],
        "conv_kernel": space["mamba_d_conv"],
        "use_conv_bias": space["mamba_conv_bias"],
        "use_bias": space["mamba_proj_bias"],
        "mlp_bias": any(
            reading.has_tensor(f"blk.{n}.{name}.bias")
            for n in layers
            for name in ("ffn_up", "ffn_up_shexp")
        ),
    }
    if not num_experts:
        return values
    return {
        **values,
        "layers_block_type": ["moe" if kind == "mlp" else kind for kind in kinds],
        "n_routed_experts": num_experts,
        "num_experts_per_tok": reading.integer("expert_used_count"),
        "moe_intermediate_size": reading.integer("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": reading.integer("expert_shared_feed_forward_length"),
        "moe_latent_size": reading.optional_integer("moe_latent_size"),
        "norm_topk_prob": metadata.optional_flag(reading.key("expert_weights_norm")) is True,
        "routed_scaling_factor": weights_scale(reading),
    }


def _lfm2(reading: Reading) -> Values:
    heads = reading.file.metadata.numbers(reading.key("attention.head_count_kv"))
    return {
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "conv_L_cache": reading.integer("shortconv.l_cache"),
        "norm_eps": reading.optional_number("attention.layer_norm_rms_epsilon"),
        "block_auto_adjust_ff_dim": False,
    }


def _lfm2_moe(reading: Reading) -> Values:
    require_sigmoid(reading)
    return {
        **_lfm2(reading),
        "num_experts": reading.integer("expert_count"),
        "num_experts_per_tok": reading.integer("expert_used_count"),
        "moe_intermediate_size": reading.integer("expert_feed_forward_length"),
        "num_dense_layers": reading.integer_or(0, "leading_dense_block_count"),
        "routed_scaling_factor": weights_scale(reading),
    }


# Text turns by one position, whichever of three axes a pair belongs to. Layers that guess further
# tokens are a head of their own.
_DELTA_NET = Architecture(
    "Qwen3_5ForCausalLM",
    _delta_net,
    norm_offset=1.0,
    tiled=True,
    read=("nextn_predict_layers", "rope.dimension_sections"),
    qkv_layout="gated",
)

# Positions are not rotated: that rows of q and k were put in another order changes nothing.
_NEMOTRON_H = Architecture(
    "NemotronHForCausalLM",
    _nemotron_h,
    num_kv_heads=some_kv_heads,
    intermediate_size=_widest,
    read=("expert_weights_scale", "nextn_predict_layers"),
)

HYBRIDS: Mapping[str, Architecture] = {
    "qwen35": _DELTA_NET,
    "qwen35moe": replace(_DELTA_NET, family="Qwen3_5MoeForCausalLM", values=_delta_net_moe),
    "qwen3next": replace(
        _DELTA_NET,
        family="Qwen3NextForCausalLM",
        values=_delta_net_moe,
        tiled=False,
        delta_layout="grouped",
    ),
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": _NEMOTRON_H,
    "falcon-h1": Architecture("FalconH1ForCausalLM", _falcon_h1),
    "lfm2": Architecture("Lfm2ForCausalLM", _lfm2, num_kv_heads=some_kv_heads),
    "lfm2moe": Architecture(
        "Lfm2MoeForCausalLM", _lfm2_moe, num_kv_heads=some_kv_heads, read=ROUTED
    ),
}
