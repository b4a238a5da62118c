"""The first rank draws, the others are told: on the device, where ids stay for the next step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamserve.core.plan import Masks
from streamserve.models.tensor_parallel.ranks import Ranks
from streamserve.runner.cuda.input_batch import DeviceInputBatch, DeviceStep
from streamserve.runner.cuda.sampling import DeviceSampler, Drawn


def rank_sampler(ranks: Ranks, *args: Any) -> DeviceSampler:
    """The sampler of one of several ranks; else as `DeviceSampler`.

    An arg-max is everybody's own: all have the same logits.
    """
    kind = _TellingSampler if ranks.rank == 0 else _ToldSampler
    return kind(ranks, *args)


class _TellingSampler(DeviceSampler):
    def __init__(self, ranks: Ranks, *args: Any) -> None:
        super().__init__(*args)
        self._ranks = ranks

    def sample(
        self,
        logits: Tensor,
        step: DeviceStep,
        batch: DeviceInputBatch,
        masks: Masks | None,
    ) -> Tensor:
        return self._ranks.broadcast(super().sample(logits, step, batch, masks))


class _ToldSampler(_TellingSampler):
    def sample(
        self,
        logits: Tensor,
        step: DeviceStep,
        batch: DeviceInputBatch,
        masks: Masks | None,
    ) -> Tensor:
        shape = (logits.shape[0],)
        return self._ranks.broadcast(torch.empty(shape, dtype=torch.int64, device=logits.device))

    def fetch(
        self, logits: Tensor, token_ids: Tensor, step: DeviceStep, batch: DeviceInputBatch
    ) -> Drawn:
        wanted = batch.rows.num_logprobs[step.rows.rows]
        return Drawn(self._to_host(token_ids), None, wanted)
