"""Draft heads: a layer or two that guess on from what the target itself has found.

A draft model knows the text only. A head is given the target's hidden state of each token besides,
and so guesses better than its size: multi-token prediction (Qwen 3-Next, Qwen 3.5: part of the
checkpoint; DeepSeek-V3's) and EAGLE-3 (Li et al. 2025: a checkpoint of its own).

At position p a head has the target's hidden state of token p and the embedding of token p + 1, and
says what token p + 2 may be. It attends over its own keys and values of the positions before, in
caches of its own whose blocks have the target's ids. What it found at the last position stands in
for the target's hidden state when it guesses on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from streamserve.models.batch import ForwardBatch, KVCache
from streamserve.models.model_shape import ModelShape
from streamserve_kernels import Kernels, PackedLinear


class DraftHead(Protocol):
    """A head, ready to run; not tied to a thread. Guesses need not be right, only likely."""

    @property
    def spec(self) -> ModelShape:
        """For its KV cache. It keeps no states."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def kernels(self) -> Kernels: ...
    @property
    def nbytes(self) -> int:
        """What its weights take, without those that are the target's."""

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's layers whose inputs it is given, one beside the other.

        What would enter one more is what the last one leaves.
        """

    def linears(self) -> Iterator[PackedLinear]:
        """Every product of a guess."""

    def warm_up(self, block_size: int = 16) -> None:
        """Compiles what it calls."""

    def record(self, kv_caches: KVCache, *, max_tokens: int, max_logits: int) -> int:
        """Writes guesses down, where the kernels can: see `Decoder.record`."""

    def take(self, states: Tensor) -> Tensor:
        """The target's hidden states [T, C] of the ``taps`` -> what `guess` is given [T, H]."""

    def guess(self, batch: ForwardBatch, kv_caches: KVCache) -> tuple[Tensor, Tensor]:
        """Writes its keys and values, and guesses at the rows ``batch.logits_indices``.

        Row t of the batch, at position p, has ``input_ids`` the token at p + 1 and
        ``hidden_states`` [T, H] that of the token at p. Returns the likeliest token [L] int64, as
        the target numbers them, and what it found at these rows [L, H], which stands in for a
        hidden state at the next position. L may be 0.
        """
