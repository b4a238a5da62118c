"""The first rank draws, the others are told: on a host, where ids come to it after every step."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamserve.core.plan import Masks, TokenLogprobs
from streamserve.models.tensor_parallel.ranks import Ranks
from streamserve.runner.model_runner import Launched, TorchModelRunner
from streamserve.runner.plan_arrays import StepRows
from streamserve.runner.sampler import Float32Array, Int64Array, Sampler, SamplingBatch


def rank_runner(ranks: Ranks, *args: Any, **options: Any) -> TorchModelRunner:
    """The runner of one of several ranks; else as `TorchModelRunner`."""
    if ranks.rank == 0:
        return TorchModelRunner(*args, sampler=partial(_TellingSampler, ranks), **options)
    return _ToldRunner(ranks, *args, **options)


class _TellingSampler(Sampler):
    def __init__(self, ranks: Ranks, *args: Any) -> None:
        super().__init__(*args)
        self._ranks = ranks

    def greedy(self, logits: Float32Array) -> Int64Array:
        return self._told(super().greedy(logits))

    def sample(self, logits: Float32Array, batch: SamplingBatch) -> Int64Array:
        return self._told(super().sample(logits, batch))

    def _told(self, token_ids: Int64Array) -> Int64Array:
        self._ranks.broadcast(torch.from_numpy(np.ascontiguousarray(token_ids)))
        return token_ids


class _ToldRunner(TorchModelRunner):
    def __init__(self, ranks: Ranks, *args: Any, **options: Any) -> None:
        self._ranks = ranks
        super().__init__(*args, **options)

    def _draw(
        self, launched: Launched, rows: StepRows, masks: Masks | None
    ) -> tuple[StepRows, NDArray[np.int64], list[list[TokenLogprobs]] | None]:
        token_ids = torch.empty(len(rows.places), dtype=torch.int64)
        rows, kept, _ = rows.keep(self._ranks.broadcast(token_ids).numpy())
        return rows, kept, None
