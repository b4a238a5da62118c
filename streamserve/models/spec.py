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

# Of a spec like the others: its parts are imported from here.
from streamserve.models.rope_spec import RopeScaling as RopeScaling  # noqa: PLC0414
from streamserve.models.rope_spec import RopeScalingKind as RopeScalingKind  # noqa: PLC0414
from streamserve.models.rope_spec import RopeSpec as RopeSpec  # noqa: PLC0414

NormKind = Literal["rms_norm", "layer_norm"]
Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_new", "relu", "relu2", "quick_gelu"]
ExpertActivation = Activation | Literal["clamped_swiglu"]
Residual = Literal["sequential", "parallel"]
Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    """``weight_offset`` is added to the weight (Gemma stores ``weight - 1``).

    To a layer norm's it is added as the weight is loaded, and rounded. A layer norm may also have
    no ``weight`` at all.
    """

    kind: NormKind
    eps: float
    bias: bool = False
    weight_offset: float = 0.0
    weight: bool = True


@dataclass(frozen=True, slots=True)
class QkNormSpec:
    """A norm of queries and keys before rotation, over each head or over all heads at once.

    With ``rotates_first`` it comes behind. With ``own_weights`` each head's norm has its own.
    """

    norm: NormSpec
    per_head: bool = True
    rotates_first: bool = False
    own_weights: bool = False


QueryScaleKind = Literal["logarithm", "steps"]


@dataclass(frozen=True, slots=True)
class QueryScaleSpec:
    """What a query past the ``trained`` length is multiplied by: attention stays as sharp.

    At position p that is log(p + 1) / log(trained) by ``logarithm``, and by ``steps``
    1 + beta * log(1 + floor(p / trained)).
    """

    kind: QueryScaleKind
    trained: int
    beta: float = 0.0


LATENT_NORM = NormSpec("rms_norm", 1e-6)
"""Of latents, whatever a model's other norms are."""


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-AI 2024): a token has one vector for all heads.

    Of that each head makes the ``key_size`` elements of its key that do not turn, and its value of
    ``value_size``, by products of its own. They are not made: queries go through the heads' key
    products instead, and what they find through the value products. So attention has one head of
    keys and values, ``value_head_size`` elements of that vector after `LATENT_NORM`, with the
    elements that do turn before them in the key. With ``query_rank`` queries are a product of a
    vector of that size, normed too.
    """

    key_size: int
    value_size: int
    query_rank: int | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """``num_kv_heads`` covers MHA (= heads), GQA and MQA (= 1); ``window`` counts the token itself.

    ``window=None`` is full attention. ``rope=None`` with ``alibi=False`` leaves order to learned
    positions, or to nothing. ``alibi_scale`` multiplies ALiBi's slopes. ``soft_cap`` bounds the
    scores by ``cap * tanh(score / cap)``. With ``output_gate`` what the heads found is multiplied
    by the sigmoid of a gate of the same size, the query's neighbour, before the output's product;
    with ``head_gate`` by that of one for each head, of a product of the layer's input.
    With ``latent`` the sizes of heads are those of attention, where elements that turn come first,
    and not those of the checkpoint.

    ``qkv_limit`` is the largest size of an element of queries, keys and values before norms and
    rotation. ``value_norm`` has no weight. With ``values_are_keys`` a value is what its key was
    before norm and rotation. With ``shares_cache_of`` an earlier layer there are neither keys nor
    values: queries attend to that layer's.
    """

    num_heads: int
    num_kv_heads: int
    query_key_head_size: int
    value_head_size: int
    scale: float
    window: int | None = None
    rope: RopeSpec | None = None
    alibi: bool = False
    alibi_scale: float = 1.0
    qk_norm: QkNormSpec | None = None
    qkv_limit: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    soft_cap: float | None = None
    sinks: bool = False
    query_scale: QueryScaleSpec | None = None
    output_gate: bool = False
    head_gate: bool = False
    latent: LatentSpec | None = None
    value_norm: NormSpec | None = None
    values_are_keys: bool = False
    shares_cache_of: int | None = None

    @property
    def product(self) -> str:
        """The module that makes queries of a layer's input, and keys and values if it has some."""
        if self.shares_cache_of is not None:
            return "layers.query"
        return "layers.query_key" if self.values_are_keys else "layers.qkv"

    @property
    def product_sizes(self) -> tuple[int, ...]:
        """Rows of its parts; a query's gate counts to it."""
        query = self.query_size + self.gate_size
        if self.shares_cache_of is not None:
            return (query,)
        return (query, self.key_size) + (() if self.values_are_keys else (self.value_size,))

    @property
    def query_size(self) -> int:
        return self.num_heads * self.query_key_head_size

    @property
    def key_size(self) -> int:
        return self.num_kv_heads * self.query_key_head_size

    @property
    def value_size(self) -> int:
        return self.num_kv_heads * self.value_head_size

    @property
    def output_size(self) -> int:
        latent = self.latent
        return self.num_heads * (self.value_head_size if latent is None else latent.value_size)

    @property
    def gate_size(self) -> int:
        return self.output_size if self.output_gate else 0


@dataclass(frozen=True, slots=True)
class DeltaNetSpec:
    """A gated delta net (Yang et al. 2024): a matrix for each value head is all it remembers.

    Queries, keys and values pass a causal convolution over ``conv_width`` tokens first; ``norm`` is
    that of each value head behind, which a gate multiplies. Value heads are a multiple of key
    heads.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_size: int
    value_head_size: int
    conv_width: int
    norm: NormSpec

    @property
    def key_size(self) -> int:
        return self.num_key_heads * self.key_head_size

    @property
    def value_size(self) -> int:
        return self.num_value_heads * self.value_head_size

    @property
    def conv_channels(self) -> int:
        return 2 * self.key_size + self.value_size

    @property
    def conv_state_shape(self) -> tuple[int, int]:
        """A slot's: the last inputs of the convolution, in the activations' dtype."""
        return (self.conv_width - 1, self.conv_channels)

    @property
    def matrices_shape(self) -> tuple[int, int, int]:
        """A slot's, in float32."""
        return (self.num_value_heads, self.key_head_size, self.value_head_size)


@dataclass(frozen=True, slots=True)
class ShortConvSpec:
    """A causal convolution of each channel, what goes in and what comes out times a gate.

    The last inputs of the convolution are all that it remembers. ``bias`` is that of all three
    products.
    """

    channels: int
    conv_width: int
    bias: bool = False

    @property
    def conv_state_shape(self) -> tuple[int, int]:
        """See `DeltaNetSpec.conv_state_shape`."""
        return (self.conv_width - 1, self.channels)

    @property
    def matrices_shape(self) -> tuple[int]:
        """None."""
        return (0,)


@dataclass(frozen=True, slots=True)
class StateSpaceSpec:
    """A selective state space (Mamba 2, Dao & Gu 2024): a matrix for each head is all it remembers.

    Inputs, B and C pass a causal convolution over ``conv_width`` tokens first; B and C are those of
    a group of heads. ``norm`` is of what the heads found times a gate, a group at a time, if it is
    normed. ``bias`` is that of the products, ``conv_bias`` the convolution's. ``input_scales``
    multiply what the first product makes: the gates, inputs, B, C and time steps.
    """

    num_heads: int
    head_size: int
    num_groups: int
    state_size: int
    conv_width: int
    norm: NormSpec | None
    conv_bias: bool = True
    bias: bool = False
    input_scales: tuple[float, float, float, float, float] | None = None

    @property
    def input_sizes(self) -> tuple[int, int, int, int, int]:
        """Of the parts of the first product: see ``input_scales``."""
        shared = self.num_groups * self.state_size
        return (self.inner_size, self.inner_size, shared, shared, self.num_heads)

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def group_size(self) -> int:
        """Of the heads of a group: what is normed together."""
        return self.inner_size // self.num_groups

    @property
    def conv_channels(self) -> int:
        return self.inner_size + 2 * self.num_groups * self.state_size

    @property
    def conv_state_shape(self) -> tuple[int, int]:
        """See `DeltaNetSpec.conv_state_shape`."""
        return (self.conv_width - 1, self.conv_channels)

    @property
    def matrices_shape(self) -> tuple[int, int, int]:
        """A slot's, in float32."""
        return (self.num_heads, self.state_size, self.head_size)


CacheSpec = AttentionSpec | DeltaNetSpec | StateSpaceSpec | ShortConvSpec
"""What a layer remembers of the tokens so far: keys and values in blocks, or a state in a slot."""


@dataclass(frozen=True, slots=True)
class SideBySideSpec:
    """Attention and a state space that read the same input: a layer has a cache for each.

    What each makes, times its scale, is added up.
    """

    attention: AttentionSpec
    space: StateSpaceSpec
    attention_scale: float = 1.0
    space_scale: float = 1.0


MixingSpec = CacheSpec | SideBySideSpec
"""What brings a token together with those before it."""


def parts_of(mixing: MixingSpec | None) -> tuple[CacheSpec, ...]:
    """Each of what a layer has, in the order of their caches."""
    if mixing is None:
        return ()
    if isinstance(mixing, SideBySideSpec):
        return (mixing.attention, mixing.space)
    return (mixing,)


def _held(mixing: MixingSpec | None) -> tuple[CacheSpec, ...]:
    """What a layer has caches of its own for."""
    is_shared = isinstance(mixing, AttentionSpec) and mixing.shares_cache_of is not None
    return () if is_shared else parts_of(mixing)


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
        return tuple(held for layer in self.layers for held in _held(layer.attention))

    def cache_places(self) -> tuple[slice, ...]:
        """Which of the pairs of caches each layer has, or shares."""
        counts = [len(_held(layer.attention)) for layer in self.layers]
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
