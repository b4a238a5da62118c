"""Per-layer embeddings: what every layer is given of a token besides the sum so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamserve.models.layers import bind_norm
from streamserve.models.spec import DecoderSpec, PerLayerSpec
from streamserve.models.weights import Weights
from streamserve_kernels import Kernels, QuantLinear


class PerLayerTable:
    """All layers' parts of a token's embedding."""

    __slots__ = ("_kernels", "_norm", "_product", "_product_scale", "_scale", "_sizes", "table")

    def __init__(self, spec: DecoderSpec, weights: Weights, kernels: Kernels) -> None:
        given = spec.per_layer
        assert given is not None
        self._sizes = (given.size,) * len(spec.layers)
        self.table: Tensor | QuantLinear
        if "per_layer.embedding" in weights.tensors:
            self.table = weights.tensors["per_layer.embedding"]
        else:
            quantised = weights.linears["per_layer.embedding"]
            assert isinstance(quantised, QuantLinear), "an embedding is looked up"
            self.table = quantised
        self._scale: float = torch.tensor(given.size**0.5, dtype=self.table.dtype).item()
        self._product = weights.linears["per_layer.product"]
        self._product_scale = spec.hidden_size**-0.5
        self._norm = bind_norm(given.norm, weights.norms["per_layer.norm"], kernels)

    def parts(self, rows: Tensor, x: Tensor) -> Sequence[Tensor]:
        """The table's rows [T, layers * P] and embeddings [T, H] -> [T, P] for each layer."""
        projected = self._product(x) * self._product_scale
        normed = self._norm.norm(projected.reshape(-1, self._sizes[0])).view(projected.shape)
        both: Tensor = (normed + rows * self._scale) * 2.0**-0.5
        return both.split_with_sizes(self._sizes, 1)


class PerLayerGate:
    """A layer's use of its part."""

    __slots__ = ("_activation", "_gate", "_kind", "_norm", "_output")

    def __init__(self, spec: PerLayerSpec, weights: Weights, kernels: Kernels) -> None:
        self._gate = weights.linears["layers.per_layer.gate"]
        self._output = weights.linears["layers.per_layer.output"]
        self._norm = bind_norm(spec.norm, weights.norms["layers.per_layer.norm"], kernels)
        self._activation, self._kind = kernels.activation, spec.activation

    def __call__(self, x: Tensor, part: Tensor) -> Tensor:
        """The hidden state [T, H] and its part [T, P] -> what is added to it, [T, H]."""
        gated = self._activation(self._gate(x), self._kind) * part
        return self._norm.norm(self._output(gated))
