"""OPT and Galactica: learned positions from the third row on, layer norms, a plain MLP."""

from __future__ import annotations

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, NormSpec

_LAYER = "model.decoder.layers.{layer}."
_OFFSET = 2

NAMES = WeightNames(
    {
        "embedding": ("model.decoder.embed_tokens",),
        "position_embedding": ("model.decoder.embed_positions",),
        "final_norm": ("model.decoder.final_layer_norm",),
        "head": ("lm_head",),
        "layers.attention_norm": (_LAYER + "self_attn_layer_norm",),
        "layers.mlp_norm": (_LAYER + "final_layer_norm",),
        "layers.qkv": tuple(_LAYER + f"self_attn.{name}_proj" for name in "qkv"),
        "layers.output": (_LAYER + "self_attn.out_proj",),
        "layers.up": (_LAYER + "fc1",),
        "layers.down": (_LAYER + "fc2",),
    },
    optional_prefix="model.",
)


def _max_positions(config: HfConfig) -> int:
    return config.integer_or(2048, "max_position_embeddings")


def _refuse_350m(config: HfConfig, hidden_size: int) -> None:
    """It is unlike the others."""
    if not config.flag_or(True, "do_layer_norm_before"):
        raise UnsupportedModelError(
            f"{config.source}: do_layer_norm_before false: norms of residuals are not supported"
        )
    width = config.integer_or(hidden_size, "word_embed_proj_dim")
    if width != hidden_size:
        raise UnsupportedModelError(
            f"{config.source}: word_embed_proj_dim {width} must be hidden_size {hidden_size}: "
            "products between the embedding and the layers are not supported"
        )


def _spec(config: HfConfig) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_size = config.head_size(hidden_size, num_heads)
    _refuse_350m(config, hidden_size)
    bias = config.flag_or(True, "enable_bias")
    has_weights = config.flag_or(True, "layer_norm_elementwise_affine")
    norm = NormSpec("layer_norm", 1e-5, bias=has_weights, weight=has_weights)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            query_key_head_size=head_size,
            value_head_size=head_size,
            scale=head_size**-0.5,
            qkv_bias=bias,
            output_bias=bias,
        ),
        mlp=MlpSpec(
            intermediate_size=config.integer("ffn_dim"),
            activation=config.activation_or("relu", "activation_function"),
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
        final_norm=None if config.flag_or(False, "_remove_final_layer_norm") else norm,
        learned_positions=_max_positions(config) + _OFFSET,
        position_offset=_OFFSET,
        tied_head=config.flag_or(True, "tie_word_embeddings"),
    )


FAMILIES = (
    Family(
        architecture="OPTForCausalLM",
        model_type="opt",
        series="OPT",
        title="OPT (but 350M), Galactica",
        spec=_spec,
        max_positions=_max_positions,
        names=NAMES,
    ),
)
