"""What a decoder is, as data: one frozen tree that a family writes and the decoder reads.

A family differs from another along few axes. Each axis is a field here; none is a subclass. Sizes
are in elements, windows and positions in tokens.

    DecoderSpec
    ├── embedding, learned positions, embedding norm and scale; or, of a draft head, a JoinSpec or
    │   a FusionSpec
    ├── layers: tuple[LayerSpec]          one per layer, so that layers may differ
    │   ├── AttentionSpec                 heads, window, rope, qk-norm, biases, sinks, soft cap; or
    │   │                                 by latents (LatentSpec)
    │   │   or DeltaNetSpec, StateSpaceSpec, ShortConvSpec     a state of constant size instead
    │   ├── MlpSpec | ExpertsSpec         with a RouterSpec
    │   ├── norms before and after each half; sequential or parallel residual
    │   └── PerLayerSpec                  a part of its own of each token's embedding
    └── final norm, head (tied or not), logit scale and soft cap
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from streamserve.models.mixing_spec import (
    LATENT_NORM,
    AttentionSpec,
    CacheSpec,
    DeltaNetSpec,
    LatentSpec,
    MixingSpec,
    NormKind,
    NormSpec,
    QkNormSpec,
    QueryScaleKind,
    QueryScaleSpec,
    ShortConvSpec,
    SideBySideSpec,
    StateSpaceSpec,
    held_by,
    parts_of,
)
from streamserve.models.rope_spec import RopeScaling, RopeScalingKind, RopeSpec

__all__ = [
    "LATENT_NORM",
    "Activation",
    "AttentionSpec",
    "CacheSpec",
    "DecoderSpec",
    "DeltaNetSpec",
    "ExpertActivation",
    "ExpertsSpec",
    "FusionSpec",
    "JoinSpec",
    "LatentSpec",
    "LayerSpec",
    "MixingSpec",
    "MlpSpec",
    "NormKind",
    "NormSpec",
    "PerLayerSpec",
    "QkNormSpec",
    "QueryScaleKind",
    "QueryScaleSpec",
    "Residual",
    "RopeScaling",
    "RopeScalingKind",
    "RopeSpec",
    "RouterSpec",
    "Scoring",
    "ShortConvSpec",
    "SideBySideSpec",
    "StateSpaceSpec",
    "TapNorm",
    "head_sizes",
    "parts_of",
    "replace_attention",
    "replace_attentions",
    "used_share",
]

Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_new", "relu", "relu2", "quick_gelu"]
ExpertActivation = Activation | Literal["clamped_swiglu"]
Residual = Literal["sequential", "parallel"]
Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """``down(act(gate(x)) * up(x))`` when gated, else ``down(act(up(x)))``.

    ``gate_scale`` multiplies the gate before it is activated, ``output_scale`` what comes out.
    """

    intermediate_size: int
    activation: Activation
    gated: bool
    bias: bool = False
    gate_scale: float = 1.0
    output_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """What a router's logits count for beside their order: see `streamserve_kernels.routing`.

    ``correction``: it has a bias for each expert that counts for the choice alone. ``num_groups``
    stretches of experts are ``top_groups`` chosen from, by the best ``group_votes`` experts of each
    (one or two). ``eps`` is added to the sum that weights are divided by; ``scale`` multiplies, and
    with ``expert_scales`` a number of each expert's.
    """

    scoring: Scoring = "softmax"
    correction: bool = False
    num_groups: int = 1
    top_groups: int = 1
    eps: float = 0.0
    scale: float = 1.0
    group_votes: int = 2
    expert_scales: bool = False


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """Gated experts; each token goes to the ``top_k`` that its router gives the highest scores.

    With ``gated`` false each is a plain MLP, of ``relu2`` then. ``bias`` is that of the experts,
    ``router_bias`` the router's. ``shared`` is an MLP that every token goes to besides; with
    ``shared_gate`` times the sigmoid of a gate of its own. With ``own_norms`` there is none before
    them: the router, the experts and the shared MLP each norm what they are given (the router's is
    divided by the root of its size), and the latter two what they find.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    activation: ExpertActivation
    renormalise: bool = True
    router: RouterSpec = RouterSpec()
    bias: bool = False
    router_bias: bool = False
    shared: MlpSpec | None = None
    shared_gate: bool = True
    own_norms: NormSpec | None = None
    gated: bool = True


@dataclass(frozen=True, slots=True)
class PerLayerSpec:
    """What a layer is given of a token besides: ``size`` elements of a table that is all layers'.

    To them is added, normed, a product of the token's embedding. When both halves are done, a gate
    of the hidden state multiplies them; the product of that is normed and added.
    """

    size: int
    activation: Activation
    norm: NormSpec


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One block.

    ``attention_norm`` and ``mlp_norm`` come before their half, the ``*_post_norm`` after it and
    before the residual is added. In a parallel block both halves read the same input; with
    ``mlp_norm=None`` they share the attention's normed input. ``residual_scale`` multiplies what
    each half adds. With ``scaled`` a number of the checkpoint's multiplies what the block leaves.
    A block may be one half alone, the other None: then with the norm before it, and nothing else.
    """

    attention: MixingSpec | None
    mlp: MlpSpec | ExpertsSpec | None
    attention_norm: NormSpec | None
    mlp_norm: NormSpec | None
    attention_post_norm: NormSpec | None = None
    mlp_post_norm: NormSpec | None = None
    residual: Residual = "sequential"
    residual_scale: float = 1.0
    per_layer: PerLayerSpec | None = None
    scaled: bool = False


def replace_attention(layer: LayerSpec, **changes: Any) -> LayerSpec:
    """A layer that attends, with other values of its `AttentionSpec`."""
    assert isinstance(layer.attention, AttentionSpec)
    return replace(layer, attention=replace(layer.attention, **changes))


@dataclass(frozen=True, slots=True)
class JoinSpec:
    """What a draft head makes its layers' input of: one product of two rows side by side.

    They are a token's embedding and a hidden state, each after a ``norm`` of its own.
    """

    norm: NormSpec


TapNorm = Literal["each", "all"]


@dataclass(frozen=True, slots=True)
class FusionSpec:
    """What an EAGLE-3 head makes its first layer's input of.

    One product of ``num_taps`` hidden states of the target, each of ``target_size``, is the hidden
    state that it goes on from; ``tap_norm`` says what of these is normed before, if anything. The
    first layer attends by a token's embedding and that, each after a norm of its own and one beside
    the other, and adds to the latter: normed, with ``norms_residual``. ``feeds_normed``: behind a
    guess it goes on from what its head was given, instead of the sum before the final norm. It has
    an embedding of the target's ``vocab_size`` tokens with ``own_embedding``.
    """

    norm: NormSpec
    target_size: int
    num_taps: int
    vocab_size: int
    tap_norm: TapNorm | None = None
    norms_residual: bool = False
    feeds_normed: bool = False
    own_embedding: bool = False


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A whole decoder-only language model. ``logit_scale`` multiplies, then the soft cap bounds.

    ``learned_positions`` are the rows of a table that is added to the embedding, one per position:
    the first position's is row ``position_offset``.
    With ``normalised_head`` each row of the head is divided by its length (Baichuan 2). With
    ``join`` it is a draft head: its embedding is another's, and so is its head where that is tied.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    learned_positions: int | None = None
    position_offset: int = 0
    embedding_scale: float = 1.0
    embedding_norm: NormSpec | None = None
    tied_head: bool = False
    head_bias: bool = False
    normalised_head: bool = False
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    join: JoinSpec | FusionSpec | None = None

    def caches(self) -> tuple[CacheSpec, ...]:
        return tuple(held for layer in self.layers for held in held_by(layer.attention))

    def cache_places(self) -> tuple[slice, ...]:
        """Which of the pairs of caches each layer has, or shares."""
        counts = [len(held_by(layer.attention)) for layer in self.layers]
        starts = accumulate(counts, initial=0)
        own = [slice(start, start + count) for start, count in zip(starts, counts, strict=False)]
        return tuple(own[_cache_layer(i, layer)] for i, layer in enumerate(self.layers))

    def attentions(self) -> tuple[AttentionSpec, ...]:
        return tuple(spec for spec in self.caches() if isinstance(spec, AttentionSpec))

    @property
    def per_layer(self) -> PerLayerSpec | None:
        """The layers', if they have it: then all have the same."""
        return self.layers[0].per_layer

    def head_sizes(self) -> tuple[tuple[int, int], ...]:
        return head_sizes(self.attentions())

    def row_width(self) -> int:
        given = 0 if self.per_layer is None else 2 * len(self.layers) * self.per_layer.size
        return given + max(_row_width(self.hidden_size, layer) for layer in self.layers)


def replace_attentions(spec: DecoderSpec, **changes: Any) -> DecoderSpec:
    """A decoder whose layers all attend, with other values of each `AttentionSpec`."""
    changed = {layer: replace_attention(layer, **changes) for layer in spec.layers}
    return replace(spec, layers=tuple(changed[layer] for layer in spec.layers))


def _cache_layer(index: int, layer: LayerSpec) -> int:
    shared = getattr(layer.attention, "shares_cache_of", None)
    return index if shared is None else shared


def used_share(top_k: int, num_experts: int, num_tokens: int) -> float:
    """How likely an expert has a token, of so many that go to ``top_k`` experts each."""
    return 1.0 - float((1.0 - top_k / num_experts) ** num_tokens)


def head_sizes(attentions: Iterable[AttentionSpec]) -> tuple[tuple[int, int], ...]:
    """See `model_shape.ModelShape.head_sizes`."""
    return tuple(sorted({(a.query_key_head_size, a.value_head_size) for a in attentions}))


def _row_width(hidden_size: int, layer: LayerSpec) -> int:
    mlp = layer.mlp
    if isinstance(mlp, ExpertsSpec):
        inside = mlp.top_k * (3 * mlp.intermediate_size + 2 * hidden_size)
        if mlp.shared is not None:
            inside = max(inside, hidden_size + 3 * mlp.shared.intermediate_size)
    elif mlp is not None:
        inside = (3 if mlp.gated else 2) * mlp.intermediate_size
    else:
        inside = 0
    return 3 * hidden_size + max(_attention_width(layer.attention), inside)


def _attention_width(spec: MixingSpec | None) -> int:
    """What is alive at once: the product, what the convolution made of it, what was found."""
    if spec is None:
        return 0
    if isinstance(spec, SideBySideSpec):
        return _attention_width(spec.attention) + _attention_width(spec.space)
    if isinstance(spec, DeltaNetSpec):
        return 2 * (spec.conv_channels + spec.value_size + spec.num_value_heads)
    if isinstance(spec, StateSpaceSpec):
        return 2 * (spec.conv_channels + spec.inner_size) + spec.num_heads
    if isinstance(spec, ShortConvSpec):
        return 6 * spec.channels
    heads = spec.query_size + spec.key_size + spec.value_size
    if spec.latent is not None:  # queries before and after their products, what is found the same
        rope_size = spec.query_key_head_size - spec.value_head_size
        found = spec.num_heads * spec.value_head_size
        before = spec.num_heads * (spec.latent.key_size + rope_size)
        heads += before + found + spec.key_size + (spec.latent.query_rank or 0)
    return heads + spec.output_size + 2 * spec.gate_size
