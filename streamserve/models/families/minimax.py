"""MiniMax M2: part of each head turns, queries and keys are normed over all heads at once.

Its experts are chosen by the sigmoid of their logits and a correction.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.families.llama import LAYER, MIXTRAL_NAMES, over_all_heads, rotary_decoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec, ExpertsSpec, RouterSpec

NAMES = replace(
    MIXTRAL_NAMES,
    modules={
        **MIXTRAL_NAMES.modules,
        "layers.router.correction": (LAYER + "block_sparse_moe.e_score_correction_bias",),
    },
)
# What published configs say, and its code takes for granted.
_ONLY = {"scoring_func": "sigmoid", "qk_norm_type": "per_layer", "use_qk_norm": True}


def _spec(config: HfConfig) -> DecoderSpec:
    for name, only in _ONLY.items():
        value = config.values.get(name, only)
        if value != only:
            raise UnsupportedModelError(
                f"{config.source}: {name} {value!r} is not supported for this architecture; "
                f"this is: {only!r}"
            )
    head_size = config.integer_or(128, "head_dim")
    turned = config.integer_or(head_size, "rotary_dim")
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=ExpertsSpec(
            num_experts=config.integer_or(256, "num_local_experts", "num_experts"),
            top_k=config.integer_or(8, "num_experts_per_tok"),
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation_or("silu", "hidden_act"),
            router=RouterSpec(scoring="sigmoid", correction=True),
        ),
        rope=config.rope(
            head_size,
            default_theta=5_000_000.0,
            default_partial=turned / head_size,
            default_context=196_608,
        ),
        head_size=head_size,
        default_kv_heads=8,
    )
    return over_all_heads(spec)


FAMILIES = (
    Family(
        architecture="MiniMaxM2ForCausalLM",
        model_type="minimax_m2",
        series="MiniMax",
        title="MiniMax M2",
        spec=_spec,
        max_positions=lambda config: config.integer_or(196_608, "max_position_embeddings"),
        names=NAMES,
    ),
)
