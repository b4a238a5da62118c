"""GGUF files of mixtures of experts, in the words of our families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from streamserve.errors import UnsupportedModelError
from streamserve.models.gguf.architecture import (
    Architecture,
    Values,
    every,
    has_bias,
    layer_types,
    rotary_factor,
)
from streamserve.models.gguf.rope_scaling import rope_scaling

if TYPE_CHECKING:
    from streamserve.models.gguf.reading import Reading


def experts(reading: Reading, *, renormalise: bool) -> Values:
    """By Qwen's names; ``renormalise`` where the file does not say."""
    size = reading.optional_integer("expert_feed_forward_length")
    used = reading.integer("expert_used_count")
    metadata, key = reading.file.metadata, reading.key("expert_weights_norm")
    stated = metadata.optional_flag(key)
    layers = range(reading.num_layers)
    return {
        "num_experts": reading.integer("expert_count"),
        "num_experts_per_tok": used,
        # As llama.cpp reads files from before there was a key.
        "moe_intermediate_size": size or reading.integer("feed_forward_length") // used,
        "norm_topk_prob": renormalise if stated is None else stated,
        "mlp_only_layers": [n for n in layers if reading.has_tensor(f"blk.{n}.ffn_up.weight")],
    }


def qwen2_moe(reading: Reading, *, renormalise: bool = False) -> Values:
    """The same with a shared expert."""
    shared = reading.file.tensors.get("blk.0.ffn_up_shexp.weight")
    size = reading.optional_integer("expert_shared_feed_forward_length")
    return {
        **experts(reading, renormalise=renormalise),
        "shared_expert_intermediate_size": size or (shared.shape[0] if shared else None),
        "qkv_bias": has_bias(reading, "attn_q") or has_bias(reading, "attn_qkv"),
    }


def _deepseek(reading: Reading) -> Values:
    used = reading.integer("expert_used_count")
    stated = reading.file.metadata.optional_flag(reading.key("expert_weights_norm"))
    return {
        "n_routed_experts": reading.integer("expert_count"),
        "n_shared_experts": reading.integer_or(0, "expert_shared_count"),
        "num_experts_per_tok": used,
        "moe_intermediate_size": reading.integer("expert_feed_forward_length"),
        "first_k_dense_replace": reading.integer_or(0, "leading_dense_block_count"),
        "norm_topk_prob": stated is True,
    }


SIGMOID = 2
# Of routers that score by sigmoid: see `require_sigmoid`.
ROUTED = ("expert_gating_func", "expert_weights_scale")
GROUPED = (*ROUTED, "expert_group_count")


def require_sigmoid(reading: Reading) -> None:
    """Raises UnsupportedModelError for a file whose experts are scored in another way."""
    scoring = reading.integer_or(SIGMOID, "expert_gating_func") or SIGMOID
    if scoring != SIGMOID:
        raise UnsupportedModelError(
            f"{reading.file.path}: {reading.key('expert_gating_func')} {scoring} is not supported "
            f"for this architecture; this is: {SIGMOID}"
        )


def weights_scale(reading: Reading) -> float:
    return reading.number_or(0.0, "expert_weights_scale") or 1.0


def grouped_experts(reading: Reading) -> Values:
    """By DeepSeek's names."""
    return {
        **_deepseek(reading),
        "n_group": reading.integer_or(0, "expert_group_count") or 1,
        "topk_group": reading.integer_or(0, "expert_group_used_count") or 1,
        "routed_scaling_factor": weights_scale(reading),
    }


def _dots1(reading: Reading) -> Values:
    require_sigmoid(reading)
    return {
        **grouped_experts(reading),
        "max_window_layers": reading.num_layers,  # so that no layer has a window
    }


def _glm4_moe(reading: Reading) -> Values:
    rotary_dim = reading.integer_or(reading.head_size, "rope.dimension_count")
    return {
        **_dots1(reading),
        "partial_rotary_factor": rotary_factor(rotary_dim, reading.head_size),
        "use_qk_norm": reading.has_tensor("blk.0.attn_q_norm.weight"),
    }


def _ernie(reading: Reading) -> Values:
    return {"use_bias": has_bias(reading, "attn_q")}


def _ernie_moe(reading: Reading) -> Values:
    return {
        "moe_num_experts": reading.integer("expert_count"),
        "moe_k": reading.integer("expert_used_count"),
        "moe_intermediate_size": reading.integer("expert_feed_forward_length"),
        "moe_num_shared_experts": reading.integer_or(0, "expert_shared_count"),
        "moe_layer_start_index": reading.integer_or(0, "leading_dense_block_count"),
        "moe_layer_interval": reading.integer_or(1, "interleave_moe_layer_step"),
    }


def _exaone_moe(reading: Reading) -> Values:
    return {
        **_dots1(reading),
        "num_experts": reading.integer("expert_count"),
        "num_shared_experts": reading.integer_or(0, "expert_shared_count"),
        "sliding_window": reading.integer("attention.sliding_window"),
        "sliding_window_pattern": every(reading),
        "layer_types": layer_types(reading),
    }


def _hunyuan_moe(reading: Reading) -> Values:
    return {
        "num_experts": reading.integer("expert_count"),
        "moe_topk": reading.integer("expert_used_count"),
        "moe_intermediate_size": reading.optional_integer("expert_feed_forward_length"),
    }


def _olmoe(reading: Reading) -> Values:
    return {
        "num_experts": reading.integer("expert_count"),
        "num_experts_per_tok": reading.integer("expert_used_count"),
    }


def _minimax_m2(reading: Reading) -> Values:
    require_sigmoid(reading)
    return {
        "num_local_experts": reading.integer("expert_count"),
        "num_experts_per_tok": reading.integer("expert_used_count"),
        "intermediate_size": reading.integer("expert_feed_forward_length"),
    }


def _gpt_oss(reading: Reading) -> Values:
    scaling = rope_scaling(reading)
    return {
        "num_local_experts": reading.integer("expert_count"),
        "num_experts_per_tok": reading.integer("expert_used_count"),
        "intermediate_size": reading.integer("expert_feed_forward_length"),
        "sliding_window": reading.integer("attention.sliding_window"),
        "layer_types": layer_types(reading),
        # Its frequencies are stretched from fractions of pairs on, which no key says.
        "rope_scaling": None if scaling is None else {**scaling, "truncate": False},
    }


MIXTURES: Mapping[str, Architecture] = {
    "qwen2moe": Architecture("Qwen2MoeForCausalLM", qwen2_moe),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM", lambda reading: experts(reading, renormalise=True)
    ),
    "deepseek": Architecture("DeepseekForCausalLM", _deepseek, permuted=True),
    "gpt-oss": Architecture("GptOssForCausalLM", _gpt_oss, windows=True),
    # The last block guesses a further token.
    "glm4moe": Architecture(
        "Glm4MoeForCausalLM",
        _glm4_moe,
        also=("SolarOpenForCausalLM",),
        read=(*GROUPED, "nextn_predict_layers"),
    ),
    "dots1": Architecture("Dots1ForCausalLM", _dots1, read=GROUPED),
    "ernie4_5": Architecture("Ernie4_5ForCausalLM", _ernie, also=("Ernie4_5_ForCausalLM",)),
    "ernie4_5-moe": Architecture("Ernie4_5_MoeForCausalLM", _ernie_moe),
    "olmoe": Architecture("OlmoeForCausalLM", _olmoe),
    "exaone-moe": Architecture(
        "ExaoneMoeForCausalLM",
        _exaone_moe,
        windows=True,
        also=("ExaoneMoEForCausalLM",),
        read=(*GROUPED, "nextn_predict_layers"),
    ),
    "hunyuan-moe": Architecture("HunYuanMoEV1ForCausalLM", _hunyuan_moe),
    "minimax-m2": Architecture("MiniMaxM2ForCausalLM", _minimax_m2, read=("expert_gating_func",)),
}
