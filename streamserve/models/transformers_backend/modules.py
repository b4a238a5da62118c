"""Our packed weights in the places of transformers' linear layers, embeddings and experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from streamserve.errors import UnsupportedModelError
from streamserve.models.transformers_backend.shape import LinearShape
from streamserve_kernels import Kernels, PackedLinear, Quantization, QuantLinear

EXPERTS = "streamserve"
PROBE_EXPERTS = "streamserve_probe"


class Packed(nn.Module):
    """A linear layer whose weight is one of the kernels'."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.packed = packed
        self.in_features, self.out_features = packed.in_features, packed.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x)


class QuantisedEmbedding(nn.Module):
    """The rows of a quantised head that is tied to it."""

    def __init__(self, head: QuantLinear, kernels: Kernels) -> None:
        super().__init__()
        self._head = head
        self._kernels = kernels

    def forward(self, ids: Tensor) -> Tensor:
        rows = self._kernels.embedding(ids.flatten(), self._head)
        return rows.view(*ids.shape, -1)


class PackedExperts:
    """All experts of a layer."""

    def __init__(self, module: Any, kernels: Kernels, quantization: Quantization | None) -> None:
        """Takes the stacked weights out of ``module``."""
        self._kernels = kernels
        self._activate: Callable[[Tensor], Tensor] = (
            module._apply_gate if module.has_gate else module.act_fn
        )
        pack = _Packing(module, kernels, quantization)
        self._up = pack(_up_name(module))
        self._down = pack("down_proj")

    def packed(self) -> Iterator[PackedLinear]:
        yield from self._up
        yield from self._down

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Of x [T, H], chosen and weights [T, K] -> [T, H]."""
        return self._kernels.chosen_experts(
            x, chosen, weights, self._up, self._down, self._activate
        )


class _Packing:
    def __init__(self, module: Any, kernels: Kernels, quantization: Quantization | None) -> None:
        self._module = module
        self._kernels = kernels
        self._quantization = quantization

    def __call__(self, name: str) -> list[PackedLinear]:
        module = self._module
        stacked: Tensor = getattr(module, name).detach()
        biases = getattr(module, f"{name}_bias").detach() if module.has_bias else None
        packed = []
        for expert in range(stacked.shape[0]):
            weight = stacked[expert].t() if module.is_transposed else stacked[expert]
            bias = None if biases is None else biases[expert].clone()
            packed.append(pack(weight.contiguous(), bias, self._kernels, self._quantization))
        delattr(module, name)
        return packed


def pack(
    weight: Tensor, bias: Tensor | None, kernels: Kernels, quantization: Quantization | None
) -> PackedLinear:
    if quantization is None:
        return kernels.prepare_linear(weight, bias)
    return kernels.prepare_quantised(weight, bias, quantization)


def is_experts(module: nn.Module) -> bool:
    """Whether transformers calls an experts function for this module."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate")


Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def bind_experts(module: nn.Module, experts: Experts) -> None:
    """Makes ``module`` multiply with ``experts``."""
    module._streamserve_experts = experts  # type: ignore[assignment]


def _experts(module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    experts: Any = module._streamserve_experts
    output: Tensor = experts(x, chosen, weights)
    return output


class ProbeExperts:
    """In the place of `PackedExperts` where there are no weights: takes down what is asked for."""

    def __init__(self, module: Any) -> None:
        if getattr(module, "has_post_expert_norm", False):
            raise UnsupportedModelError("it has a norm behind each expert")
        self._module = module
        self._top_k = 1

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        self._top_k = chosen.shape[1]
        return torch.empty_like(x)

    def shapes(self, path: str) -> Iterator[LinearShape]:
        module = self._module
        for name in (_up_name(module), "down_proj"):
            copies, *sizes = getattr(module, name).shape
            outputs, inputs = reversed(sizes) if module.is_transposed else sizes
            yield LinearShape(
                path=f"{path}.{name}",
                outputs=outputs,
                inputs=inputs,
                bias=module.has_bias,
                copies=copies,
                top_k=self._top_k,
            )


def _up_name(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def register() -> None:
    """Tells transformers of both implementations; again is no harm."""
    for name in (EXPERTS, PROBE_EXPERTS):
        ExpertsInterface.register(name, _experts)
