"""StableLM 3B and 2: Llama with layer norms, of whose heads a quarter turns.

The 12B adds both halves at once, and norms each query and key head by weights of its own.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.models.families.family import Family
from streamserve.models.families.llama import (
    LAYER,
    LLAMA_NAMES,
    gated_mlp,
    rotary_decoder,
    with_head_norms,
)
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec, NormSpec


def _names(spec: DecoderSpec) -> WeightNames:
    attention = spec.attentions()[0]

    def norms(kind: str, heads: int) -> tuple[str, ...]:
        return tuple(f"{LAYER}self_attn.{kind}_layernorm.norms.{head}" for head in range(heads))

    of_heads = {
        "layers.q_norm": norms("q", attention.num_heads),
        "layers.k_norm": norms("k", attention.num_kv_heads),
    }
    return replace(LLAMA_NAMES, modules={**LLAMA_NAMES.modules, **of_heads})


def _spec(config: HfConfig) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    head_size = config.head_size(hidden_size, config.integer("num_attention_heads"))
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=gated_mlp(config),
        default_kv_heads=32,
        rope=config.rope(head_size, default_partial=0.25, default_context=4096),
        norm=NormSpec("layer_norm", config.number_or(1e-5, "layer_norm_eps"), bias=True),
        qkv_bias=config.flag_or(False, "use_qkv_bias"),
    )
    if config.flag_or(False, "qk_layernorm"):
        spec = with_head_norms(spec)
    if not config.flag_or(False, "use_parallel_residual"):
        return spec
    layers = (replace(layer, mlp_norm=None, residual="parallel") for layer in spec.layers)
    return replace(spec, layers=tuple(layers))


FAMILIES = (
    Family(
        architecture="StableLmForCausalLM",
        model_type="stablelm",
        series="StableLM",
        title="StableLM 3B, 2",
        spec=_spec,
        max_positions=lambda config: config.integer_or(4096, "max_position_embeddings"),
        names=_names,
    ),
)
