"""gpt-oss: windows in turns, a sink for each head, biased experts behind a clamped gate.

All experts of a layer lie in one tensor, gates and ups in turns, and are published in MXFP4.
"""

from __future__ import annotations

from streamserve.errors import UnsupportedModelError
from streamserve.models.families.family import Family
from streamserve.models.families.llama import ATTENTION_NAMES, LAYER, rotary_decoder
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import DecoderSpec, ExpertsSpec, replace_attentions

_EXPERTS = frozenset({"layers.experts.gate_up", "layers.experts.down"})
NAMES = WeightNames(
    {
        **ATTENTION_NAMES,
        "layers.sinks": (LAYER + "self_attn.sinks",),
        "layers.router": (LAYER + "mlp.router",),
        "layers.experts.gate_up": (LAYER + "mlp.experts.gate_up_proj",),
        "layers.experts.down": (LAYER + "mlp.experts.down_proj",),
    },
    transposed=_EXPERTS,
    sliced=_EXPERTS,
    interleaved=frozenset({"layers.experts.gate_up"}),
)
_CLAMPED = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}


def _experts(config: HfConfig) -> ExpertsSpec:
    for name, built in _CLAMPED.items():
        value = config.number_or(built, name)
        if value != built:
            raise UnsupportedModelError(
                f"{config.source}: {name} {value} is not supported; it must be {built}"
            )
    return ExpertsSpec(
        num_experts=config.integer("num_local_experts", "num_experts"),
        top_k=config.integer_or(4, "num_experts_per_tok", "experts_per_token"),
        intermediate_size=config.integer("intermediate_size"),
        activation="clamped_swiglu",
        # A softmax of the chosen ones' logits is the softmax of all, scaled to sum to 1.
        renormalise=True,
        bias=True,
        router_bias=True,
    )


def _windows(config: HfConfig) -> tuple[int | None, ...]:
    num_layers = config.integer("num_hidden_layers")
    window = config.optional_integer("sliding_window", default=128)
    if config.values.get("layer_types") is not None:
        return config.layer_windows(num_layers, window)
    return tuple(None if layer % 2 else window for layer in range(num_layers))


def _spec(config: HfConfig) -> DecoderSpec:
    head_size = config.integer_or(64, "head_dim")
    bias = config.flag_or(True, "attention_bias")
    spec = rotary_decoder(
        config,
        windows=_windows(config),
        mlp=_experts(config),
        default_kv_heads=8,
        default_eps=1e-5,
        head_size=head_size,
        rope=config.rope(head_size, default_theta=150_000.0, default_context=131_072),
        qkv_bias=bias,
        output_bias=bias,
    )
    return replace_attentions(spec, sinks=True)


FAMILIES = (
    Family(
        architecture="GptOssForCausalLM",
        model_type="gpt_oss",
        series="gpt-oss",
        title="gpt-oss",
        spec=_spec,
        max_positions=lambda config: config.integer_or(131_072, "max_position_embeddings"),
        names=NAMES,
        end_tokens=("<|return|>", "<|call|>"),
    ),
)
