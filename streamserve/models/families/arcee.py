"""Arcee's AFM: Llama with a plain MLP, of squared positive parts."""

from __future__ import annotations

from streamserve.models.families.family import Family
from streamserve.models.families.llama import ATTENTION_NAMES, LAYER, rotary_decoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec, MlpSpec

PLAIN_MLP_NAMES = {
    "layers.up": (LAYER + "mlp.up_proj",),
    "layers.down": (LAYER + "mlp.down_proj",),
}
NAMES = WeightNames({**ATTENTION_NAMES, **PLAIN_MLP_NAMES}, ignored=(r"rotary_emb\.inv_freq",))


def plain_mlp(config: HfConfig) -> MlpSpec:
    return MlpSpec(
        intermediate_size=config.integer("intermediate_size"),
        activation=config.activation_or("relu2", "hidden_act"),
        gated=False,
        bias=config.flag_or(False, "mlp_bias"),
    )


def _spec(config: HfConfig) -> DecoderSpec:
    bias = config.flag_or(False, "attention_bias")
    return rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=plain_mlp(config),
        default_eps=1e-5,
        default_context=4096,
        qkv_bias=bias,
        output_bias=bias,
    )


FAMILIES = (
    Family(
        architecture="ArceeForCausalLM",
        model_type="arcee",
        series="Arcee",
        title="Arcee AFM",
        spec=_spec,
        max_positions=lambda config: config.integer_or(4096, "max_position_embeddings"),
        names=NAMES,
    ),
)
