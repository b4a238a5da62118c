"""StarCoder 2: grouped queries and rotary positions as in Llama, layer norms and a plain MLP."""

from __future__ import annotations

from streamserve.models.families.family import Family
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, NormSpec

_LAYER = "model.layers.{layer}."

NAMES = WeightNames(
    {
        "embedding": ("model.embed_tokens",),
        "final_norm": ("model.norm",),
        "head": ("lm_head",),
        "layers.attention_norm": (_LAYER + "input_layernorm",),
        "layers.mlp_norm": (_LAYER + "post_attention_layernorm",),
        "layers.qkv": tuple(_LAYER + f"self_attn.{name}_proj" for name in "qkv"),
        "layers.output": (_LAYER + "self_attn.o_proj",),
        "layers.up": (_LAYER + "mlp.c_fc",),
        "layers.down": (_LAYER + "mlp.c_proj",),
    },
    ignored=(r"rotary_emb\.inv_freq",),
)


def _spec(config: HfConfig) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_size = config.head_size(hidden_size, num_heads)
    bias = config.flag_or(True, "use_bias")
    norm = NormSpec("layer_norm", config.number_or(1e-5, "norm_epsilon"), bias=True)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=config.integer_or(2, "num_key_value_heads"),
            query_key_head_size=head_size,
            value_head_size=head_size,
            scale=head_size**-0.5,
            window=config.optional_integer("sliding_window"),
            rope=config.rope(head_size, default_context=4096),
            qkv_bias=bias,
            output_bias=bias,
        ),
        mlp=MlpSpec(
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation_or("gelu_tanh", "hidden_act"),
            gated=False,
            bias=bias,
        ),
        attention_norm=norm,
        mlp_norm=norm,
    )
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * config.integer("num_hidden_layers"),
        final_norm=norm,
        tied_head=config.flag_or(True, "tie_word_embeddings"),
    )


FAMILIES = (
    Family(
        architecture="Starcoder2ForCausalLM",
        model_type="starcoder2",
        series="StarCoder",
        title="StarCoder 2",
        spec=_spec,
        max_positions=lambda config: config.integer_or(4096, "max_position_embeddings"),
        names=NAMES,
    ),
)
