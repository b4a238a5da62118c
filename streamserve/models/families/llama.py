"""Llama and its close relatives: RMS norms, rotary positions, a gated MLP, grouped queries.

Mistral adds a window, and from its third Ministral on a scale of queries by their position; Qwen2
biases on q, k and v; Qwen3 drops them for a norm of each query and key head; Mixtral has experts in
the MLP's place.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import family
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    QkNormSpec,
    QueryScaleSpec,
    RopeSpec,
    replace_attention,
    replace_attentions,
)

LAYER = "model.layers.{layer}."
ATTENTION_NAMES = {
    "embedding": ("model.embed_tokens",),
    "final_norm": ("model.norm",),
    "head": ("lm_head",),
    "layers.attention_norm": (LAYER + "input_layernorm",),
    "layers.mlp_norm": (LAYER + "post_attention_layernorm",),
    "layers.qkv": tuple(LAYER + f"self_attn.{name}_proj" for name in "qkv"),
    "layers.q_norm": (LAYER + "self_attn.q_norm",),
    "layers.k_norm": (LAYER + "self_attn.k_norm",),
    "layers.output": (LAYER + "self_attn.o_proj",),
}
MLP_NAMES = {
    "layers.gate_up": (LAYER + "mlp.gate_proj", LAYER + "mlp.up_proj"),
    "layers.down": (LAYER + "mlp.down_proj",),
}
_EXPERT = LAYER + "block_sparse_moe.experts.{expert}."
_EXPERTS = {
    "layers.router": (LAYER + "block_sparse_moe.gate",),
    "layers.experts.gate_up": (_EXPERT + "w1", _EXPERT + "w3"),
    "layers.experts.down": (_EXPERT + "w2",),
}
# Checkpoints converted before 2023 carry the rotary frequencies as a buffer of every layer.
_IGNORED = (r"rotary_emb\.inv_freq",)

LLAMA_NAMES = WeightNames({**ATTENTION_NAMES, **MLP_NAMES}, ignored=_IGNORED)
MIXTRAL_NAMES = WeightNames({**ATTENTION_NAMES, **_EXPERTS}, ignored=_IGNORED)


def rotary_decoder(
    config: HfConfig,
    *,
    windows: tuple[int | None, ...],
    mlp: MlpSpec | ExpertsSpec,
    default_kv_heads: int | None = None,
    default_eps: float = 1e-6,
    default_context: int = 2048,
    default_theta: float = 10_000.0,
    head_size: int | None = None,
    rope: RopeSpec | None = None,
    norm: NormSpec | None = None,
    norm_offset: float = 0.0,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: bool = False,
) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer_or(default_kv_heads or num_heads, "num_key_value_heads")
    size = head_size or config.head_size(hidden_size, num_heads)
    if norm is None:
        eps = config.number_or(default_eps, "rms_norm_eps")
        norm = NormSpec("rms_norm", eps, weight_offset=norm_offset)
    if rope is None:
        rope = config.rope(size, default_context=default_context, default_theta=default_theta)
    layers = {
        window: LayerSpec(
            attention=AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                query_key_head_size=size,
                value_head_size=size,
                scale=size**-0.5,
                window=window,
                rope=rope,
                qk_norm=QkNormSpec(norm) if qk_norm else None,
                qkv_bias=qkv_bias,
                output_bias=output_bias,
            ),
            mlp=mlp,
            attention_norm=norm,
            mlp_norm=norm,
        )
        for window in windows
    }
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=tuple(layers[window] for window in windows),
        final_norm=norm,
        tied_head=config.flag_or(False, "tie_word_embeddings"),
    )


def with_head_norms(spec: DecoderSpec) -> DecoderSpec:
    """With a layer norm of each query and key head, by weights of its own."""
    norm = spec.layers[0].attention_norm
    assert norm is not None
    qk_norm = QkNormSpec(replace(norm, bias=False), own_weights=True)
    return replace_attentions(spec, qk_norm=qk_norm)


def over_all_heads(spec: DecoderSpec) -> DecoderSpec:
    """With norms of queries and keys over all heads at once, like the last norm of the model."""
    assert spec.final_norm is not None
    return replace_attentions(spec, qk_norm=QkNormSpec(spec.final_norm, per_head=False))


def rotated_where_windowed(spec: DecoderSpec) -> DecoderSpec:
    """With positions in the layers of a window only."""
    layers = tuple(
        replace_attention(layer, rope=None) if attention.window is None else layer
        for layer, attention in zip(spec.layers, spec.attentions(), strict=True)
    )
    return replace(spec, layers=layers)


def gated_mlp(config: HfConfig, *, bias: bool = False) -> MlpSpec:
    return MlpSpec(
        intermediate_size=config.integer("intermediate_size"),
        activation=config.activation_or("silu", "hidden_act"),
        gated=True,
        bias=bias,
    )


def _llama(config: HfConfig) -> DecoderSpec:
    bias = config.flag_or(False, "attention_bias")
    return rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=gated_mlp(config, bias=config.flag_or(False, "mlp_bias")),
        qkv_bias=bias,
        output_bias=bias,
    )


def _mistral(config: HfConfig) -> DecoderSpec:
    window = config.optional_integer("sliding_window", default=4096)
    return rotary_decoder(
        config,
        windows=config.layer_windows(config.integer("num_hidden_layers"), window),
        mlp=gated_mlp(config),
        default_kv_heads=8,
        default_context=4096 * 32,
    )


# Ministral 3's rotary settings, where a config has none.
_STRETCHED = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _ministral3(config: HfConfig) -> DecoderSpec:
    if not (config.values.get("rope_parameters") or config.values.get("rope_scaling")):
        config = HfConfig({**config.values, "rope_parameters": _STRETCHED}, config.source)
    window = config.optional_integer("sliding_window")
    num_heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    spec = rotary_decoder(
        config,
        windows=(window,) * config.integer("num_hidden_layers"),
        mlp=gated_mlp(config),
        default_kv_heads=8,
        default_eps=1e-5,
        default_context=4096 * 64,
        head_size=config.optional_integer("head_dim", default=128) or hidden_size // num_heads,
    )
    beta = config.rope_number("llama_4_scaling_beta")
    if not beta:
        return spec
    rope = spec.attentions()[0].rope
    if rope is None or rope.scaling is None:
        raise UnsupportedModelError(
            f"{config.source}: rope: llama_4_scaling_beta is not supported with rope type default"
        )
    scale = QueryScaleSpec("steps", rope.scaling.original_max_position_embeddings, beta)
    return replace_attentions(spec, query_scale=scale)


def _qwen_windows(config: HfConfig) -> tuple[int | None, ...]:
    """Layers from ``max_window_layers`` on are windowed, if windows are switched on at all."""
    if not config.flag_or(False, "use_sliding_window"):
        return (None,) * config.integer("num_hidden_layers")
    return later_windows(config, config.optional_integer("sliding_window"), default_first=28)


def later_windows(
    config: HfConfig, window: int | None, *, default_first: int
) -> tuple[int | None, ...]:
    """Of layers from ``max_window_layers`` on, unless the config lists them."""
    num_layers = config.integer("num_hidden_layers")
    if config.values.get("layer_types") is not None:
        return config.layer_windows(num_layers, window)
    first = config.integer_or(default_first, "max_window_layers", minimum=0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _qwen2(config: HfConfig) -> DecoderSpec:
    return rotary_decoder(
        config,
        windows=_qwen_windows(config),
        mlp=gated_mlp(config),
        default_context=32_768,
        qkv_bias=True,
    )


def _qwen3(config: HfConfig) -> DecoderSpec:
    bias = config.flag_or(False, "attention_bias")
    return rotary_decoder(
        config,
        windows=_qwen_windows(config),
        mlp=gated_mlp(config),
        default_context=32_768,
        head_size=config.integer_or(128, "head_dim"),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


def _mixtral(config: HfConfig) -> DecoderSpec:
    window = config.optional_integer("sliding_window")
    return rotary_decoder(
        config,
        windows=config.layer_windows(config.integer("num_hidden_layers"), window),
        mlp=ExpertsSpec(
            num_experts=config.integer_or(8, "num_local_experts"),
            top_k=config.integer_or(2, "num_experts_per_tok"),
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation_or("silu", "hidden_act"),
        ),
        default_kv_heads=8,
        default_eps=1e-5,
        default_context=4096 * 32,
        default_theta=1e6,
    )


FAMILIES = (
    family(
        "LlamaForCausalLM",
        "llama",
        "Llama",
        "Llama 1, 2, 3.x (Vicuna, Alpaca, SmolLM, …)",
        _llama,
        2048,
        LLAMA_NAMES,
    ),
    family("MistralForCausalLM", "mistral", "Mistral", "Mistral", _mistral, 4096 * 32, LLAMA_NAMES),
    family(
        "MinistralForCausalLM",
        "ministral",
        "Mistral",
        "Ministral",
        _mistral,
        4096 * 32,
        LLAMA_NAMES,
    ),
    family(
        "Ministral3ForCausalLM",
        "ministral3",
        "Mistral",
        "Ministral 3",
        _ministral3,
        4096 * 64,
        LLAMA_NAMES,
    ),
    family("Qwen2ForCausalLM", "qwen2", "Qwen", "Qwen 1.5, 2, 2.5", _qwen2, 32_768, LLAMA_NAMES),
    family("Qwen3ForCausalLM", "qwen3", "Qwen", "Qwen 3", _qwen3, 32_768, LLAMA_NAMES),
    family(
        "MixtralForCausalLM", "mixtral", "Mistral", "Mixtral", _mixtral, 4096 * 32, MIXTRAL_NAMES
    ),
)
