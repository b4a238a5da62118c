"""Nemotron 3 and 4, Minitron: layer norms whose weights are stored minus 1, partly rotated heads.

Their MLP is Arcee's.
"""

from __future__ import annotations

from streamserve.models.families.arcee import NAMES, plain_mlp
from streamserve.models.families.family import Family
from streamserve.models.families.llama import rotary_decoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec, NormSpec


def _spec(config: HfConfig) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    head_size = config.head_size(hidden_size, config.integer("num_attention_heads"))
    bias = config.flag_or(False, "attention_bias")
    eps = config.number_or(1e-5, "norm_eps")
    return rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=plain_mlp(config),
        rope=config.rope(head_size, default_partial=0.5, default_context=4096),
        norm=NormSpec("layer_norm", eps, bias=True, weight_offset=1.0),
        qkv_bias=bias,
        output_bias=bias,
    )


FAMILIES = (
    Family(
        architecture="NemotronForCausalLM",
        model_type="nemotron",
        series="Nemotron",
        title="Nemotron 3 and 4 (dense), Minitron",
        spec=_spec,
        max_positions=lambda config: config.integer_or(4096, "max_position_embeddings"),
        names=NAMES,
    ),
)
