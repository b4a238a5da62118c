"""StarCoder and SantaCoder: GPT-2 with one key and value head for all."""

from __future__ import annotations

from dataclasses import replace

from streamserve.models.families import gpt2
from streamserve.models.families.family import Family
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec, replace_attentions

NAMES = replace(gpt2.NAMES, transposed=frozenset(), qkv_layout="grouped")


def _spec(config: HfConfig) -> DecoderSpec:
    spec = gpt2.decoder(config, default_activation="gelu_pytorch_tanh")
    if not config.flag_or(True, "multi_query"):
        return spec
    return replace_attentions(spec, num_kv_heads=1)


FAMILIES = (
    Family(
        architecture="GPTBigCodeForCausalLM",
        model_type="gpt_bigcode",
        series="StarCoder",
        title="StarCoder 1, SantaCoder (GPT-BigCode)",
        spec=_spec,
        max_positions=gpt2.max_positions,
        names=NAMES,
    ),
)
