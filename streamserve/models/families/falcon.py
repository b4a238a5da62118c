"""Falcon, in its three kinds.

7B: one key and value head for all, both halves in parallel behind one norm. 40B and 180B (the "new
decoder architecture"): grouped queries, and a norm for each half; 11B shares one again. RW: ALiBi
in place of rotation, one half after the other, every head its own keys.
"""

from __future__ import annotations

from streamserve.models.families.family import Family
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, NormSpec

_LAYER = "transformer.h.{layer}."


def _names(spec: DecoderSpec) -> WeightNames:
    layer = spec.layers[0]
    attention_norm, mlp_norm = "input_layernorm", "post_attention_layernorm"
    if layer.residual == "parallel" and layer.mlp_norm is not None:
        attention_norm, mlp_norm = "ln_attn", "ln_mlp"
    return WeightNames(
        {
            "embedding": ("transformer.word_embeddings",),
            "final_norm": ("transformer.ln_f",),
            "head": ("lm_head",),
            "layers.attention_norm": (_LAYER + attention_norm,),
            "layers.mlp_norm": (_LAYER + mlp_norm,),
            "layers.qkv": (_LAYER + "self_attention.query_key_value",),
            "layers.output": (_LAYER + "self_attention.dense",),
            "layers.up": (_LAYER + "mlp.dense_h_to_4h",),
            "layers.down": (_LAYER + "mlp.dense_4h_to_h",),
        },
        qkv_layout="grouped",
        ignored=(r"rotary(_emb)?\.inv_freq",),
    )


def _spec(config: HfConfig) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    head_size = config.head_size(hidden_size, num_heads)
    is_new = config.flag_or(False, "new_decoder_architecture")
    num_kv_heads = num_heads
    if is_new:
        num_kv_heads = config.integer_or(num_heads, "num_kv_heads")
    elif config.flag_or(True, "multi_query"):
        num_kv_heads = 1
    is_parallel = is_new or config.flag_or(True, "parallel_attn")
    has_two_norms = not is_parallel or (
        is_new and config.integer_or(2, "num_ln_in_parallel_attn") == 2
    )
    alibi = config.flag_or(False, "alibi")
    bias = config.flag_or(False, "bias")
    norm = NormSpec("layer_norm", config.number_or(1e-5, "layer_norm_epsilon"), bias=True)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            query_key_head_size=head_size,
            value_head_size=head_size,
            scale=head_size**-0.5,
            rope=None if alibi else config.rope(head_size),
            alibi=alibi,
            # The slopes are added before the scores are scaled. (transformers rounds them, and
            # their products with positions, to bfloat16; here they stay exact.)
            alibi_scale=head_size**-0.5,
            qkv_bias=bias,
            output_bias=bias,
        ),
        mlp=MlpSpec(
            intermediate_size=config.integer_or(4 * hidden_size, "ffn_hidden_size"),
            activation=config.activation_or("gelu", "activation"),
            gated=False,
            bias=bias,
        ),
        attention_norm=norm,
        mlp_norm=norm if has_two_norms else None,
        residual="parallel" if is_parallel else "sequential",
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
        architecture="FalconForCausalLM",
        model_type="falcon",
        series="Falcon",
        title="Falcon 7B, 11B, 40B, 180B, RW",
        spec=_spec,
        max_positions=lambda config: config.integer_or(2048, "max_position_embeddings"),
        names=_names,
    ),
)
