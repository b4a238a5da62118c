"""The halves of a block that keep a state of constant size, each bound to its weights and kernels.

Their parts are called as those of `Attention`, with the layer's states in the caches' place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from streamserve.models.batch import ForwardBatch
from streamserve.models.spec import DeltaNetSpec, ShortConvSpec, StateSpaceSpec
from streamserve.models.weights import Weights
from streamserve_kernels import Kernels


class _Convolution:
    """A causal convolution over the last tokens, of weights below ``prefix``."""

    __slots__ = ("_activation", "_bias", "_kernel", "_weight")

    def __init__(
        self,
        prefix: str,
        weights: Weights,
        kernels: Kernels,
        activation: Literal["silu"] | None = None,
    ) -> None:
        self._weight = weights.tensors[f"{prefix}conv"]
        self._bias = weights.tensors.get(f"{prefix}conv.bias")
        self._kernel = kernels.causal_conv
        self._activation = activation

    def __call__(self, x: Tensor, conv_states: Tensor, batch: ForwardBatch) -> Tensor:
        """[T, C] -> [T, C]; the sequences' last inputs are what they are after the step."""
        assert batch.states is not None, "a model that keeps states is told where"
        return self._kernel(
            x,
            self._weight,
            self._bias,
            conv_states,
            batch.states,
            batch.query_start_loc,
            batch.seq_lens,
            activation=self._activation,
        )


class DeltaNet:
    """A gated delta net: one product, a convolution over the last tokens, then the delta rule."""

    __slots__ = (
        "_conv",
        "_decay",
        "_delta_rule",
        "_gated_norm",
        "_gates",
        "_norm_weight",
        "_qkvz",
        "_spec",
        "_time_bias",
        "output",
    )

    def __init__(self, spec: DeltaNetSpec, weights: Weights, kernels: Kernels) -> None:
        self._spec = spec
        self._qkvz = weights.linears["layers.delta.qkvz"]
        self._gates = weights.linears["layers.delta.gates"]
        self.output: Callable[[Tensor], Tensor] = weights.linears["layers.delta.output"]
        self._conv = _Convolution("layers.delta.", weights, kernels, "silu")
        self._decay = weights.tensors["layers.delta.decay"]
        self._time_bias = weights.tensors["layers.delta.time_bias"]
        self._norm_weight = weights.norms["layers.delta.norm"].weight
        self._delta_rule = kernels.gated_delta_rule
        self._gated_norm = kernels.gated_rms_norm

    def write(
        self, normed: Tensor, batch: ForwardBatch, conv_states: Tensor, matrices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[T, H] -> what the heads found and their gate, both [T, Hv * Dv].

        The sequences' states are what they are after the step's tokens.
        """
        spec, states = self._spec, batch.states
        assert states is not None, "a model that keeps states is told where"
        sizes = (spec.conv_channels, spec.value_size)
        mixed, gate = self._qkvz(normed).split_with_sizes(sizes, 1)
        found = self._delta_rule(
            self._conv(mixed, conv_states, batch),
            self._gates(normed),
            self._decay,
            self._time_bias,
            matrices,
            states,
            batch.query_start_loc,
            batch.seq_lens,
            num_key_heads=spec.num_key_heads,
        )
        return found, gate

    def attend(
        self,
        found: Tensor,
        gate: Tensor | None,
        batch: ForwardBatch,
        conv_states: Tensor,
        matrices: Tensor,
    ) -> Tensor:
        """Normed by heads and gated, [T, Hv * Dv], before the output projection."""
        assert gate is not None
        return self._gated_norm(found, gate, self._norm_weight, self._spec.norm.eps)


class StateSpace:
    """A selective state space: one product, a convolution over the last tokens, then the scan."""

    __slots__ = (
        "_activation",
        "_conv",
        "_decay",
        "_input",
        "_input_scales",
        "_norm",
        "_norm_weight",
        "_scan",
        "_sizes",
        "_skip",
        "_spec",
        "_time_bias",
        "output",
    )

    def __init__(self, spec: StateSpaceSpec, weights: Weights, kernels: Kernels) -> None:
        self._spec = spec
        self._sizes = (spec.inner_size, spec.conv_channels, spec.num_heads)
        self._input = weights.linears["layers.space.input"]
        self.output: Callable[[Tensor], Tensor] = weights.linears["layers.space.output"]
        self._conv = _Convolution("layers.space.", weights, kernels, "silu")
        self._decay = weights.tensors["layers.space.decay"]
        self._time_bias = weights.tensors["layers.space.time_bias"]
        self._skip = weights.tensors["layers.space.skip"]
        self._norm_weight = None
        if spec.norm is not None:
            self._norm_weight = weights.norms["layers.space.norm"].weight
        self._scan = kernels.state_space_scan
        self._norm = kernels.norm_of_gated
        self._activation = kernels.activation
        self._input_scales: Tensor | None = None
        if spec.input_scales is not None:
            scales = zip(spec.input_scales, spec.input_sizes, strict=True)
            each = [scale for scale, size in scales for _ in range(size)]
            self._input_scales = weights.tensors["layers.space.conv"].new_tensor(each)

    def write(
        self, normed: Tensor, batch: ForwardBatch, conv_states: Tensor, matrices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[T, H] -> what the heads found and their gate, both [T, heads * head size].

        The sequences' states are what they are after the step's tokens.
        """
        states = batch.states
        assert states is not None, "a model that keeps states is told where"
        product = self._input(normed)
        if self._input_scales is not None:
            product = product * self._input_scales
        gate, mixed, time = product.split_with_sizes(self._sizes, 1)
        found = self._scan(
            self._conv(mixed, conv_states, batch),
            time,
            self._decay,
            self._time_bias,
            self._skip,
            matrices,
            states,
            batch.query_start_loc,
            batch.seq_lens,
            num_groups=self._spec.num_groups,
        )
        return found, gate

    def attend(
        self,
        found: Tensor,
        gate: Tensor | None,
        batch: ForwardBatch,
        conv_states: Tensor,
        matrices: Tensor,
    ) -> Tensor:
        """Gated, [T, heads * head size], and normed by groups, before the output projection."""
        assert gate is not None
        spec = self._spec
        if spec.norm is None or self._norm_weight is None:
            return found * self._activation(gate, "silu")
        return self._norm(found, gate, self._norm_weight, spec.norm.eps, spec.group_size)


class ShortConv:
    """A causal convolution between two gates."""

    __slots__ = ("_conv", "_input", "_sizes", "output")

    def __init__(self, spec: ShortConvSpec, weights: Weights, kernels: Kernels) -> None:
        self._sizes = (spec.channels,) * 3
        self._input = weights.linears["layers.short_conv.input"]
        self.output: Callable[[Tensor], Tensor] = weights.linears["layers.short_conv.output"]
        self._conv = _Convolution("layers.short_conv.", weights, kernels)

    def write(
        self, normed: Tensor, batch: ForwardBatch, conv_states: Tensor, matrices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[T, H] -> the convolution's outputs and their gate, both [T, C]."""
        before, gate, x = self._input(normed).split_with_sizes(self._sizes, 1)
        return self._conv(before * x, conv_states, batch), gate

    def attend(
        self,
        mixed: Tensor,
        gate: Tensor | None,
        batch: ForwardBatch,
        conv_states: Tensor,
        matrices: Tensor,
    ) -> Tensor:
        """[T, C], before the output projection."""
        assert gate is not None
        return mixed * gate
