"""The decoder's weights on their device, packed for the kernels, built module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from streamserve.errors import ModelLoadError
from streamserve.models.checkpoint import WeightSource
from streamserve.models.footprint import weight_bytes
from streamserve.models.host_memory import release_freed_memory
from streamserve.models.parameters import (
    Module,
    final_modules,
    layer_modules,
    module_quantization,
    opening_modules,
)
from streamserve.models.pieces import Leaf
from streamserve.models.spec import AttentionSpec, DecoderSpec, NormSpec
from streamserve_kernels import HeadsLinear, Kernels, PackedLinear, Quantization
from streamserve_kernels.stored import StoredWeight

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while weights load."""


@dataclass(frozen=True, slots=True)
class NormWeights:
    weight: Tensor
    bias: Tensor | None

    def by_head(self, size: int | None) -> NormWeights:
        """A row for each head of a ``size``, where the norms of heads have weights of their own."""
        return self if size is None else NormWeights(self.weight.view(-1, size), None)


@dataclass(slots=True)
class Weights:
    """One layer's modules, or those around the layers, by the names of `parameters`."""

    linears: dict[str, PackedLinear] = field(default_factory=dict)
    norms: dict[str, NormWeights] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    expert_gate_up: list[PackedLinear] = field(default_factory=list)
    expert_down: list[PackedLinear] = field(default_factory=list)
    by_head: dict[str, HeadsLinear] = field(default_factory=dict)

    def norm(self, name: str, spec: NormSpec) -> NormWeights | None:
        """A norm's; None where it has none."""
        return self.norms[name] if spec.weight else None

    def nbytes(self) -> int:
        products = (*self.linears.values(), *self.by_head.values())
        packed = (*products, *self.expert_gate_up, *self.expert_down)
        norms = (part for norm in self.norms.values() for part in (norm.weight, norm.bias))
        tensors = (*self.tensors.values(), *norms)
        return sum(linear.nbytes for linear in packed) + sum(
            tensor.nbytes for tensor in tensors if tensor is not None
        )


@dataclass(slots=True)
class DecoderWeights:
    """``borrowed`` are those around the layers that another decoder has."""

    outer: Weights
    layers: list[Weights]
    borrowed: Weights = field(default_factory=Weights)

    def nbytes(self) -> int:
        """Bytes resident of its own. A tied head counts if the kernels made a packed copy of it."""
        head = self.outer.linears.get("head")
        embedding = self.outer.tensors.get("embedding")
        is_shared = embedding is not None and getattr(head, "weight", None) is embedding
        shared = head.nbytes if head is not None and is_shared else 0
        return self.outer.nbytes() + sum(layer.nbytes() for layer in self.layers) - shared


def build_weights(
    spec: DecoderSpec,
    source: WeightSource,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    quantization: Quantization | None = None,
) -> DecoderWeights:
    """Reads every module into place on ``device`` and packs it: only one is ever held twice.

    A quantised tied head has no embedding beside it: its own rows are the embedding. An embedding
    that the checkpoint holds quantised stays so, among the linear weights.
    """
    builder = _Builder(spec, source, kernels, dtype, device, progress, quantization)
    outer = Weights()
    builder.add(outer, opening_modules(spec))
    layers = []
    for index in range(len(spec.layers)):
        layer = Weights()
        builder.add(layer, layer_modules(spec, index))
        layers.append(layer)
    builder.add(outer, final_modules(spec))
    if spec.tied_head and spec.join is None and "head" not in outer.linears:
        outer.linears["head"] = kernels.prepare_linear(outer.tensors["embedding"], None)
    if progress is not None:
        progress(builder.total, builder.total)
    return DecoderWeights(outer, layers)


# As checkpoints have them.
_OPPOSITE_LOGARITHMS = ("layers.delta.decay", "layers.space.decay")


class _Builder:
    def __init__(
        self,
        spec: DecoderSpec,
        source: WeightSource,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None,
        quantization: Quantization | None,
    ) -> None:
        # Of what is read, not of what is kept.
        self.total = weight_bytes(spec, dtype)
        self._done = 0
        self._spec = spec
        self._quantization = quantization
        self._source = source
        self._kernels = kernels
        self._dtype = dtype
        self._device = device
        self._progress = progress

    def add(self, weights: Weights, modules: Iterable[Module]) -> None:
        for module in modules:
            self._add(weights, module)
            self._done += module.numel * self._dtype.itemsize
            if self._progress is not None:
                self._progress(self._done, self.total)
        if self._device.type == "cpu":
            release_freed_memory()

    def _add(self, weights: Weights, module: Module) -> None:
        if module.by_head:
            self._add_heads(weights, module)
            return
        stored = self._source.stored(module)
        if stored is not None:
            self._add_linear(weights, module, self._pack_stored(module, stored))
            return
        weight = self._fetch(module, "weight")
        if module.name == "head" and self._spec.normalised_head:
            F.normalize(weight, dim=1, out=weight)
        if module.name in _OPPOSITE_LOGARITHMS:
            weight.exp_().neg_()
        if module.offset:
            weight.add_(module.offset)
        bias = self._fetch(module, "bias") if module.bias else None
        quantization = module_quantization(module, self._spec, self._quantization)
        if module.role == "norm":
            weights.norms[module.name] = NormWeights(weight, bias)
        elif module.role != "linear" and quantization is None:
            weights.tensors[module.name] = weight
            if bias is not None:
                weights.tensors[f"{module.name}.bias"] = bias
        else:
            self._add_linear(weights, module, self._pack(weight, bias, quantization))

    def _add_heads(self, weights: Weights, module: Module) -> None:
        """Keys of all heads, and their values, from what has for each head its key and its value.

        A query goes through the keys' product, from its own size to the latent's.
        """
        assert module.layer is not None
        attention = self._spec.layers[module.layer].attention
        assert isinstance(attention, AttentionSpec)
        assert attention.latent is not None
        sizes = (attention.latent.key_size, attention.latent.value_size)
        heads = self._fetch(module, "weight").view(attention.num_heads, sum(sizes), -1)
        keys, values = heads.split_with_sizes(sizes, dim=1)
        for name, part in (("keys", keys.transpose(1, 2)), ("values", values)):
            weights.by_head[f"layers.latent.{name}"] = self._kernels.prepare_by_head(part)

    def _add_linear(self, weights: Weights, module: Module, packed: PackedLinear) -> None:
        if module.name in ("layers.experts.gate_up", "layers.experts.up"):
            weights.expert_gate_up.append(packed)
        elif module.name == "layers.experts.down":
            weights.expert_down.append(packed)
        else:
            is_tied = module.name == "embedding" and self._spec.tied_head
            weights.linears["head" if is_tied else module.name] = packed

    def _pack_stored(self, module: Module, stored: StoredWeight) -> PackedLinear:
        if stored.shape != module.shape:
            raise ModelLoadError(
                f"{module.name} of layer {module.layer} is quantised as {list(stored.shape)}; "
                f"the config asks for {list(module.shape)}"
            )
        bias = self._fetch(module, "bias") if module.bias else None
        return self._kernels.prepare_stored(stored.to(self._device), bias, self._dtype)

    def _pack(
        self, weight: Tensor, bias: Tensor | None, quantization: Quantization | None
    ) -> PackedLinear:
        if quantization is None:
            return self._kernels.prepare_linear(weight, bias)
        return self._kernels.prepare_quantised(weight, bias, quantization)

    def _fetch(self, module: Module, leaf: Leaf) -> Tensor:
        shape = module.shape if leaf == "weight" else (module.num_rows,)
        dtype = torch.float32 if module.float32 else self._dtype
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        self._source.fill(module, leaf, tensor)
        return tensor
