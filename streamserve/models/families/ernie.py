"""Ernie 4.5 (Baidu): Llama with neighbours turned together, and its mixtures.

Experts are chosen by their probability and a correction. Layers that guess further tokens are not
read. Original checkpoints name the dense models' class in another way.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import UnsupportedModelError
from streamserve.models.families import routed
from streamserve.models.families.family import family
from streamserve.models.families.llama import (
    ATTENTION_NAMES,
    LAYER,
    MLP_NAMES,
    gated_mlp,
    rotary_decoder,
)
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec, ExpertsSpec, RouterSpec

NAMES = WeightNames({**ATTENTION_NAMES, **MLP_NAMES})
MOE_NAMES = replace(
    routed.NAMES,
    modules={
        **routed.NAMES.modules,
        "layers.router.correction": (LAYER + "mlp.moe_statics.e_score_correction_bias",),
    },
    skipped=("model.mtp_",),
)
# What the sum of probabilities counts as at least. So little might as well be added to it.
_LEAST = 1e-6


def _decoder(config: HfConfig, *, head_size: int | None, default_kv_heads: int) -> DecoderSpec:
    bias = config.flag_or(False, "use_bias")
    size = head_size or config.head_size(
        config.integer("hidden_size"), config.integer("num_attention_heads")
    )
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=gated_mlp(config, bias=bias),
        rope=config.rope(size, default_theta=500_000.0, default_context=131_072, interleaved=True),
        head_size=size,
        default_kv_heads=None if "num_key_value_heads" in config.values else default_kv_heads,
        default_eps=1e-5,
        qkv_bias=bias,
        output_bias=bias,
    )
    return replace(spec, tied_head=config.flag_or(True, "tie_word_embeddings"))


def _dense(config: HfConfig) -> DecoderSpec:
    size = None if "head_dim" in config.values else 128
    return _decoder(config, head_size=size, default_kv_heads=2)


def _experts(config: HfConfig) -> ExpertsSpec:
    size = config.integer_or(1536, "moe_intermediate_size")
    activation = config.activation_or("silu", "hidden_act")
    num_shared = config.integer_or(2, "moe_num_shared_experts", minimum=0)
    least = config.number_or(1e-12, "moe_norm_min")
    if least > _LEAST:
        raise UnsupportedModelError(
            f"{config.source}: moe_norm_min must be at most {_LEAST} for this architecture, "
            f"got {least}"
        )
    return ExpertsSpec(
        num_experts=config.integer_or(64, "moe_num_experts", "num_experts"),
        top_k=config.integer_or(6, "moe_k", "num_experts_per_tok"),
        intermediate_size=size,
        activation=activation,
        router=RouterSpec(correction=True, eps=least),
        shared=routed.shared_mlp(num_shared * size, activation),
        shared_gate=False,
    )


def _mixture(config: HfConfig) -> DecoderSpec:
    if config.flag_or(False, "use_bias"):
        raise UnsupportedModelError(
            f"{config.source}: use_bias is not supported for this architecture"
        )
    spec = _decoder(config, head_size=None, default_kv_heads=4)
    num_layers = len(spec.layers)
    last = config.integer_or(-1, "moe_layer_end_index", minimum=-1)
    end = num_layers if last == -1 else min(last + 1, num_layers)
    step = config.integer_or(1, "moe_layer_interval")
    start = config.integer_or(1, "moe_layer_start_index", minimum=0)
    first = start + (-start - 1) % step
    return routed.with_experts(spec, _experts(config), range(first, end, step))


FAMILIES = (
    family("Ernie4_5ForCausalLM", "ernie4_5", "Ernie", "Ernie 4.5 (dense)", _dense, 131_072, NAMES),
    family(
        "Ernie4_5_ForCausalLM", "ernie4_5", "Ernie", "Ernie 4.5 (dense)", _dense, 131_072, NAMES
    ),
    family(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        "Ernie",
        "Ernie 4.5 MoE",
        _mixture,
        131_072,
        MOE_NAMES,
    ),
)
