"""The weights that a spec calls for: their names, shapes and roles, in the order of the forward.

One list serves four uses: counting bytes before anything is read (`footprint`), checking a
checkpoint against what is needed, building the decoder's weights, and saying what can be done with
a family without importing torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from streamserve.models.spec import (
    LATENT_NORM,
    AttentionSpec,
    DecoderSpec,
    DeltaNetSpec,
    ExpertsSpec,
    FusionSpec,
    LatentSpec,
    MlpSpec,
    NormSpec,
    QkNormSpec,
    ShortConvSpec,
    SideBySideSpec,
    StateSpaceSpec,
)

if TYPE_CHECKING:
    from streamserve_kernels.quantised import Quantization
    from streamserve_kernels.stored import StoredFormat

Role = Literal["linear", "norm", "table", "vector", "convolution"]
# They decide, or weigh what is remembered from now on, and take next to nothing.
_NEVER_QUANTISED = ("layers.router", "layers.delta.gates", "layers.head_gate")


@dataclass(frozen=True, slots=True)
class Module:
    """A weight ``[sum(rows), columns]`` and maybe a bias ``[sum(rows)]``.

    ``rows`` are the parts stacked in it, as (q, k, v) or (gate, up). A norm or vector has
    ``columns=None``: its weight is ``[sum(rows)]``. ``name`` is a key of ``WeightNames.modules``.
    ``float32`` weights are held so whatever the model's dtype is. ``by_head`` ones become products
    of each head by itself: they are held as the activations are, however they are stored.
    ``offset`` is added to the weight once it is read.
    """

    name: str
    role: Role
    rows: tuple[int, ...]
    columns: int | None = None
    bias: bool = False
    layer: int | None = None
    expert: int | None = None
    float32: bool = False
    by_head: bool = False
    offset: float = 0.0

    @property
    def num_rows(self) -> int:
        return sum(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows,) if self.columns is None else (self.num_rows, self.columns)

    @property
    def numel(self) -> int:
        return self.num_rows * ((self.columns or 1) + (1 if self.bias else 0))


class StoredQuantization(Protocol):
    """How a checkpoint holds its weights, as far as its header tells."""

    @property
    def name(self) -> str:
        """What `--quantization` calls it."""
        ...

    def format(self, module: Module) -> StoredFormat | None:
        """What the module's weight takes; None: it is not quantised."""
        ...


def decoder_modules(spec: DecoderSpec) -> Iterator[Module]:
    """Every module of the decoder; a tied head has none of its own."""
    yield from opening_modules(spec)
    for index in range(len(spec.layers)):
        yield from layer_modules(spec, index)
    yield from final_modules(spec)


def opening_modules(spec: DecoderSpec) -> Iterator[Module]:
    """What makes the first layer's input."""
    size = spec.hidden_size
    if isinstance(spec.join, FusionSpec):
        yield from _fusion_modules(spec.join, size)
        return
    if spec.join is not None:
        yield _norm("join.embedding_norm", spec.join.norm, size)
        yield _norm("join.hidden_norm", spec.join.norm, size)
        yield Module("join.product", "linear", (size,), 2 * size)
        return
    yield Module("embedding", "table", (spec.vocab_size,), size)
    if spec.learned_positions is not None:
        yield Module("position_embedding", "table", (spec.learned_positions,), size)
    yield from _norms("embedding_norm", spec.embedding_norm, size)
    if spec.per_layer is not None:
        width = len(spec.layers) * spec.per_layer.size
        yield Module("per_layer.embedding", "table", (spec.vocab_size,), width)
        yield Module("per_layer.product", "linear", (width,), size)
        yield _norm("per_layer.norm", spec.per_layer.norm, spec.per_layer.size)


def _fusion_modules(join: FusionSpec, size: int) -> Iterator[Module]:
    if join.own_embedding:
        yield Module("embedding", "table", (join.vocab_size,), size)
    width = join.num_taps * join.target_size
    if join.tap_norm == "all":
        yield _norm("join.taps_norm", join.norm, width)
    elif join.tap_norm == "each":
        for tap in range(join.num_taps):
            yield _norm(f"join.tap_norms.{tap}", join.norm, join.target_size)
    yield Module("join.product", "linear", (size,), width)
    yield _norm("join.embedding_norm", join.norm, size)
    yield _norm("join.hidden_norm", join.norm, size)


def final_modules(spec: DecoderSpec) -> Iterator[Module]:
    yield from _norms("final_norm", spec.final_norm, spec.hidden_size)
    if not spec.tied_head:
        yield Module("head", "linear", (spec.vocab_size,), spec.hidden_size, bias=spec.head_bias)


def layer_modules(spec: DecoderSpec, index: int) -> Iterator[Module]:
    """One layer's modules in the order in which the forward meets them."""
    layer = spec.layers[index]
    hidden_size = spec.hidden_size
    yield from _norms("layers.attention_norm", layer.attention_norm, hidden_size, index)
    if isinstance(layer.attention, DeltaNetSpec):
        yield from _delta_net_modules(layer.attention, hidden_size, index)
    elif isinstance(layer.attention, StateSpaceSpec):
        yield from _state_space_modules(layer.attention, hidden_size, index)
    elif isinstance(layer.attention, SideBySideSpec):
        yield from _attention_modules(layer.attention.attention, hidden_size, hidden_size, index)
        yield from _state_space_modules(layer.attention.space, hidden_size, index)
    elif isinstance(layer.attention, ShortConvSpec):
        yield from _short_conv_modules(layer.attention, hidden_size, index)
    elif layer.attention is not None:
        is_joined = index == 0 and isinstance(spec.join, FusionSpec)
        input_size = 2 * hidden_size if is_joined else hidden_size
        yield from _attention_modules(layer.attention, input_size, hidden_size, index)
    yield from _norms("layers.attention_post_norm", layer.attention_post_norm, hidden_size, index)
    yield from _norms("layers.mlp_norm", layer.mlp_norm, hidden_size, index)
    if layer.mlp is not None:
        yield from _mlp_modules(layer.mlp, hidden_size, index)
    yield from _norms("layers.mlp_post_norm", layer.mlp_post_norm, hidden_size, index)
    if layer.per_layer is not None:
        given = layer.per_layer.size
        yield Module("layers.per_layer.gate", "linear", (given,), hidden_size, layer=index)
        yield Module("layers.per_layer.output", "linear", (hidden_size,), given, layer=index)
        yield _norm("layers.per_layer.norm", layer.per_layer.norm, hidden_size, index)
    if layer.scaled:
        yield Module("layers.scalar", "vector", (1,), layer=index, float32=True)


def module_quantization(
    module: Module, spec: DecoderSpec, quantization: Quantization | None
) -> Quantization | None:
    """How a module's weight is held when the model is served with ``quantization``.

    Linear layers and experts are quantised; norms, tables, the router and a delta net's gates are
    not. The head takes int8 in either case: with int4 there too, the model in the box changes its
    best token at twice as many positions. A tied embedding is the head's rows. So does the table of
    all layers' parts of an embedding, which may be half of a model.
    """
    if quantization is None or module.by_head or module.name in _NEVER_QUANTISED:
        return None
    is_head = module.name == "head" or (module.name == "embedding" and spec.tied_head)
    if is_head or module.name == "per_layer.embedding":
        return "int8"
    return quantization if module.role == "linear" else None


def takes_adapter(module: Module) -> bool:
    """Whether a LoRA adapter may have matrices beside a module of a layer."""
    is_linear = module.role == "linear" and module.expert is None and not module.by_head
    return is_linear and module.name != "layers.router"


def _norms(
    name: str, norm: NormSpec | None, size: int, layer: int | None = None
) -> Iterator[Module]:
    """Of a norm that there is, and that has a weight."""
    if norm is not None and norm.weight:
        yield _norm(name, norm, size, layer)


def _norm(name: str, norm: NormSpec, size: int, layer: int | None = None) -> Module:
    offset = norm.weight_offset if norm.kind == "layer_norm" else 0.0
    return Module(name, "norm", (size,), bias=norm.bias, layer=layer, offset=offset)


def _qk_norm_sizes(
    attention: AttentionSpec, norm: QkNormSpec
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    head = (attention.query_key_head_size,)
    if norm.own_weights:
        return head * attention.num_heads, head * attention.num_kv_heads
    return (head, head) if norm.per_head else ((attention.query_size,), (attention.key_size,))


def _attention_modules(
    attention: AttentionSpec, input_size: int, hidden_size: int, index: int
) -> Iterator[Module]:
    if attention.latent is not None:
        yield from _latent_modules(attention, attention.latent, input_size, hidden_size, index)
        return
    yield Module(
        attention.product,
        "linear",
        attention.product_sizes,
        input_size,
        bias=attention.qkv_bias,
        layer=index,
    )
    if attention.qk_norm is not None:
        norm = attention.qk_norm.norm
        query_sizes, key_sizes = _qk_norm_sizes(attention, attention.qk_norm)
        yield replace(_norm("layers.q_norm", norm, 0, index), rows=query_sizes)
        if attention.shares_cache_of is None:
            yield replace(_norm("layers.k_norm", norm, 0, index), rows=key_sizes)
    if attention.head_gate:
        yield Module("layers.head_gate", "linear", (attention.num_heads,), input_size, layer=index)
    if attention.sinks:
        yield Module("layers.sinks", "vector", (attention.num_heads,), layer=index)
    yield Module(
        "layers.output",
        "linear",
        (hidden_size,),
        attention.output_size,
        bias=attention.output_bias,
        layer=index,
    )


def _latent_modules(
    attention: AttentionSpec, latent: LatentSpec, input_size: int, hidden_size: int, index: int
) -> Iterator[Module]:
    rank, heads = attention.value_head_size, attention.num_heads
    rope_size = attention.query_key_head_size - rank
    query_size = heads * (latent.key_size + rope_size)
    first_size = latent.query_rank or query_size
    prefix = "layers.latent."
    yield Module(
        prefix + "input", "linear", (first_size, rank + rope_size), input_size, layer=index
    )
    if latent.query_rank is not None:
        yield _norm(prefix + "query_norm", LATENT_NORM, latent.query_rank, index)
        yield Module(prefix + "query", "linear", (query_size,), latent.query_rank, layer=index)
    yield _norm(prefix + "norm", LATENT_NORM, rank, index)
    heads_size = heads * (latent.key_size + latent.value_size)
    yield Module(prefix + "heads", "linear", (heads_size,), rank, layer=index, by_head=True)
    yield Module("layers.output", "linear", (hidden_size,), attention.output_size, layer=index)


def _delta_net_modules(spec: DeltaNetSpec, hidden_size: int, index: int) -> Iterator[Module]:
    heads, channels = spec.num_value_heads, spec.conv_channels
    prefix = "layers.delta."
    yield Module(prefix + "qkvz", "linear", (channels, spec.value_size), hidden_size, layer=index)
    yield Module(prefix + "gates", "linear", (heads, heads), hidden_size, layer=index)
    yield Module(prefix + "conv", "convolution", (channels,), spec.conv_width, layer=index)
    for name in ("decay", "time_bias"):
        yield Module(prefix + name, "vector", (heads,), layer=index, float32=True)
    yield _norm(prefix + "norm", spec.norm, spec.value_head_size, index)
    yield Module(prefix + "output", "linear", (hidden_size,), spec.value_size, layer=index)


def _state_space_modules(spec: StateSpaceSpec, hidden_size: int, index: int) -> Iterator[Module]:
    channels, inner, heads = spec.conv_channels, spec.inner_size, spec.num_heads
    prefix = "layers.space."
    rows = (inner, channels, heads)
    yield Module(prefix + "input", "linear", rows, hidden_size, bias=spec.bias, layer=index)
    yield Module(
        prefix + "conv",
        "convolution",
        (channels,),
        spec.conv_width,
        bias=spec.conv_bias,
        layer=index,
    )
    for name in ("decay", "time_bias", "skip"):
        yield Module(prefix + name, "vector", (heads,), layer=index, float32=True)
    if spec.norm is not None:
        yield _norm(prefix + "norm", spec.norm, inner, index)
    yield Module(prefix + "output", "linear", (hidden_size,), inner, bias=spec.bias, layer=index)


def _short_conv_modules(spec: ShortConvSpec, hidden_size: int, index: int) -> Iterator[Module]:
    channels, bias = spec.channels, spec.bias
    prefix = "layers.short_conv."
    rows, width = (channels,), spec.conv_width
    yield Module(prefix + "input", "linear", 3 * rows, hidden_size, bias=bias, layer=index)
    yield Module(prefix + "conv", "convolution", rows, width, bias=bias, layer=index)
    yield Module(prefix + "output", "linear", (hidden_size,), channels, bias=bias, layer=index)


def _mlp_modules(mlp: MlpSpec | ExpertsSpec, hidden_size: int, index: int) -> Iterator[Module]:
    if isinstance(mlp, ExpertsSpec):
        size = mlp.intermediate_size
        yield Module(
            "layers.router",
            "linear",
            (mlp.num_experts,),
            hidden_size,
            bias=mlp.router_bias,
            layer=index,
        )
        router = {"correction": mlp.router.correction, "scales": mlp.router.expert_scales}
        for name in (name for name, has in router.items() if has):
            yield Module(
                f"layers.router.{name}", "vector", (mlp.num_experts,), layer=index, float32=True
            )
        if mlp.own_norms is not None:
            yield Module("layers.router.norm", "vector", (hidden_size,), layer=index)
            for part in ("experts", "shared"):
                yield _norm(f"layers.{part}.norm", mlp.own_norms, hidden_size, index)
                yield _norm(f"layers.{part}.post_norm", mlp.own_norms, hidden_size, index)
        first, sizes = ("gate_up", (size, size)) if mlp.gated else ("up", (size,))
        for expert in range(mlp.num_experts):
            for name, rows, columns in (
                (f"layers.experts.{first}", sizes, hidden_size),
                ("layers.experts.down", (hidden_size,), size),
            ):
                yield Module(
                    name, "linear", rows, columns, bias=mlp.bias, layer=index, expert=expert
                )
        if mlp.shared is not None:
            if mlp.shared_gate:
                yield Module("layers.shared.gate", "table", (1,), hidden_size, layer=index)
            yield from _plain_mlp_modules("layers.shared.", mlp.shared, hidden_size, index)
        return
    yield from _plain_mlp_modules("layers.", mlp, hidden_size, index)


def _plain_mlp_modules(prefix: str, mlp: MlpSpec, hidden_size: int, index: int) -> Iterator[Module]:
    size = mlp.intermediate_size
    name, rows = ("gate_up", (size, size)) if mlp.gated else ("up", (size,))
    yield Module(prefix + name, "linear", rows, hidden_size, bias=mlp.bias, layer=index)
    yield Module(prefix + "down", "linear", (hidden_size,), size, bias=mlp.bias, layer=index)
