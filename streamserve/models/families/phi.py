"""Phi 1, 1.5 and 2: partly rotated heads, both halves in parallel behind one norm, biased head."""

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
    QkNormSpec,
)

_LAYER = "model.layers.{layer}."

NAMES = WeightNames(
    {
        "embedding": ("model.embed_tokens",),
        "final_norm": ("model.final_layernorm",),
        "head": ("lm_head",),
        "layers.attention_norm": (_LAYER + "input_layernorm",),
        "layers.qkv": tuple(_LAYER + f"self_attn.{name}_proj" for name in "qkv"),
        "layers.q_norm": (_LAYER + "self_attn.q_layernorm",),
        "layers.k_norm": (_LAYER + "self_attn.k_layernorm",),
        "layers.output": (_LAYER + "self_attn.dense",),
        "layers.up": (_LAYER + "mlp.fc1",),
        "layers.down": (_LAYER + "mlp.fc2",),
    },
    ignored=(r"rotary_emb\.inv_freq",),
)


def _spec(config: HfConfig) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_size = config.head_size(hidden_size, num_heads)
    norm = NormSpec("layer_norm", config.number_or(1e-5, "layer_norm_eps"), bias=True)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=config.integer_or(num_heads, "num_key_value_heads"),
            query_key_head_size=head_size,
            value_head_size=head_size,
            scale=head_size**-0.5,
            rope=config.rope(head_size, default_partial=0.5),
            qk_norm=QkNormSpec(norm) if config.flag_or(False, "qk_layernorm") else None,
            qkv_bias=True,
            output_bias=True,
        ),
        mlp=MlpSpec(
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation_or("gelu_new", "hidden_act"),
            gated=False,
            bias=True,
        ),
        attention_norm=norm,
        mlp_norm=None,
        residual="parallel",
    )
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * config.integer("num_hidden_layers"),
        final_norm=norm,
        tied_head=config.flag_or(False, "tie_word_embeddings"),
        head_bias=True,
    )


FAMILIES = (
    Family(
        architecture="PhiForCausalLM",
        model_type="phi",
        series="Phi",
        title="Phi 1, 1.5, 2",
        spec=_spec,
        max_positions=lambda config: config.integer_or(2048, "max_position_embeddings"),
        names=NAMES,
    ),
)
