"""The text models of Gemma 4: windows in turns, and full attention with heads of another size.

Values are normed too, without a weight; scores are not scaled. The largest ones have no values of
their own in full attention, the smallest no keys either in their last layers, which attend to what
an earlier layer of their kind left; those give each layer a part of its own of every token's
embedding. A number of the checkpoint's multiplies what a layer leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.families.gemma import NAMES as GEMMA_NAMES
from streamserve.models.families.layer_rope import layer_rope
from streamserve.models.families.llama import LAYER, MLP_NAMES
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import (
    Activation,
    AttentionSpec,
    DecoderSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    PerLayerSpec,
    QkNormSpec,
    RouterSpec,
)

_SLIDING, _FULL = "sliding_attention", "full_attention"
_EVERY = 6  # layers of which one has no window
_GLOBAL_HEAD_SIZE = 512
_ROPES: Mapping[str, Mapping[str, Any]] = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
_PRODUCTS = {
    "layers.query": (LAYER + "self_attn.q_proj",),
    "layers.query_key": (LAYER + "self_attn.q_proj", LAYER + "self_attn.k_proj"),
}
_UNUSED = r"layers\.{layer}\.self_attn\.(k_proj|v_proj|k_norm)\.weight"


_EXPERT = LAYER + "experts.{expert}."
_STACKED = frozenset({"layers.experts.gate_up", "layers.experts.down"})
_MIXTURE = {
    "layers.router": (LAYER + "router.proj",),
    "layers.router.norm": (LAYER + "router.scale",),
    "layers.router.scales": (LAYER + "router.per_expert_scale",),
    "layers.experts.norm": (LAYER + "pre_feedforward_layernorm_2",),
    "layers.experts.gate_up": (LAYER + "experts.gate_up_proj",),
    "layers.experts.down": (LAYER + "experts.down_proj",),
    "layers.experts.post_norm": (LAYER + "post_feedforward_layernorm_2",),
    "layers.shared.norm": (LAYER + "pre_feedforward_layernorm",),
    "layers.shared.gate_up": MLP_NAMES["layers.gate_up"],
    "layers.shared.down": MLP_NAMES["layers.down"],
    "layers.shared.post_norm": (LAYER + "post_feedforward_layernorm_1",),
}


def _names(spec: DecoderSpec) -> WeightNames:
    """Some checkpoints hold keys and values of layers that use another's."""
    sharing = [i for i, held in enumerate(_attentions(spec)) if held.shares_cache_of is not None]
    return WeightNames(
        {
            **GEMMA_NAMES.modules,
            **_PRODUCTS,
            **_MIXTURE,
            "layers.scalar": (LAYER + "layer_scalar",),
            "layers.per_layer.gate": (LAYER + "per_layer_input_gate",),
            "layers.per_layer.output": (LAYER + "per_layer_projection",),
            "layers.per_layer.norm": (LAYER + "post_per_layer_input_norm",),
            "per_layer.embedding": ("model.embed_tokens_per_layer",),
            "per_layer.product": ("model.per_layer_model_projection",),
            "per_layer.norm": ("model.per_layer_projection_norm",),
        },
        sliced=_STACKED,
        apart={
            "layers.experts.gate_up": (_EXPERT + "gate_proj", _EXPERT + "up_proj"),
            "layers.experts.down": (_EXPERT + "down_proj",),
        },
        ignored=tuple(_UNUSED.replace("{layer}", str(layer)) for layer in sharing),
    )


def _attentions(spec: DecoderSpec) -> list[AttentionSpec]:
    held = [layer.attention for layer in spec.layers]
    return [attention for attention in held if isinstance(attention, AttentionSpec)]


def _kinds(config: HfConfig, num_layers: int) -> list[str]:
    """The last layer has no window, whatever is said of it."""
    given = config.layer_kinds(num_layers, (_FULL, _SLIDING))
    default = [_SLIDING if (layer + 1) % _EVERY else _FULL for layer in range(num_layers)]
    return [*(given or default)[:-1], _FULL]


def _override(config: HfConfig, layer: int) -> HfConfig:
    """What ``per_layer_config`` says of a layer, as transformers 5 writes it."""
    layers = config.values.get("per_layer_config") or {}
    is_table = isinstance(layers, dict) and all(str(index).isdecimal() for index in layers)
    # Numbers are written with leading zeros.
    held = {int(index): given for index, given in layers.items()} if is_table else {layer: None}
    given: Any = held.get(layer, {})
    if not isinstance(given, dict):
        raise ModelLoadError(
            f"{config.source}: per_layer_config must hold an object for each of some layers, "
            f"got {layers!r}"
        )
    known = ("head_dim", "num_key_value_heads")
    for name in given:
        if name not in known:
            raise UnsupportedModelError(
                f"{config.source}: per_layer_config: {name} that differs by layer is not "
                f"supported; these are: {', '.join(known)}"
            )
    return HfConfig(given, f"{config.source}: per_layer_config")


def _attention(
    config: HfConfig, norm: NormSpec, kinds: list[str], layer: int, window: int
) -> AttentionSpec:
    is_full = kinds[layer] == _FULL
    head_size = config.integer_or(256, "head_dim")
    num_kv_heads = config.integer_or(4, "num_key_value_heads")
    own_values = not (is_full and config.flag_or(False, "attention_k_eq_v"))
    if "per_layer_config" in config.values:
        override = _override(config, layer)
        head_size = override.integer_or(head_size, "head_dim")
        num_kv_heads = override.integer_or(num_kv_heads, "num_key_value_heads")
    elif is_full:
        head_size = config.integer_or(_GLOBAL_HEAD_SIZE, "global_head_dim")
        if not own_values:
            num_kv_heads = config.integer_or(num_kv_heads, "num_global_key_value_heads")
    bias = config.flag_or(False, "attention_bias")
    return AttentionSpec(
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=num_kv_heads,
        query_key_head_size=head_size,
        value_head_size=head_size,
        scale=1.0,
        window=None if is_full else window,
        rope=layer_rope(config, kinds[layer], head_size, _ROPES),
        qk_norm=QkNormSpec(norm),
        qkv_bias=bias,
        output_bias=bias,
        value_norm=norm,
        values_are_keys=not own_values,
        shares_cache_of=_shared(config, kinds, layer),
    )


def _shared(config: HfConfig, kinds: list[str], layer: int) -> int | None:
    """The layer whose keys and values this one uses: the last of its kind that has its own."""
    first = _first_sharing(config, len(kinds))
    if layer < first:
        return None
    own = [before for before in range(first) if kinds[before] == kinds[layer]]
    if not own:
        raise ModelLoadError(
            f"{config.source}: layer {layer} shares keys and values of {kinds[layer]}, and no "
            f"layer before {first} has such"
        )
    return own[-1]


def _first_sharing(config: HfConfig, num_layers: int) -> int:
    return num_layers - config.integer_or(0, "num_kv_shared_layers", minimum=0)


def _gemma4(
    config: HfConfig, default_window: int = 512, default_per_layer: int | None = 256
) -> DecoderSpec:
    _refuse(config)
    num_layers = config.integer("num_hidden_layers")
    hidden_size = config.integer("hidden_size")
    kinds = _kinds(config, num_layers)
    norm = NormSpec("rms_norm", config.number_or(1e-6, "rms_norm_eps"))
    activation = config.activation_or("gelu_tanh", "hidden_activation")
    size = config.optional_integer(
        "hidden_size_per_layer_input", minimum=0, default=default_per_layer
    )
    if size:
        _check_table(config)
    intermediate_size = config.integer("intermediate_size")
    window = config.integer_or(default_window, "sliding_window")
    is_double = config.flag_or(False, "use_double_wide_mlp")
    experts = None
    if config.flag_or(False, "enable_moe_block"):
        experts = _experts(config, norm, activation)

    def mlp(layer: int) -> MlpSpec | ExpertsSpec:
        is_sharing = layer >= _first_sharing(config, num_layers)
        width = intermediate_size * (2 if is_double and is_sharing else 1)
        plain = MlpSpec(width, activation, gated=True)
        return plain if experts is None else replace(experts, shared=plain)

    layers = tuple(
        LayerSpec(
            attention=_attention(config, norm, kinds, layer, window),
            mlp=mlp(layer),
            attention_norm=norm,
            mlp_norm=norm if experts is None else None,
            attention_post_norm=norm,
            mlp_post_norm=norm,
            per_layer=PerLayerSpec(size, activation, norm) if size else None,
            scaled=True,
        )
        for layer in range(num_layers)
    )
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=layers,
        final_norm=norm,
        embedding_scale=hidden_size**0.5,
        tied_head=config.flag_or(True, "tie_word_embeddings"),
        logit_soft_cap=config.optional_number(None, "final_logit_softcapping"),
    )


def _experts(config: HfConfig, norm: NormSpec, activation: Activation) -> ExpertsSpec:
    """Beside the MLP: each part norms what it is given."""
    return ExpertsSpec(
        num_experts=config.integer("num_experts"),
        top_k=config.integer("top_k_experts"),
        intermediate_size=config.integer("moe_intermediate_size"),
        activation=activation,
        router=RouterSpec(expert_scales=True),
        shared_gate=False,
        own_norms=norm,
    )


def _refuse(config: HfConfig) -> None:
    """Of "vision" and null a text sees what stands before it."""
    looks = config.values.get("use_bidirectional_attention")
    if looks not in (None, "vision"):
        raise UnsupportedModelError(
            f"{config.source}: use_bidirectional_attention {looks!r} is not supported: a decoder "
            "looks back"
        )


def _check_table(config: HfConfig) -> None:
    vocab_size = config.integer("vocab_size")
    of_layers = config.integer_or(vocab_size, "vocab_size_per_layer_input")
    if of_layers != vocab_size:
        raise UnsupportedModelError(
            f"{config.source}: vocab_size_per_layer_input {of_layers} is not supported: it must be "
            f"vocab_size, {vocab_size}"
        )


def _max_positions(config: HfConfig, default: int = 131_072) -> int:
    return config.integer_or(default, "max_position_embeddings")


FAMILIES = (
    Family(
        architecture="Gemma4ForCausalLM",
        model_type="gemma4_text",
        series="Gemma",
        title="Gemma 4 (text)",
        spec=_gemma4,
        max_positions=_max_positions,
        names=_names,
    ),
    Family(
        architecture="Gemma4UnifiedForCausalLM",
        model_type="gemma4_unified_text",
        series="Gemma",
        title="Gemma 4 unified (text)",
        spec=lambda config: _gemma4(config, default_window=1024, default_per_layer=None),
        max_positions=lambda config: _max_positions(config, 262_144),
        names=_names,
    ),
)
