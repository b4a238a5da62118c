"""The second half of a block: an MLP, or experts, bound to its weights and kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from torch import Tensor

from streamserve.errors import UnsupportedModelError
from streamserve.models.layers import bind_norm
from streamserve.models.spec import ExpertActivation, ExpertsSpec, MlpSpec, NormSpec
from streamserve.models.weights import NormWeights, Weights
from streamserve_kernels import ExpertKind, GatedKind, Kernels, PackedLinear
from streamserve_kernels.routing import Routing

Part = Callable[[Tensor], Tensor]
"""[T, H] -> [T, H]."""


def bind_mlp(
    spec: MlpSpec | ExpertsSpec,
    weights: Weights,
    kernels: Kernels,
    add_up: Part | None = None,
) -> Part:
    """The MLP or experts as one function. ``add_up`` makes of what a rank found what all did."""
    if not isinstance(spec, ExpertsSpec):
        return _added_up(_bind_plain(spec, weights, kernels, "layers."), add_up)
    if spec.own_norms is not None:
        return _bind_normed(spec, spec.own_norms, weights, kernels, add_up)
    return _added_up(_bind_mixture(spec, weights, kernels), add_up)


def _added_up(part: Part, add_up: Part | None) -> Part:
    return part if add_up is None else lambda x: add_up(part(x))


def _bind_mixture(spec: ExpertsSpec, weights: Weights, kernels: Kernels) -> Part:
    experts = _bind_experts(spec, weights, kernels)
    if spec.shared is None:
        return lambda x: experts(x, x)
    shared = _bind_plain(spec.shared, weights, kernels, "layers.shared.")
    if not spec.shared_gate:
        return lambda x: experts(x, x) + shared(x)
    gate, add_shared_experts = weights.tensors["layers.shared.gate"], kernels.add_shared_experts
    return lambda x: add_shared_experts(experts(x, x), x, gate, shared(x))


def _bind_normed(
    spec: ExpertsSpec, norm: NormSpec, weights: Weights, kernels: Kernels, add_up: Part | None
) -> Part:
    """Of the sum so far: each part norms that itself, and what it found."""

    def bound(name: str) -> Part:
        return bind_norm(norm, weights.norms[name], kernels).norm

    assert spec.shared is not None
    scales = weights.tensors["layers.router.norm"]
    router_weights = NormWeights(scales * scales.shape[0] ** -0.5, None)
    router_norm = bind_norm(norm, router_weights, kernels).norm
    experts_norm, shared_norm = bound("layers.experts.norm"), bound("layers.shared.norm")
    of_experts, of_shared = bound("layers.experts.post_norm"), bound("layers.shared.post_norm")
    chosen = _bind_experts(spec, weights, kernels)
    experts = _added_up(lambda x: chosen(experts_norm(x), router_norm(x)), add_up)
    shared = _added_up(_bind_plain(spec.shared, weights, kernels, "layers.shared."), add_up)
    return lambda x: of_experts(experts(x)) + of_shared(shared(shared_norm(x)))


def _bind_plain(spec: MlpSpec, weights: Weights, kernels: Kernels, prefix: str) -> Part:
    down = weights.linears[prefix + "down"]
    if spec.gated:
        gate_up, kind = weights.linears[prefix + "gate_up"], _gated_kind(spec.activation)
        gated_activation = kernels.gated_activation
        if (spec.gate_scale, spec.output_scale) != (1.0, 1.0):
            return _bind_scaled(spec, gate_up, down, kernels)

        def gated(x: Tensor) -> Tensor:
            return down(gated_activation(gate_up(x), kind))

        return gated
    up, plain_kind, activation = weights.linears[prefix + "up"], spec.activation, kernels.activation

    def plain(x: Tensor) -> Tensor:
        return down(activation(up(x), plain_kind))

    return plain


def _bind_scaled(
    spec: MlpSpec, gate_up: PackedLinear, down: PackedLinear, kernels: Kernels
) -> Part:
    sizes, kind = (spec.intermediate_size,) * 2, spec.activation
    gate_scale, output_scale, activation = spec.gate_scale, spec.output_scale, kernels.activation

    def scaled(x: Tensor) -> Tensor:
        gate, up = gate_up(x).split_with_sizes(sizes, 1)
        return down(activation(gate * gate_scale, kind) * up) * output_scale

    return scaled


def _bind_experts(
    spec: ExpertsSpec, weights: Weights, kernels: Kernels
) -> Callable[[Tensor, Tensor], Tensor]:
    """Of what the experts are given and what their router is."""
    router, moe, kind = weights.linears["layers.router"], kernels.moe, _expert_kind(spec)
    gate_up, down = weights.expert_gate_up, weights.expert_down
    rule = spec.router
    routing = Routing(
        spec.top_k,
        spec.renormalise,
        rule.scoring,
        weights.tensors["layers.router.correction"] if rule.correction else None,
        rule.num_groups,
        rule.top_groups,
        rule.eps,
        rule.scale,
        rule.group_votes,
        weights.tensors["layers.router.scales"] if rule.expert_scales else None,
    )

    def experts(x: Tensor, routed: Tensor) -> Tensor:
        return moe(x, router(routed), gate_up, down, routing, kind)

    return experts


def _expert_kind(spec: ExpertsSpec) -> ExpertKind:
    if spec.gated:
        return _gated_kind(spec.activation)
    if spec.activation == "relu2":
        return "relu2"
    raise UnsupportedModelError(
        f"experts without gates with activation {spec.activation!r} are not supported; "
        "these are: relu2"
    )


def _gated_kind(activation: ExpertActivation) -> GatedKind:
    """Both tanh forms of GELU are one formula; the kernels gate with one name for it."""
    name = "gelu_tanh" if activation == "gelu_new" else activation
    for kind in get_args(GatedKind):
        if kind == name:
            known: GatedKind = kind
            return known
    raise UnsupportedModelError(
        f"a gated MLP with activation {activation!r} is not supported; "
        f"these are: {', '.join(get_args(GatedKind))}"
    )
