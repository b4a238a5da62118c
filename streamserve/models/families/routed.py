"""Mixtures whose routers are those of DeepSeek's third generation (DeepSeek-AI 2024).

What several families took over of them: scores by sigmoid, corrected for the choice alone, and
experts chosen from the best groups; one MLP beside them that every token goes to, without a gate;
the first layers plain.
"""

from __future__ import annotations

from dataclasses import replace

from streamserve.errors import ModelLoadError
from streamserve.models.families.llama import ATTENTION_NAMES, LAYER, MLP_NAMES
from streamserve.models.hf_config import HfConfig
from streamserve.models.names import WeightNames
from streamserve.models.spec import Activation, DecoderSpec, ExpertsSpec, MlpSpec, RouterSpec

_EXPERT = LAYER + "mlp.experts.{expert}."
_SHARED = LAYER + "mlp.shared_experts."
EXPERT_NAMES = {
    "layers.router": (LAYER + "mlp.gate",),
    "layers.experts.gate_up": (_EXPERT + "gate_proj", _EXPERT + "up_proj"),
    "layers.experts.down": (_EXPERT + "down_proj",),
    "layers.shared.gate_up": (_SHARED + "gate_proj", _SHARED + "up_proj"),
    "layers.shared.down": (_SHARED + "down_proj",),
}
ROUTED_NAMES = {
    **EXPERT_NAMES,
    "layers.router.correction": (LAYER + "mlp.gate.e_score_correction_bias",),
}
NAMES = WeightNames({**ATTENTION_NAMES, **MLP_NAMES, **ROUTED_NAMES})

_APART = ("layers.experts.gate_up", "layers.experts.down")
# Of checkpoints that may keep all experts of a layer in one tensor.
ONE_TENSOR_NAMES = replace(
    NAMES,
    modules={
        **NAMES.modules,
        "layers.experts.gate_up": (LAYER + "mlp.experts.gate_up_proj",),
        "layers.experts.down": (LAYER + "mlp.experts.down_proj",),
    },
    sliced=frozenset(_APART),
    apart={module: NAMES.modules[module] for module in _APART},
)


def routed_experts(
    config: HfConfig,
    *,
    num_experts: int,
    top_k: int,
    intermediate_size: int,
    num_shared: int,
    renormalise: bool,
    default_groups: tuple[int, int] = (1, 1),
    default_scale: float = 1.0,
) -> ExpertsSpec:
    """``default_groups``: how many, and of how many of them experts are chosen.

    Raises ModelLoadError for groups that there cannot be.
    """
    num_groups = config.integer_or(default_groups[0], "n_group")
    top_groups = config.integer_or(default_groups[1], "topk_group")
    size = num_experts // num_groups
    if num_groups > 1 and (
        num_experts % num_groups or size < 2 or not top_k / size <= top_groups <= num_groups
    ):
        raise ModelLoadError(
            f"{config.source}: n_group {num_groups} and topk_group {top_groups} must be groups of "
            f"{num_experts} experts, at least two in each, of which some hold the {top_k} that a "
            "token goes to"
        )
    activation = config.activation_or("silu", "hidden_act")
    return ExpertsSpec(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=intermediate_size,
        activation=activation,
        renormalise=renormalise,
        router=RouterSpec(
            scoring="sigmoid",
            correction=True,
            num_groups=num_groups,
            top_groups=min(top_groups, num_groups),
            eps=1e-20 if renormalise else 0.0,
            scale=config.number_or(default_scale, "routed_scaling_factor"),
        ),
        shared=shared_mlp(num_shared * intermediate_size, activation),
        shared_gate=False,
    )


def shared_mlp(size: int, activation: Activation) -> MlpSpec | None:
    """None of no size."""
    return MlpSpec(size, activation, gated=True) if size else None


def with_experts(spec: DecoderSpec, experts: ExpertsSpec, layers: range) -> DecoderSpec:
    """The same, with experts in some layers."""
    mixed = tuple(
        replace(layer, mlp=experts) if index in layers else layer
        for index, layer in enumerate(spec.layers)
    )
    return replace(spec, layers=mixed)
