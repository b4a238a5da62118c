"""Baichuan 1 and 2, as their repositories have them (`modeling_baichuan.py`, not run here).

Llama's layers with q, k and v in one matrix. The 7B models turn their heads; the 13B ones have
ALiBi, and a config that no key tells from the others': it lacks ``max_position_embeddings``. Of
both generations' heads, the second's has its rows divided by their lengths.
"""

from __future__ import annotations

from dataclasses import replace

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
from streamserve.models.spec import DecoderSpec, replace_attentions

NAMES = WeightNames(
    {**ATTENTION_NAMES, **MLP_NAMES, "layers.qkv": (LAYER + "self_attn.W_pack",)},
    ignored=(r"rotary_emb\.inv_freq",),
)
_HAS_ALIBI = {4096: False, 5120: True}
"""By the hidden sizes of what was published, whatever somebody has added to its config."""
_SECOND_VOCABULARY = 125_696


def _rotary(config: HfConfig) -> DecoderSpec:
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=gated_mlp(config),
        default_context=4096,
    )
    # Only the second generation's configuration knows a loss for large logits.
    is_second = spec.vocab_size == _SECOND_VOCABULARY or "z_loss_weight" in config.values
    return replace(spec, normalised_head=is_second)


def _spec(config: HfConfig) -> DecoderSpec:
    spec = _rotary(config)
    is_untold = config.values.get("max_position_embeddings") is None
    if not _HAS_ALIBI.get(spec.hidden_size, is_untold):
        return spec
    return replace_attentions(spec, rope=None, alibi=True)


FAMILIES = tuple(
    Family(
        architecture=architecture,
        model_type="baichuan",
        series="Baichuan",
        title=title,
        spec=spec,
        max_positions=lambda config: config.integer_or(
            4096, "max_position_embeddings", "model_max_length"
        ),
        names=NAMES,
    )
    for architecture, title, spec in (
        ("BaichuanForCausalLM", "Baichuan 1, 2", _spec),
        ("BaiChuanForCausalLM", "Baichuan 1 (7B)", _rotary),
    )
)
