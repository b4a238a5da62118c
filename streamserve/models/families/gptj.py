"""GPT-J: interleaved rotation of a part of each head, both halves in parallel behind one norm."""

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
    RopeSpec,
)

_LAYER = "transformer.h.{layer}."

NAMES = WeightNames(
    {
        "embedding": ("transformer.wte",),
        "final_norm": ("transformer.ln_f",),
        "head": ("lm_head",),
        "layers.attention_norm": (_LAYER + "ln_1",),
        "layers.qkv": tuple(_LAYER + f"attn.{name}_proj" for name in "qkv"),
        "layers.output": (_LAYER + "attn.out_proj",),
        "layers.up": (_LAYER + "mlp.fc_in",),
        "layers.down": (_LAYER + "mlp.fc_out",),
    },
    # The causal mask used to be saved as a buffer of every layer.
    ignored=(r"attn\.(masked_)?bias",),
)


def _spec(config: HfConfig) -> DecoderSpec:
    hidden_size = config.integer("n_embd", "hidden_size")
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
            rope=RopeSpec(10_000.0, config.rotary_dim(head_size, 64), interleaved=True),
        ),
        mlp=MlpSpec(
            intermediate_size=config.integer_or(4 * hidden_size, "n_inner"),
            activation=config.activation_or("gelu_new", "activation_function"),
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
        layers=(layer,) * config.integer("n_layer", "num_hidden_layers"),
        final_norm=norm,
        tied_head=config.flag_or(False, "tie_word_embeddings"),
        head_bias=True,
    )


FAMILIES = (
    Family(
        architecture="GPTJForCausalLM",
        model_type="gptj",
        series="GPT",
        title="GPT-J",
        spec=_spec,
        max_positions=lambda config: config.integer_or(
            2048, "n_positions", "max_position_embeddings"
        ),
        names=NAMES,
    ),
)
