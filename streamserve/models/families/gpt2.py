"""GPT-2: learned positions, layer norms with biases, a plain MLP, weights stored transposed."""

from __future__ import annotations

from streamserve.models.families.family import Family
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
)

_LAYER = "transformer.h.{layer}."

NAMES = WeightNames(
    {
        "embedding": ("transformer.wte",),
        "position_embedding": ("transformer.wpe",),
        "final_norm": ("transformer.ln_f",),
        "head": ("lm_head",),
        "layers.attention_norm": (_LAYER + "ln_1",),
        "layers.mlp_norm": (_LAYER + "ln_2",),
        "layers.qkv": (_LAYER + "attn.c_attn",),
        "layers.output": (_LAYER + "attn.c_proj",),
        "layers.up": (_LAYER + "mlp.c_fc",),
        "layers.down": (_LAYER + "mlp.c_proj",),
    },
    transposed=frozenset({"layers.qkv", "layers.output", "layers.up", "layers.down"}),
    optional_prefix="transformer.",
    # The causal mask used to be saved as a buffer of every layer.
    ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
)


def max_positions(config: HfConfig) -> int:
    return config.integer_or(1024, "n_positions", "max_position_embeddings")


def decoder(config: HfConfig, *, default_activation: str = "gelu_new") -> DecoderSpec:
    hidden_size = config.integer("n_embd", "hidden_size")
    num_heads = config.integer("n_head", "num_attention_heads")
    num_layers = config.integer("n_layer", "num_hidden_layers")
    head_size = config.head_size(hidden_size, num_heads)
    norm = NormSpec("layer_norm", config.number_or(1e-5, "layer_norm_epsilon"), bias=True)
    scale = head_size**-0.5 if config.flag_or(True, "scale_attn_weights") else 1.0
    by_layer = config.flag_or(False, "scale_attn_by_inverse_layer_idx")
    mlp = MlpSpec(
        intermediate_size=config.integer_or(4 * hidden_size, "n_inner"),
        activation=config.activation_or(default_activation, "activation_function"),
        gated=False,
        bias=True,
    )
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=tuple(
            LayerSpec(
                attention=AttentionSpec(
                    num_heads=num_heads,
                    num_kv_heads=num_heads,
                    query_key_head_size=head_size,
                    value_head_size=head_size,
                    scale=scale / (layer + 1) if by_layer else scale,
                    qkv_bias=True,
                    output_bias=True,
                ),
                mlp=mlp,
                attention_norm=norm,
                mlp_norm=norm,
            )
            for layer in range(num_layers)
        ),
        final_norm=norm,
        learned_positions=max_positions(config),
        tied_head=config.flag_or(True, "tie_word_embeddings"),
    )


FAMILIES = (
    Family(
        architecture="GPT2LMHeadModel",
        model_type="gpt2",
        series="GPT",
        title="GPT-2",
        spec=decoder,
        max_positions=max_positions,
        names=NAMES,
    ),
)
