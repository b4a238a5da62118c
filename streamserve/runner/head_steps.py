"""Steps of a draft head on a CPU: a plan and hidden states in, guesses out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from streamserve.core.plan import BlockCopy, SchedulerOutput
from streamserve.models.batch import KVCache
from streamserve.models.draft_head import DraftHead
from streamserve.runner.input_batch import InputBatch


class HeadSteps(Protocol):
    """What runs a head. One thread at a time."""

    def take(self, states: Tensor) -> Tensor:
        """See `DraftHead`."""

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copies blocks of the head's cache."""

    def run(self, step: SchedulerOutput, hidden_states: Tensor) -> tuple[list[int], Tensor]:
        """Runs a plan that schedules something; a token has a row of ``hidden_states`` [T, H].

        Returns, in the plan's order, the guess behind each request that is asked for one, and what
        was found there [L, H], which is not overwritten.
        """

    def close(self) -> None:
        """Whoever holds it on holds neither weights nor caches. Idempotent."""


class HostHeadSteps:
    """`HeadSteps` on a CPU."""

    def __init__(
        self,
        head: DraftHead,
        kv_caches: KVCache,
        *,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self._head = head
        self._kv_caches = kv_caches
        self._books = InputBatch(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            block_size=block_size,
            vocab_size=head.spec.vocab_size,
            device=head.device,
        )

    def take(self, states: Tensor) -> Tensor:
        """See `HeadSteps`."""
        return self._head.take(states)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """See `HeadSteps`."""
        src, dst = torch.tensor(copies, dtype=torch.int64).t().contiguous()
        caches = [cache for pair in self._kv_caches for cache in pair]
        self._head.kernels.copy_blocks(caches, src, dst)

    def run(self, step: SchedulerOutput, hidden_states: Tensor) -> tuple[list[int], Tensor]:
        """See `HeadSteps`."""
        self._books.apply(step)
        batch, _ = self._books.build(step)
        token_ids, found = self._head.guess(
            replace(batch, hidden_states=hidden_states), self._kv_caches
        )
        return token_ids.tolist(), found

    def close(self) -> None:
        """See `HeadSteps`."""
        if hasattr(self, "_head"):
            del self._head, self._kv_caches, self._books
