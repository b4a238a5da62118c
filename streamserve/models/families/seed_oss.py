"""Seed-OSS: Llama with biases on q, k and v, and heads of a size of their own."""

from __future__ import annotations

from streamserve.models.families.family import Family
from streamserve.models.families.llama import LLAMA_NAMES, gated_mlp, rotary_decoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec


def _spec(config: HfConfig) -> DecoderSpec:
    return rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=gated_mlp(config, bias=config.flag_or(False, "mlp_bias")),
        default_kv_heads=8,
        default_context=524_288,
        head_size=config.optional_integer("head_dim", default=128),
        qkv_bias=config.flag_or(True, "attention_bias"),
        output_bias=config.flag_or(False, "attention_out_bias"),
    )


FAMILIES = (
    Family(
        architecture="SeedOssForCausalLM",
        model_type="seed_oss",
        series="Seed",
        title="Seed-OSS",
        spec=_spec,
        max_positions=lambda config: config.integer_or(524_288, "max_position_embeddings"),
        names=LLAMA_NAMES,
    ),
)
