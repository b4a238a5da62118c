"""Helium: Llama with neighbours turned together."""

from __future__ import annotations

from streamserve.models.families.family import Family
from streamserve.models.families.llama import LLAMA_NAMES, gated_mlp, rotary_decoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec


def _spec(config: HfConfig) -> DecoderSpec:
    head_size = config.integer_or(128, "head_dim")
    return rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=gated_mlp(config, bias=config.flag_or(False, "mlp_bias")),
        default_kv_heads=20,
        default_eps=1e-8,
        head_size=head_size,
        rope=config.rope(
            head_size, default_theta=100_000.0, default_context=4096, interleaved=True
        ),
        qkv_bias=config.flag_or(False, "attention_bias"),
    )


FAMILIES = (
    Family(
        architecture="HeliumForCausalLM",
        model_type="helium",
        series="Helium",
        title="Helium",
        spec=_spec,
        max_positions=lambda config: config.integer_or(4096, "max_position_embeddings"),
        names=LLAMA_NAMES,
    ),
)
