"""HunYuan: Llama with norms of queries and keys behind their rotation, and its mixture, A13B."""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import family
from streamserve.models.families.llama import (
    ATTENTION_NAMES,
    LAYER,
    MLP_NAMES,
    gated_mlp,
    rotary_decoder,
)
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import (
    DecoderSpec,
    ExpertsSpec,
    MlpSpec,
    QkNormSpec,
    RopeSpec,
    replace_attentions,
)

NAMES = WeightNames(
    {
        **ATTENTION_NAMES,
        **MLP_NAMES,
        "layers.q_norm": (LAYER + "self_attn.query_layernorm",),
        "layers.k_norm": (LAYER + "self_attn.key_layernorm",),
    },
)


_EXPERT = LAYER + "mlp.experts.{expert}."
_SHARED = LAYER + "mlp.shared_mlp."
MOE_NAMES = replace(
    NAMES,
    modules={
        **NAMES.modules,
        "layers.router": (LAYER + "mlp.gate.wg",),
        "layers.experts.gate_up": (_EXPERT + "gate_proj", _EXPERT + "up_proj"),
        "layers.experts.down": (_EXPERT + "down_proj",),
        "layers.shared.gate_up": (_SHARED + "gate_proj", _SHARED + "up_proj"),
        "layers.shared.down": (_SHARED + "down_proj",),
    },
)


def _rope(config: HfConfig, head_size: int) -> RopeSpec:
    """What they call dynamic, and give an ``alpha``, is a larger base for every length."""
    rope = config.rope(head_size)
    given = config.values.get("rope_scaling") or config.values.get("rope_parameters") or {}
    alpha = HfConfig(given, f"{config.source}: rope").number_or(0.0, "alpha")
    if not alpha or rope.scaling is None or rope.scaling.kind != "dynamic":
        return rope
    return replace(rope, base=rope.base * alpha ** (head_size / (head_size - 2)), scaling=None)


def _decoder(config: HfConfig, mlp: MlpSpec | ExpertsSpec) -> DecoderSpec:
    hidden_size = config.integer("hidden_size")
    head_size = config.head_size(hidden_size, config.integer("num_attention_heads"))
    bias = config.flag_or(False, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=(None,) * config.integer("num_hidden_layers"),
        mlp=mlp,
        default_eps=1e-5,
        rope=_rope(config, head_size),
        qkv_bias=bias,
        output_bias=bias,
    )
    assert spec.final_norm is not None
    norm = QkNormSpec(spec.final_norm, rotates_first=True)
    return replace_attentions(spec, qk_norm=norm)


def _dense(config: HfConfig) -> DecoderSpec:
    return _decoder(config, gated_mlp(config))


def _of_all_layers(config: HfConfig, name: str) -> HfConfig:
    """The same with one number in the place of a list of equal ones, one for each layer."""
    listed = config.values.get(name)
    if not isinstance(listed, list):
        return config
    if not listed or listed.count(listed[0]) < len(listed):
        raise UnsupportedModelError(
            f"{config.source}: {name} must be the same in all layers, got {listed!r}"
        )
    return HfConfig({**config.values, name: listed[0]}, config.source)


def _mixture(config: HfConfig) -> DecoderSpec:
    for name in ("num_experts", "moe_topk", "moe_intermediate_size"):
        config = _of_all_layers(config, name)
    mlp = gated_mlp(config)
    size = config.integer_or(mlp.intermediate_size, "moe_intermediate_size")
    if size != mlp.intermediate_size:
        raise UnsupportedModelError(
            f"{config.source}: moe_intermediate_size {size} must be intermediate_size "
            f"{mlp.intermediate_size} for this architecture"
        )
    experts = ExpertsSpec(
        num_experts=config.integer_or(1, "num_experts"),
        top_k=config.integer_or(1, "moe_topk", "num_experts_per_tok"),
        intermediate_size=size,
        activation=mlp.activation,
        shared=mlp,
        shared_gate=False,
    )
    return _decoder(config, experts)


FAMILIES = (
    family(
        "HunYuanDenseV1ForCausalLM",
        "hunyuan_v1_dense",
        "HunYuan",
        "HunYuan 0.5B, 1.8B, 4B, 7B",
        _dense,
        2048,
        NAMES,
    ),
    family(
        "HunYuanMoEV1ForCausalLM",
        "hunyuan_v1_moe",
        "HunYuan",
        "HunYuan A13B",
        _mixture,
        2048,
        MOE_NAMES,
    ),
)
