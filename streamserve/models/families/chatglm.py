"""ChatGLM 2 and 3, and GLM 4 before transformers had it (`modeling_chatglm.py`, not run here).

Grouped queries in one biased product, the first half of each head turned, interleaved, and gate and
up in one matrix. ``rope_ratio`` multiplies the rotary base of the long ones.
"""

from __future__ import annotations

from streamserve.errors import UnsupportedModelError
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

_LAYER = "transformer.encoder.layers.{layer}."
_MODULES = {
    "embedding": ("transformer.embedding.word_embeddings",),
    "final_norm": ("transformer.encoder.final_layernorm",),
    "head": ("transformer.output_layer",),
    "layers.attention_norm": (_LAYER + "input_layernorm",),
    "layers.mlp_norm": (_LAYER + "post_attention_layernorm",),
    "layers.qkv": (_LAYER + "self_attention.query_key_value",),
    "layers.output": (_LAYER + "self_attention.dense",),
    "layers.gate_up": (_LAYER + "mlp.dense_h_to_4h",),
    "layers.down": (_LAYER + "mlp.dense_4h_to_h",),
}
_ROPE_BASE = 10_000.0
# What the first ChatGLM, the pictures of GLM-4V and trained prefixes have in their configs.
_NOT_BUILT = {
    "position_encoding_2d": "the first ChatGLM's positions in two dimensions are not supported",
    "inner_hidden_size": "the first ChatGLM, which looks at its whole prompt, is not supported",
    "vision_config": "pictures are not supported",
    "pre_seq_len": "trained prefixes are not supported",
    "apply_residual_connection_post_layernorm": "residuals of normed states are not supported",
}


def _names(spec: DecoderSpec) -> WeightNames:
    attention = spec.attentions()[0]
    is_grouped = attention.num_kv_heads == attention.num_heads
    return WeightNames(
        _MODULES,
        qkv_layout="grouped" if is_grouped else "stacked",
        ignored=(r"rotary_pos_emb\.inv_freq",),
    )


def _spec(config: HfConfig) -> DecoderSpec:
    for name, reason in _NOT_BUILT.items():
        if config.values.get(name):
            raise UnsupportedModelError(f"{config.source}: {name}: {reason}")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = num_heads
    if config.flag_or(False, "multi_query_attention"):
        num_kv_heads = config.integer_or(1, "multi_query_group_num")
    head_size = config.integer_or(128, "kv_channels")
    bias = config.flag_or(False, "add_bias_linear")
    is_rms = config.flag_or(True, "rmsnorm")
    norm = NormSpec(
        "rms_norm" if is_rms else "layer_norm",
        config.number_or(1e-5, "layernorm_epsilon"),
        bias=not is_rms,
    )
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            query_key_head_size=head_size,
            value_head_size=head_size,
            scale=head_size**-0.5,
            rope=RopeSpec(
                base=_ROPE_BASE * config.number_or(1.0, "rope_ratio"),
                rotary_dim=config.rotary_dim(head_size, head_size // 2),
                interleaved=True,
            ),
            qkv_bias=bias or config.flag_or(False, "add_qkv_bias"),
            output_bias=bias,
        ),
        mlp=MlpSpec(config.integer("ffn_hidden_size"), "silu", gated=True, bias=bias),
        attention_norm=norm,
        mlp_norm=norm,
    )
    return DecoderSpec(
        vocab_size=config.integer("padded_vocab_size", "vocab_size"),
        hidden_size=config.integer("hidden_size"),
        layers=(layer,) * config.integer("num_layers", "num_hidden_layers"),
        final_norm=norm if config.flag_or(True, "post_layer_norm") else None,
        tied_head=config.flag_or(False, "tie_word_embeddings"),
    )


FAMILIES = tuple(
    Family(
        architecture=architecture,
        model_type="chatglm",
        series="GLM",
        title="ChatGLM 2, 3; GLM 4 with its own code",
        spec=_spec,
        max_positions=lambda config: config.integer_or(2048, "seq_length"),
        names=_names,
        end_tokens=("<|user|>", "<|observation|>"),
    )
    for architecture in ("ChatGLMModel", "ChatGLMForConditionalGeneration")
)
