"""Steps of a draft head on a device: padded to a few shapes, each captured once as a CUDA graph.

A head's step is queued where the target's results are awaited, behind the step whose hidden states
it is fed; the ids of its guesses come back at once, since the target's next step needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from streamserve.core.plan import BlockCopy, SchedulerOutput
from streamserve.models.batch import KVCache
from streamserve.models.draft_head import DraftHead
from streamserve.runner.cuda.arena import StepArena
from streamserve.runner.cuda.graphs import GraphExecutor, StepResult
from streamserve.runner.cuda.input_batch import DeviceInputBatch
from streamserve.runner.cuda.memory import free_all_spare, open_runners
from streamserve.runner.cuda.step_key import StepKey, StepLadder
from streamserve.runner.cuda.timeline import timeline_of
from streamserve_kernels.uploads import upload

LARGEST_GRAPH = 64
"""Tokens: what is fed behind decodes and drafts. Prompts run launch by launch."""


class HeadExecutor(GraphExecutor):
    """Steps of a head on one arena; ``hidden_states`` [T, H] are where it reads a step's."""

    def __init__(
        self, head: DraftHead, kv_caches: KVCache, arena: StepArena, hidden_states: Tensor
    ) -> None:
        super().__init__(head.device)
        self.head = head
        self.hidden_states = hidden_states
        self._kv_caches = kv_caches
        self._arena = arena

    def run_eagerly(self, key: StepKey) -> StepResult:
        """See `GraphExecutor`. In place of logits [L, V] is what was found [L, H]."""
        batch = self._arena.inputs(key).batch
        given = self.hidden_states[: key.num_tokens]
        token_ids, found = self.head.guess(replace(batch, hidden_states=given), self._kv_caches)
        return StepResult(found, token_ids)


class DeviceHeadSteps:
    """`runner.head_steps.HeadSteps` on a device."""

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
        self._kv_caches = kv_caches
        self.ladder = StepLadder(max_num_batched_tokens, max_num_seqs, with_groups=False)
        self._books = DeviceInputBatch(
            self.ladder,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=block_size,
            vocab_size=head.spec.vocab_size,
            device=head.device,
            timeline=timeline_of(head.device),
        )
        shape = (self.ladder.largest.num_tokens, head.spec.hidden_size)
        hidden_states = torch.zeros(shape, dtype=head.dtype, device=head.device)
        self.executor = HeadExecutor(head, kv_caches, self._books.arena, hidden_states)
        open_runners.add(self)

    def warm_up(self, *, with_graphs: bool) -> None:
        """Meets every shape, and captures the graphs."""
        with torch.inference_mode():
            for key in self.ladder.shapes():
                self.executor.run_eagerly(key)
            if with_graphs:
                small = (k for k in self.ladder.graphs() if k.num_tokens <= LARGEST_GRAPH)
                self.executor.want_graphs(small)
                self.executor.capture_all()

    def take(self, states: Tensor) -> Tensor:
        """See `HeadSteps`."""
        return self.executor.head.take(states)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """See `HeadSteps`."""
        head = self.executor.head
        pairs = torch.tensor(copies, dtype=torch.int64).t().contiguous()
        src, dst = upload(pairs, head.device)
        caches = [cache for pair in self._kv_caches for cache in pair]
        head.kernels.copy_blocks(caches, src, dst)

    def run(self, step: SchedulerOutput, hidden_states: Tensor) -> tuple[list[int], Tensor]:
        """See `HeadSteps`."""
        self._books.apply(step)
        built = self._books.build(step, {})
        executor = self.executor
        executor.hidden_states[: len(hidden_states)].copy_(hidden_states)
        found, token_ids = executor.run(built.key)[:2]
        if not len(built.logits_rows):
            return [], found[:0]
        rows = torch.from_numpy(np.ascontiguousarray(built.logits_rows))
        on_host = token_ids.cpu()
        return on_host[rows].tolist(), found.index_select(0, upload(rows, found.device))

    def close(self) -> None:
        """See `HeadSteps`, and `CudaModelRunner.close`. Behind that of the target's runner."""
        if self not in open_runners:
            return
        device = self.executor.head.device
        del self.executor, self._kv_caches, self._books
        open_runners.discard(self)
        free_all_spare(device)
