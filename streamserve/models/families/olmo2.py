"""OLMo 2: norms after each half and none before, queries and keys normed over all heads at once."""

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
        "final_norm": ("model.norm",),
        "head": ("lm_head",),
        "layers.attention_post_norm": (_LAYER + "post_attention_layernorm",),
        "layers.mlp_post_norm": (_LAYER + "post_feedforward_layernorm",),
        "layers.qkv": tuple(_LAYER + f"self_attn.{name}_proj" for name in "qkv"),
        "layers.q_norm": (_LAYER + "self_attn.q_norm",),
        "layers.k_norm": (_LAYER + "self_attn.k_norm",),
        "layers.output": (_LAYER + "self_attn.o_proj",),
        "layers.gate_up": (_LAYER + "mlp.gate_proj", _LAYER + "mlp.up_proj"),
        "layers.down": (_LAYER + "mlp.down_proj",),
    },
)


def _spec(config: HfConfig) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_size = config.head_size(hidden_size, num_heads)
    bias = config.flag_or(False, "attention_bias")
    norm = NormSpec("rms_norm", config.number_or(1e-5, "rms_norm_eps"))
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=config.integer_or(num_heads, "num_key_value_heads"),
            query_key_head_size=head_size,
            value_head_size=head_size,
            scale=head_size**-0.5,
            rope=config.rope(head_size),
            qk_norm=QkNormSpec(norm, per_head=False),
            qkv_bias=bias,
            output_bias=bias,
        ),
        mlp=MlpSpec(
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation_or("silu", "hidden_act"),
            gated=True,
        ),
        attention_norm=None,
        mlp_norm=None,
        attention_post_norm=norm,
        mlp_post_norm=norm,
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
        architecture="Olmo2ForCausalLM",
        model_type="olmo2",
        series="OLMo",
        title="OLMo 2",
        spec=_spec,
        max_positions=lambda config: config.integer_or(2048, "max_position_embeddings"),
        names=NAMES,
    ),
)
