"""Which part of every weight is whose: heads, inner widths and rows of the vocabulary.

    q, k, v, gate, up     rows      whole heads; columns of the product
    latents               all       but for the rows of what the heads make of them
    output, down          columns   each rank has a part of every sum: all of them are added up
    embeddings, head      rows      ceil(V / ranks) each, the last rank's may be fewer
    experts               as gate, up and down: each rank has a part of every expert
    norms, router         all
    what is per layer     all       but the table, which is an embedding

Where there are more ranks than key and value heads, several ranks hold the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamserve.errors import ConfigError
from streamserve.models.parameters import Module, decoder_modules
from streamserve.models.pieces import Leaf
from streamserve.models.spec import AttentionSpec, DecoderSpec, ExpertsSpec, LayerSpec, MlpSpec

_FLAG = "--tensor-parallel-size"
_GATED = ("layers.gate_up", "layers.experts.gate_up", "layers.shared.gate_up")
_UP = ("layers.up", "layers.shared.up")
_DOWN = ("layers.down", "layers.experts.down", "layers.shared.down")
_VOCABULARY = ("embedding", "head", "per_layer.embedding")
_PRODUCTS = ("layers.qkv", "layers.query_key", "layers.query")
# Their products are parts of a sum.
_SUMMED = ("layers.output", *_DOWN)


class Part(NamedTuple):
    """Of a module's weight: which rows ([N] int64, None: all) and which columns (None: all)."""

    rows: Tensor | None = None
    columns: slice | None = None


WHOLE = Part()


@dataclass(frozen=True)
class Share:
    """Rank ``rank``'s of ``size`` shares of the model ``whole``.

    Raises ConfigError, which names the flag, its value and the model's number, for a model that
    cannot be divided so.
    """

    whole: DecoderSpec
    rank: int
    size: int

    def __post_init__(self) -> None:
        attentions = [layer.attention for layer in self.whole.layers]
        if not all(isinstance(attention, AttentionSpec) for attention in attentions):
            raise ConfigError(
                f"{_FLAG} must be 1 for a model with layers that keep a state in the place of keys "
                f"and values, got {self.size}"
            )
        for layer in self.whole.layers:
            _check_layer(layer, _attention(layer), self.size)

    @cached_property
    def spec(self) -> DecoderSpec:
        """What the rank computes: layers of its own heads and widths, logits of all tokens."""
        kinds = set(self.whole.layers)
        layers = {layer: _divided(layer, _attention(layer), self.size) for layer in kinds}
        return replace(self.whole, layers=tuple(layers[layer] for layer in self.whole.layers))

    @cached_property
    def held(self) -> DecoderSpec:
        """What the rank holds weights of: `spec` with its own rows of the vocabulary only."""
        return replace(self.spec, vocab_size=-(-self.whole.vocab_size // self.size))

    @cached_property
    def _modules(self) -> dict[tuple[Any, ...], Module]:
        return {_key(module): module for module in decoder_modules(self.whole)}

    def whole_module(self, module: Module) -> Module:
        """The undivided module that one of `held` is a part of."""
        return self._modules[_key(module)]

    @property
    def first_token(self) -> int:
        """Of the rank's rows of the vocabulary."""
        return self.rank * self.held.vocab_size

    def heads(self, attention: AttentionSpec) -> range:
        """The rank's query heads of a layer of ``whole``."""
        count = attention.num_heads // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def kv_heads(self, attention: AttentionSpec) -> range:
        """The key and value heads that those attend with."""
        if attention.num_kv_heads < self.size:
            head = self.rank * attention.num_kv_heads // self.size
            return range(head, head + 1)
        count = attention.num_kv_heads // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def part(self, module: Module, leaf: Leaf = "weight") -> Part | None:
        """The rank's part of an undivided module; None: nothing, as if it were zeros.

        What is added to a sum is added by the first rank alone.
        """
        if module.name in _SUMMED:
            if leaf == "bias":
                return WHOLE if self.rank == 0 else None
            return Part(columns=self._columns(module))
        return Part(rows=self._rows(module))

    def _columns(self, module: Module) -> slice:
        if module.name == "layers.output":
            attention = self._attention(module)
            heads = self.heads(attention)
            size = attention.output_size // attention.num_heads
            return slice(heads.start * size, heads.stop * size)
        assert module.columns is not None
        width = module.columns // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def _rows(self, module: Module) -> Tensor | None:
        if module.name in _VOCABULARY:
            rows = torch.arange(self.first_token, self.first_token + self.held.vocab_size)
            # Rows past the end are copies of the last one: nobody asks for them.
            return rows.clamp_(max=self.whole.vocab_size - 1)
        if module.name in _GATED or module.name in _UP:
            width = module.rows[0] // self.size
            start = self.rank * width
            parts = [torch.arange(width) + start + i * rows for i, rows in enumerate(module.rows)]
            return torch.cat(parts)
        if module.name in _PRODUCTS:
            attention = self._attention(module)
            key, value = attention.query_key_head_size, attention.value_head_size
            kv_heads = self.kv_heads(attention)
            parts = [_rows_of(self.heads(attention), key, 0)]
            start = attention.query_size
            if attention.output_gate:
                parts.append(_rows_of(self.heads(attention), value, start))
                start += attention.gate_size
            if module.name != "layers.query":
                parts.append(_rows_of(kv_heads, key, start))
            if module.name == "layers.qkv":
                parts.append(_rows_of(kv_heads, value, start + attention.key_size))
            return torch.cat(parts)
        if module.name.startswith("layers.latent."):
            return self._latent_rows(module)
        if module.name in ("layers.sinks", "layers.head_gate"):
            return _rows_of(self.heads(self._attention(module)), 1, 0)
        if module.name in ("layers.q_norm", "layers.k_norm"):
            return self._norm_rows(module)
        return None

    def _latent_rows(self, module: Module) -> Tensor | None:
        """Latents of tokens and of queries are every rank's, what heads make of them is not."""
        attention = self._attention(module)
        name = module.name.removeprefix("layers.latent.")
        assert attention.latent is not None
        if name not in ("input", "query", "heads"):
            return None
        if name == "input" and attention.latent.query_rank is not None:
            return None
        size = module.rows[0] // attention.num_heads
        rows = _rows_of(self.heads(attention), size, 0)
        return torch.cat((rows, torch.arange(module.rows[0], module.num_rows)))

    def _norm_rows(self, module: Module) -> Tensor | None:
        attention = self._attention(module)
        norm = attention.qk_norm
        if norm is None or (norm.per_head and not norm.own_weights):
            return None
        is_query = module.name == "layers.q_norm"
        heads = self.heads(attention) if is_query else self.kv_heads(attention)
        return _rows_of(heads, attention.query_key_head_size, 0)

    def _attention(self, module: Module) -> AttentionSpec:
        assert module.layer is not None
        return _attention(self.whole.layers[module.layer])


def _attention(layer: LayerSpec) -> AttentionSpec:
    assert isinstance(layer.attention, AttentionSpec)
    return layer.attention


def _key(module: Module) -> tuple[Any, ...]:
    return module.name, module.layer, module.expert


def _rows_of(heads: range, head_size: int, offset: int) -> Tensor:
    return torch.arange(heads.start * head_size, heads.stop * head_size) + offset


def _divided(layer: LayerSpec, attention: AttentionSpec, size: int) -> LayerSpec:
    return replace(
        layer,
        attention=replace(
            attention,
            num_heads=attention.num_heads // size,
            num_kv_heads=max(1, attention.num_kv_heads // size),
        ),
        mlp=_divided_mlp(_mlp(layer), size),
    )


def _mlp(layer: LayerSpec) -> MlpSpec | ExpertsSpec:
    assert layer.mlp is not None, "layers that are divided have both halves"
    return layer.mlp


def _divided_mlp(mlp: MlpSpec | ExpertsSpec, size: int) -> MlpSpec | ExpertsSpec:
    inner = replace(mlp, intermediate_size=mlp.intermediate_size // size)
    if isinstance(inner, ExpertsSpec) and inner.shared is not None:
        width = inner.shared.intermediate_size // size
        return replace(inner, shared=replace(inner.shared, intermediate_size=width))
    return inner


def _check_layer(layer: LayerSpec, attention: AttentionSpec, size: int) -> None:
    mlp = _mlp(layer)
    _check_divides(size, attention.num_heads, "attention heads")
    if size % attention.num_kv_heads and attention.num_kv_heads % size:
        raise ConfigError(
            f"{_FLAG} must divide the model's {attention.num_kv_heads} key and value heads, or be "
            f"a multiple of them, got {size}"
        )
    norm = attention.qk_norm
    if norm is not None and not norm.per_head and norm.norm.kind != "rms_norm":
        raise ConfigError(
            f"{_FLAG} must be 1 for a model with layer norms over all heads of its queries, "
            f"got {size}"
        )
    is_experts = isinstance(mlp, ExpertsSpec)
    inner = "inner width of its experts" if is_experts else "intermediate size"
    _check_divides(size, mlp.intermediate_size, inner)
    if isinstance(mlp, ExpertsSpec) and mlp.shared is not None:
        _check_divides(size, mlp.shared.intermediate_size, "inner width of its shared expert")


def _check_divides(size: int, number: int, what: str) -> None:
    if number % size:
        raise ConfigError(f"{_FLAG} must divide the model's {number} ({what}), got {size}")
