"""Qwen's hybrids: three layers of a gated delta net, then one of attention whose heads have gates.

Qwen 3-Next has experts and keeps what goes into a delta net in two products, key head by key head;
Qwen 3.5 has it in four, each whole, and comes with and without experts.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.models.families.family import Family
from streamserve.models.families.llama import LAYER, gated_mlp
from streamserve.models.families.mtp import PREFIX, mtp_layers
from streamserve.models.families.qwen_moe import NAMES as MIXTURE_NAMES
from streamserve.models.families.qwen_moe import experts, some_plain
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import (
    AttentionSpec,
    DecoderSpec,
    DeltaNetSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    QkNormSpec,
)

_DELTA = LAYER + "linear_attn."
_EXPERTS = LAYER + "mlp.experts."
# Layers that guess further tokens are a head of their own.
_SKIPPED = (PREFIX,)
_NEXT_NAMES = WeightNames(
    {
        **MIXTURE_NAMES.modules,
        "layers.delta.qkvz": (_DELTA + "in_proj_qkvz",),
        "layers.delta.gates": (_DELTA + "in_proj_ba",),
        "layers.delta.conv": (_DELTA + "conv1d",),
        "layers.delta.decay": (_DELTA + "A_log",),
        "layers.delta.time_bias": (_DELTA + "dt_bias",),
        "layers.delta.norm": (_DELTA + "norm",),
        "layers.delta.output": (_DELTA + "out_proj",),
    },
    qkv_layout="gated",
    delta_layout="grouped",
    skipped=_SKIPPED,
)
NAMES = replace(
    _NEXT_NAMES,
    modules={
        **_NEXT_NAMES.modules,
        "layers.delta.qkvz": (_DELTA + "in_proj_qkv", _DELTA + "in_proj_z"),
        "layers.delta.gates": (_DELTA + "in_proj_b", _DELTA + "in_proj_a"),
        "layers.experts.gate_up": (_EXPERTS + "gate_up_proj",),
        "layers.experts.down": (_EXPERTS + "down_proj",),
    },
    delta_layout="stacked",
    # Of a whole checkpoint, saved again with its text's config alone.
    renamed=(("model.language_model.", "model."),),
    skipped=(*_SKIPPED, "model.visual."),
    sliced=frozenset({"layers.experts.gate_up", "layers.experts.down"}),
    apart={
        name: MIXTURE_NAMES.modules[name]
        for name in ("layers.experts.gate_up", "layers.experts.down")
    },
)
_KINDS = ("linear_attention", "full_attention")


def _delta_net(config: HfConfig, eps: float) -> DeltaNetSpec:
    config.require_silu()
    return DeltaNetSpec(
        num_key_heads=config.integer_or(16, "linear_num_key_heads"),
        num_value_heads=config.integer_or(32, "linear_num_value_heads"),
        key_head_size=config.integer_or(128, "linear_key_head_dim"),
        value_head_size=config.integer_or(128, "linear_value_head_dim"),
        conv_width=config.integer_or(4, "linear_conv_kernel_dim", minimum=2),
        norm=NormSpec("rms_norm", eps),
    )


def _attention(config: HfConfig, norm: NormSpec, default_kv_heads: int) -> AttentionSpec:
    size = config.integer_or(256, "head_dim")
    bias = config.flag_or(False, "attention_bias")
    return AttentionSpec(
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=config.integer_or(default_kv_heads, "num_key_value_heads"),
        query_key_head_size=size,
        value_head_size=size,
        scale=size**-0.5,
        rope=config.rope(size, default_partial=0.25, default_context=32_768),
        qk_norm=QkNormSpec(norm),
        qkv_bias=bias,
        output_bias=bias,
        output_gate=True,
    )


def _decoder(
    config: HfConfig, mlp: MlpSpec | ExpertsSpec, default_kv_heads: int = 2
) -> DecoderSpec:
    num_layers = config.integer("num_hidden_layers")
    kinds = config.layer_kinds(num_layers, _KINDS)
    if kinds is None:
        every = config.integer_or(4, "full_attention_interval")
        kinds = tuple(_KINDS[(layer + 1) % every == 0] for layer in range(num_layers))
    eps = config.number_or(1e-6, "rms_norm_eps")
    norm = NormSpec("rms_norm", eps, weight_offset=1.0)
    attention, delta_net = _attention(config, norm, default_kv_heads), _delta_net(config, eps)
    layers = {
        kind: LayerSpec(
            attention=attention if kind == "full_attention" else delta_net,
            mlp=mlp,
            attention_norm=norm,
            mlp_norm=norm,
        )
        for kind in _KINDS
    }
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        layers=tuple(layers[kind] for kind in kinds),
        final_norm=norm,
        tied_head=config.flag_or(False, "tie_word_embeddings"),
    )


def _mixture(config: HfConfig, default_top_k: int, *, renormalise: bool) -> ExpertsSpec:
    shared_size = config.integer_or(512, "shared_expert_intermediate_size")
    found = experts(config, default_top_k=default_top_k, shared_size=shared_size)
    return replace(found, renormalise=renormalise)


def _next(config: HfConfig) -> DecoderSpec:
    renormalise = config.flag_or(True, "norm_topk_prob")
    return some_plain(config, _decoder(config, _mixture(config, 10, renormalise=renormalise)))


def _dense(config: HfConfig) -> DecoderSpec:
    return _decoder(config, gated_mlp(config), default_kv_heads=4)


def _moe(config: HfConfig) -> DecoderSpec:
    return _decoder(config, _mixture(config, 8, renormalise=True))


FAMILIES = tuple(
    Family(
        architecture=architecture,
        model_type=model_type,
        series="Qwen",
        title=title,
        spec=spec,
        max_positions=lambda config: config.integer_or(32_768, "max_position_embeddings"),
        names=names,
        mtp=mtp_layers,
    )
    for architecture, model_type, title, spec, names in (
        ("Qwen3NextForCausalLM", "qwen3_next", "Qwen 3-Next", _next, _NEXT_NAMES),
        ("Qwen3_5ForCausalLM", "qwen3_5_text", "Qwen 3.5", _dense, NAMES),
        ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", "Qwen 3.5 MoE", _moe, NAMES),
    )
)
