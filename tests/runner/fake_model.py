"""A model whose next token depends on every token before it, read through the block table."""

from __future__ import annotations

import torch

import streamserve_kernels
from streamserve.models.batch import ForwardBatch, KVCache

VOCAB = 64
BLOCK_SIZE = 4


class FakeModel:
    """Keys hold token ids, values positions. ``fail_next`` makes one forward raise.

    With ``finds_likeliest`` it needs no logits where those are all that is asked for.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.logits_dtype = torch.float32
        self.kernels = streamserve_kernels.load("cpu", "naive")
        self.fail_next: Exception | None = None
        self.finds_likeliest = False
        self.num_forwards = 0
        self.grad_modes: list[bool] = []

    @staticmethod
    def caches(num_blocks: int) -> KVCache:
        return [
            (torch.zeros(num_blocks, 1, BLOCK_SIZE, 1), torch.zeros(num_blocks, 1, BLOCK_SIZE, 1))
        ]

    def greedy(self, batch: ForwardBatch, kv_caches: KVCache) -> torch.Tensor | None:
        return self.forward(batch, kv_caches).argmax(1) if self.finds_likeliest else None

    def forward(self, batch: ForwardBatch, kv_caches: KVCache, out=None) -> torch.Tensor:
        self.num_forwards += 1
        self.grad_modes.append(torch.is_inference_mode_enabled())
        keys, values = (cache.view(-1) for cache in kv_caches[0])
        rows = batch.slot_mapping >= 0
        keys[batch.slot_mapping[rows]] = batch.input_ids[rows].float()
        values[batch.slot_mapping[rows]] = batch.positions[rows].float()
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        starts = batch.query_start_loc.tolist()
        logits = torch.empty(len(batch.logits_indices), VOCAB) if out is None else out
        logits.zero_()
        for i, row in enumerate(batch.logits_indices.tolist()):
            r = next((r for r in range(len(starts) - 1) if starts[r] <= row < starts[r + 1]), None)
            if r is None:
                continue  # padding
            end = int(batch.seq_lens[r]) - (starts[r + 1] - 1 - row)
            slots = [
                int(batch.block_table[r, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE
                for p in range(end)
            ]
            assert values[slots].tolist() == list(range(end))
            logits[i] = logits_after(keys[slots].long().tolist())
        return logits


def logits_after(token_ids: list[int]) -> torch.Tensor:
    """Logits [VOCAB] after these tokens: the best is well apart, the others are lively."""
    state = 0
    for token in token_ids:
        state = (state * 31 + token + 1) % 1_000_003
    spread = torch.sin(torch.arange(VOCAB) * (1.0 + state % 97)) * 3
    spread[state % VOCAB] = 5.0
    return spread
