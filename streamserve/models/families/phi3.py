"""Phi 3, 3.5 and 4 (the dense ones): Llama's layers, with q, k, v and gate, up each in one matrix.

Phi 4 mini turns a part of each head only.
"""

from __future__ import annotations

from streamserve.models.families.family import Family
from streamserve.models.families.llama import (
    ATTENTION_NAMES,
    LAYER,
    MLP_NAMES,
    gated_mlp,
    rotary_decoder,
)
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec

NAMES = WeightNames(
    {
        **ATTENTION_NAMES,
        **MLP_NAMES,
        "layers.qkv": (LAYER + "self_attn.qkv_proj",),
        "layers.gate_up": (LAYER + "mlp.gate_up_proj",),
    },
    ignored=(r"rotary_emb\.inv_freq",),
)


def _spec(config: HfConfig) -> DecoderSpec:
    window = config.optional_integer("sliding_window")
    return rotary_decoder(
        config,
        windows=(window,) * config.integer("num_hidden_layers"),
        mlp=gated_mlp(config),
        default_eps=1e-5,
        default_context=4096,
    )


FAMILIES = (
    Family(
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        series="Phi",
        title="Phi 3, 3.5, 4 (dense)",
        spec=_spec,
        max_positions=lambda config: config.integer_or(4096, "max_position_embeddings"),
        names=NAMES,
    ),
)
