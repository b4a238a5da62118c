"""What families with multi-head latent attention have in common, and the dense ones among them.

MiniCPM 3 scales what a layer adds by how many there are; Youtu is DeepSeek V3 with a plain MLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from streamserve.errors import UnsupportedModelError
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
from streamserve.models.rope_magnitude import yarn_magnitude
from streamserve.models.spec import (
    DecoderSpec,
    ExpertsSpec,
    LatentSpec,
    MlpSpec,
    RopeSpec,
    replace_attentions,
)

_ATTENTION = LAYER + "self_attn."
_NAMES = {
    **{
        name: ATTENTION_NAMES[name] for name in ("embedding", "final_norm", "head", "layers.output")
    },
    "layers.attention_norm": (LAYER + "input_layernorm",),
    "layers.mlp_norm": (LAYER + "post_attention_layernorm",),
    "layers.latent.query_norm": (_ATTENTION + "q_a_layernorm",),
    "layers.latent.query": (_ATTENTION + "q_b_proj",),
    "layers.latent.norm": (_ATTENTION + "kv_a_layernorm",),
    "layers.latent.heads": (_ATTENTION + "kv_b_proj",),
}


def latent_names(spec: DecoderSpec, mlp_names: Mapping[str, tuple[str, ...]]) -> WeightNames:
    """Names as DeepSeek has them, of a checkpoint whose queries have a latent, or have not."""
    latent = spec.attentions()[0].latent
    assert latent is not None
    query = "q_proj" if latent.query_rank is None else "q_a_proj"
    entrance = (_ATTENTION + query, _ATTENTION + "kv_a_proj_with_mqa")
    return WeightNames(
        {**_NAMES, **mlp_names, "layers.latent.input": entrance},
        ignored=(r"rotary_emb\.inv_freq",),
    )


class LatentSizes(NamedTuple):
    """Of a family's config, where it leaves them out."""

    rank: int
    query_rank: int | None
    key_size: int
    rope_size: int
    value_size: int


def latent_decoder(
    config: HfConfig,
    mlp: MlpSpec | ExpertsSpec,
    sizes: LatentSizes,
    *,
    interleaved: bool,
    default_context: int,
    default_eps: float = 1e-6,
) -> DecoderSpec:
    """Layers that attend so, all with this MLP."""
    if config.flag_or(False, "attention_bias"):
        raise UnsupportedModelError(
            f"{config.source}: attention_bias is not supported with latent attention"
        )
    rank = config.integer_or(sizes.rank, "kv_lora_rank")
    key_size = config.integer_or(sizes.key_size, "qk_nope_head_dim")
    rope_size = config.integer_or(sizes.rope_size, "qk_rope_head_dim")
    rope = config.rope(rope_size, default_context=default_context, interleaved=interleaved)
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=mlp,
        default_eps=default_eps,
        head_size=rope_size,
        rope=rope,
    )
    changes = {
        "num_kv_heads": 1,
        "query_key_head_size": rope_size + rank,
        "value_head_size": rank,
        "scale": (key_size + rope_size) ** -0.5 * _sharpness(config, rope),
        "latent": LatentSpec(
            key_size=key_size,
            value_size=config.integer_or(sizes.value_size, "v_head_dim"),
            query_rank=config.optional_integer("q_lora_rank", default=sizes.query_rank),
        ),
    }
    return replace_attentions(spec, **changes)


def _sharpness(config: HfConfig, rope: RopeSpec) -> float:
    """What a stretched rope makes of the scale: DeepSeek's way of YaRN's factor for attention."""
    weight = config.rope_number("mscale_all_dim")
    if not weight or rope.scaling is None:
        return 1.0
    return yarn_magnitude(rope.scaling.factor, weight) ** 2


def _minicpm3(config: HfConfig) -> DecoderSpec:
    hidden_size, num_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    spec = latent_decoder(
        config,
        gated_mlp(config, bias=config.flag_or(False, "mlp_bias")),
        LatentSizes(256, 768, 64, 32, hidden_size // config.integer("num_attention_heads")),
        interleaved=False,
        default_context=32_768,
        default_eps=1e-5,
    )
    depth = config.optional_number(1.4, "scale_depth")
    base = config.optional_integer("dim_model_base", default=256)
    added = 1.0 if depth is None else depth / math.sqrt(num_layers)
    return replace(
        spec,
        layers=tuple(replace(layer, residual_scale=added) for layer in spec.layers),
        embedding_scale=config.number_or(12.0, "scale_emb"),
        logit_scale=1.0 if base is None else base / hidden_size,
        tied_head=config.flag_or(True, "tie_word_embeddings"),
    )


def _youtu(config: HfConfig) -> DecoderSpec:
    spec = latent_decoder(
        config,
        gated_mlp(config),
        LatentSizes(512, 1536, 128, 64, 128),
        interleaved=config.flag_or(True, "rope_interleave"),
        default_context=131_072,
    )
    return replace(spec, tied_head=config.flag_or(True, "tie_word_embeddings"))


def _names(spec: DecoderSpec) -> WeightNames:
    return latent_names(spec, MLP_NAMES)


FAMILIES = (
    family("MiniCPM3ForCausalLM", "minicpm3", "MiniCPM", "MiniCPM 3", _minicpm3, 32_768, _names),
    family("YoutuForCausalLM", "youtu", "Youtu", "Youtu", _youtu, 131_072, _names),
)
