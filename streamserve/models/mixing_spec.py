"""What brings a token together with those before it, as data: attention, or what keeps a state.

See `spec`, whose parts these are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamserve.models.rope_spec import RopeSpec

NormKind = Literal["rms_norm", "layer_norm"]


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


def held_by(mixing: MixingSpec | None) -> tuple[CacheSpec, ...]:
    """What a layer has caches of its own for."""
    is_shared = isinstance(mixing, AttentionSpec) and mixing.shares_cache_of is not None
    return () if is_shared else parts_of(mixing)
