"""BLOOM: ALiBi, a norm of the embedding, layer norms with biases, a plain MLP."""

from __future__ import annotations

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, NormSpec

_LAYER = "transformer.h.{layer}."

NAMES = WeightNames(
    {
        "embedding": ("transformer.word_embeddings",),
        "embedding_norm": ("transformer.word_embeddings_layernorm",),
        "final_norm": ("transformer.ln_f",),
        "head": ("lm_head",),
        "layers.attention_norm": (_LAYER + "input_layernorm",),
        "layers.mlp_norm": (_LAYER + "post_attention_layernorm",),
        "layers.qkv": (_LAYER + "self_attention.query_key_value",),
        "layers.output": (_LAYER + "self_attention.dense",),
        "layers.up": (_LAYER + "mlp.dense_h_to_4h",),
        "layers.down": (_LAYER + "mlp.dense_4h_to_h",),
    },
    qkv_layout="grouped",
    optional_prefix="transformer.",
)


def _spec(config: HfConfig) -> DecoderSpec:
    if config.flag_or(False, "apply_residual_connection_post_layernorm"):
        raise UnsupportedModelError(
            f"{config.source}: apply_residual_connection_post_layernorm: residuals of normed "
            "states are not supported"
        )
    hidden_size = config.integer("hidden_size", "n_embed")
    num_heads = config.integer("n_head", "num_attention_heads")
    head_size = config.head_size(hidden_size, num_heads)
    norm = NormSpec("layer_norm", config.number_or(1e-5, "layer_norm_epsilon"), bias=True)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            query_key_head_size=head_size,
            value_head_size=head_size,
            scale=head_size**-0.5,
            alibi=True,
            qkv_bias=True,
            output_bias=True,
        ),
        mlp=MlpSpec(4 * hidden_size, "gelu_tanh", gated=False, bias=True),
        attention_norm=norm,
        mlp_norm=norm,
    )
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * config.integer("n_layer", "num_hidden_layers"),
        final_norm=norm,
        embedding_norm=norm,
        tied_head=config.flag_or(True, "tie_word_embeddings"),
    )


FAMILIES = (
    Family(
        architecture="BloomForCausalLM",
        model_type="bloom",
        series="BLOOM",
        title="BLOOM, BLOOMZ",
        spec=_spec,
        # ALiBi knows no end; this is the length that they were trained on.
        max_positions=lambda config: config.integer_or(2048, "seq_length"),
        names=NAMES,
    ),
)
