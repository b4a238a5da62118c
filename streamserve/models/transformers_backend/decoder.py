"""A model of transformers behind the decoder's interface."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from streamserve.models.batch import ForwardBatch, KVCache
from streamserve.models.transformers_backend.attention import PagedAttention, Step, bind
from streamserve.models.transformers_backend.modules import Packed, PackedExperts
from streamserve.models.transformers_backend.shape import TransformersSpec
from streamserve.models.transformers_backend.trunk import GivenStates, run_trunk
from streamserve_kernels import Kernels, PackedLinear


class TransformersDecoder:
    """See `LanguageModel`. Never recorded. Its steps run on one thread at a time.

    Takes ``model`` over: its linear layers and experts are the kernels' already.
    """

    def __init__(
        self,
        spec: TransformersSpec,
        model: PreTrainedModel,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.kernels = kernels
        self.max_model_len = max_model_len
        self.adapters = None
        self._step = Step()
        for index, (path, attention) in enumerate(
            zip(spec.attention_paths, spec.attention_specs, strict=True)
        ):
            bound = PagedAttention(attention, index, kernels, self._step)
            bind(model.get_submodule(path), bound)
        self._packed = list(_packed(model))
        self.nbytes = _nbytes(model, self._packed)
        self._trunk = model.get_submodule(spec.trunk)
        self._given = GivenStates.install(model, spec.trunk, spec.output_class)

    def linears(self) -> Iterator[PackedLinear]:
        """Every product that the kernels compute."""
        yield from self._packed

    def warm_up(self, block_size: int = 16) -> None:
        """Compiles the kernels that this model calls, so that no request waits for a compiler."""
        for head_size, value_head_size in self.spec.head_sizes():
            self.kernels.warm_up(self.dtype, head_size, value_head_size, block_size)

    def record(self, kv_caches: KVCache, *, max_tokens: int, max_logits: int) -> int:
        """Nothing is recorded: the forward is not ours."""
        return 0

    def forward(
        self, batch: ForwardBatch, kv_caches: KVCache, logits: Tensor | None = None
    ) -> Tensor:
        return self.compute_logits(self.hidden_states(batch, kv_caches), logits)

    def greedy(self, batch: ForwardBatch, kv_caches: KVCache) -> Tensor | None:
        return None

    def forward_with_states(self, batch: ForwardBatch, kv_caches: KVCache) -> tuple[Tensor, Tensor]:
        hidden_states = self.hidden_states(batch, kv_caches)
        return self.compute_logits(hidden_states), hidden_states

    def forward_with_all_states(
        self, batch: ForwardBatch, kv_caches: KVCache
    ) -> tuple[Tensor, Tensor]:
        states, _ = self.all_states(batch, kv_caches)
        return self.compute_logits(states.index_select(0, batch.logits_indices)), states

    def greedy_with_all_states(
        self, batch: ForwardBatch, kv_caches: KVCache
    ) -> tuple[Tensor, Tensor] | None:
        return None

    def all_states(self, batch: ForwardBatch, kv_caches: KVCache) -> tuple[Tensor, Tensor]:
        every_row = torch.arange(batch.input_ids.shape[0], device=self.device)
        states = self.hidden_states(replace(batch, logits_indices=every_row), kv_caches)
        return states, states

    def hidden_states(self, batch: ForwardBatch, kv_caches: KVCache) -> Tensor:
        step = self._step
        step.batch, step.kv_caches = batch, kv_caches
        try:
            output = run_trunk(self._trunk, batch.input_ids[None], batch.positions[None])
        finally:
            step.batch = step.kv_caches = None
        states: Tensor = output.last_hidden_state[0]
        rows = batch.logits_indices
        # Strictly increasing rows that are as many as the tokens are all of them.
        return states if rows.shape[0] == states.shape[0] else states.index_select(0, rows)

    @property
    def logits_dtype(self) -> torch.dtype:
        return torch.float32

    def compute_logits(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor:
        num_rows = hidden_states.shape[0]
        if out is None:
            shape = (num_rows, self.spec.vocab_size)
            out = hidden_states.new_empty(shape, dtype=torch.float32)
        if num_rows:
            any_ids = torch.zeros(1, num_rows, dtype=torch.int64, device=self.device)
            out.copy_(self._given.logits(hidden_states[None], any_ids)[0])
        return out

    def one_of_each_layer(self) -> TransformersDecoder:
        """A thin copy with the first layer of each kind and the last, where layers are a list."""
        path = self.spec.layers
        if path is None:
            return self
        inside = path.removeprefix(self.spec.trunk).lstrip(".")
        layers = self._trunk.get_submodule(inside)
        assert isinstance(layers, nn.ModuleList)
        first: dict[object, int] = {}
        for index, (layer, attention) in enumerate(
            zip(layers, self.spec.attention_specs, strict=True)
        ):
            first.setdefault((_kind(layer), attention), index)
        chosen = sorted({*first.values(), len(layers) - 1})
        thin = copy(self)
        thin._trunk = _with(self._trunk, inside, nn.ModuleList([layers[i] for i in chosen]))
        return thin


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """What layers that do the same have in common: their modules and the sizes of products."""
    parts = []
    for name, module in layer.named_modules():
        sizes = (module.in_features, module.out_features) if isinstance(module, Packed) else ()
        parts.append((name, type(module), sizes))
    return tuple(parts)


def _with(module: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    """A copy of ``module`` that shares everything with it but what is at ``path``."""
    name, _, rest = path.partition(".")
    twin = copy(module)
    twin._modules = dict(module._modules)
    twin._modules[name] = (
        _with(module.get_submodule(name), rest, replacement) if rest else replacement
    )
    return twin


def _packed(model: nn.Module) -> Iterator[PackedLinear]:
    for module in model.modules():
        if isinstance(module, Packed):
            yield module.packed
        experts = getattr(module, "_streamserve_experts", None)
        if isinstance(experts, PackedExperts):
            yield from experts.packed()


def _nbytes(model: nn.Module, packed: list[PackedLinear]) -> int:
    """A table that a head shares with it is counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    addresses = {tensor.data_ptr() for tensor in tensors.values()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    for linear in packed:
        weight = getattr(linear, "weight", None)
        if not isinstance(weight, Tensor) or weight.data_ptr() not in addresses:
            total += linear.nbytes
    return total
