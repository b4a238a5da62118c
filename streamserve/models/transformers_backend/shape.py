"""What a model of transformers is, as far as planning memory and loading it go."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.utils.generic import ModelOutput

from streamserve.models.spec import AttentionSpec, head_sizes, used_share
from streamserve_kernels.quantised import Quantization, packed_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """A linear layer ``[outputs, inputs]``, or the same one of ``copies`` experts.

    A token goes to ``top_k`` of the copies. ``path`` is the module's name.
    """

    path: str
    outputs: int
    inputs: int
    bias: bool
    is_router: bool = False
    copies: int = 1
    top_k: int = 1

    @property
    def numel(self) -> int:
        return self.copies * self.outputs * (self.inputs + (1 if self.bias else 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersSpec:
    """A `ModelShape`, with the parts of the model by the names of its modules.

    ``linears`` are those that our kernels multiply, ``head`` among them if it can be one;
    ``other_numel`` counts the weights that stay with transformers. Where the head is tied,
    ``embedding`` is a plain table that may be read from the head.
    """

    vocab_size: int
    hidden_size: int
    tied_head: bool
    trunk: str
    output_class: type[ModelOutput]
    head: str | None
    embedding: str | None
    layers: str | None
    attention_paths: tuple[str, ...]
    attention_specs: tuple[AttentionSpec, ...]
    linears: tuple[LinearShape, ...]
    other_numel: int
    buffer_bytes: int

    def caches(self) -> tuple[AttentionSpec, ...]:
        return self.attention_specs

    def attentions(self) -> tuple[AttentionSpec, ...]:
        return self.attention_specs

    def head_sizes(self) -> tuple[tuple[int, int], ...]:
        return head_sizes(self.attention_specs)

    def row_width(self) -> int:
        widest = max((n.top_k * (n.outputs + n.inputs) for n in self._inner_linears()), default=0)
        heads = max(
            a.query_size + a.key_size + a.value_size + a.output_size for a in self.attention_specs
        )
        # Norms and rotation are not fused: twice what goes in and out of a product.
        return 3 * self.hidden_size + 2 * max(widest, heads)

    def _inner_linears(self) -> Iterator[LinearShape]:
        return (linear for linear in self.linears if linear.path != self.head)

    def quantization_of(
        self, linear: LinearShape, quantization: Quantization | None
    ) -> Quantization | None:
        """As the native families have it: routers stay as they are, the head takes int8."""
        if quantization is None or linear.is_router:
            return None
        return "int8" if linear.path == self.head else quantization

    def weight_bytes(
        self,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
        num_tokens: int | None = None,
    ) -> int:
        """See `footprint.weight_bytes`. A head that is tied is a packed copy of its own."""
        total: float = self.buffer_bytes + self.other_numel * dtype.itemsize
        for linear in self.linears:
            held = self.quantization_of(linear, quantization)
            used = 1.0
            if num_tokens is not None:
                used = used_share(linear.top_k, linear.copies, num_tokens)
            if held is None:
                total += used * linear.numel * dtype.itemsize
                continue
            biases = linear.outputs * torch.float32.itemsize if linear.bias else 0
            packed = packed_bytes(held, linear.outputs, linear.inputs) + biases
            total += used * linear.copies * packed
        if self.embedding is not None and quantization is not None:
            total -= self.vocab_size * self.hidden_size * dtype.itemsize
        return math.ceil(total)
