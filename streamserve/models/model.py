"""What a runner asks of a model: the one seam between it and whatever computes the forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from streamserve.models.adapters import AdapterTables
from streamserve.models.batch import ForwardBatch, KVCache
from streamserve.models.model_shape import ModelShape
from streamserve_kernels import Kernels, PackedLinear


class LanguageModel(Protocol):
    """A model ready to run: see `Decoder`, whose methods these are."""

    @property
    def spec(self) -> ModelShape: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def kernels(self) -> Kernels: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def logits_dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def adapters(self) -> AdapterTables | None:
        """The places for adapters, where it was loaded with some."""
        ...

    def linears(self) -> Iterator[PackedLinear]: ...

    def warm_up(self, block_size: int = 16) -> None: ...

    def record(self, kv_caches: KVCache, *, max_tokens: int, max_logits: int) -> int: ...

    def forward(
        self, batch: ForwardBatch, kv_caches: KVCache, logits: Tensor | None = None
    ) -> Tensor: ...

    def greedy(self, batch: ForwardBatch, kv_caches: KVCache) -> Tensor | None: ...

    def forward_with_states(
        self, batch: ForwardBatch, kv_caches: KVCache
    ) -> tuple[Tensor, Tensor]: ...

    def forward_with_all_states(
        self, batch: ForwardBatch, kv_caches: KVCache
    ) -> tuple[Tensor, Tensor]: ...

    def greedy_with_all_states(
        self, batch: ForwardBatch, kv_caches: KVCache
    ) -> tuple[Tensor, Tensor] | None: ...

    def all_states(self, batch: ForwardBatch, kv_caches: KVCache) -> tuple[Tensor, Tensor]: ...

    def hidden_states(self, batch: ForwardBatch, kv_caches: KVCache) -> Tensor: ...

    def compute_logits(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor: ...

    def one_of_each_layer(self) -> LanguageModel: ...
