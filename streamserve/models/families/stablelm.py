"""StableLM 3B and 2: Llama with layer norms, of whose heads a quarter turns."""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.families.llama import LLAMA_NAMES, gated_mlp, rotary_decoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec, NormSpec


def _spec(config: HfConfig) -> DecoderSpec:
    if config.flag_or(False, "qk_layernorm"):
        raise UnsupportedModelError(
            f"{config.source}: qk_layernorm: norms of queries and keys with weights of each head's "
            "own are not supported"
        )
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
        names=LLAMA_NAMES,
    ),
)
