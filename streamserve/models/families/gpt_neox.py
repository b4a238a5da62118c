"""GPT-NeoX and Pythia: partly rotated heads, both halves in parallel, each with its own norm."""

from __future__ import annotations

from streamserve.models.families.family import Family
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, NormSpec

_LAYER = "gpt_neox.layers.{layer}."

NAMES = WeightNames(
    {
        "embedding": ("gpt_neox.embed_in",),
        "final_norm": ("gpt_neox.final_layer_norm",),
        "head": ("embed_out",),
        "layers.attention_norm": (_LAYER + "input_layernorm",),
        "layers.mlp_norm": (_LAYER + "post_attention_layernorm",),
        "layers.qkv": (_LAYER + "attention.query_key_value",),
        "layers.output": (_LAYER + "attention.dense",),
        "layers.up": (_LAYER + "mlp.dense_h_to_4h",),
        "layers.down": (_LAYER + "mlp.dense_4h_to_h",),
    },
    qkv_layout="grouped",
    # Masks and frequencies used to be saved as buffers of every layer.
    ignored=(r"attention\.(masked_)?bias", r"rotary_emb\.inv_freq"),
)


def _spec(config: HfConfig) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_size = config.head_size(hidden_size, num_heads)
    norm = NormSpec("layer_norm", config.number_or(1e-5, "layer_norm_eps"), bias=True)
    bias = config.flag_or(True, "attention_bias")
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            query_key_head_size=head_size,
            value_head_size=head_size,
            scale=head_size**-0.5,
            rope=config.rope(
                head_size,
                theta_names=("rotary_emb_base", "rope_theta"),
                partial_names=("rotary_pct", "partial_rotary_factor"),
                default_partial=0.25,
            ),
            qkv_bias=bias,
            output_bias=bias,
        ),
        mlp=MlpSpec(
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation_or("gelu", "hidden_act"),
            gated=False,
            bias=True,
        ),
        attention_norm=norm,
        mlp_norm=norm,
        residual="parallel" if config.flag_or(True, "use_parallel_residual") else "sequential",
    )
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * config.integer("num_hidden_layers"),
        final_norm=norm,
        tied_head=config.flag_or(False, "tie_word_embeddings"),
    )


FAMILIES = (
    Family(
        architecture="GPTNeoXForCausalLM",
        model_type="gpt_neox",
        series="GPT",
        title="GPT-NeoX, Pythia",
        spec=_spec,
        max_positions=lambda config: config.integer_or(2048, "max_position_embeddings"),
        names=NAMES,
    ),
)
