"""Ranks as threads of one process, and what they find."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

from streamserve.models import load_model
from streamserve.models.tensor_parallel.config import share_config
from streamserve.models.tensor_parallel.decoder import ShareDecoder

T = TypeVar("T")
TIMEOUT_S = 60


class ThreadRanks:
    """One of several that meet at ``barrier`` and leave what they have in ``places``."""

    def __init__(self, rank: int, barrier: Barrier, places: list[Tensor | None]) -> None:
        self.rank, self.size = rank, len(places)
        self.num_reduced = 0
        self._barrier, self._places = barrier, places

    def all_reduce(self, x: Tensor) -> Tensor:
        self.num_reduced += 1
        return x.copy_(torch.stack(self._exchange(x)).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x))

    def broadcast(self, x: Tensor) -> Tensor:
        return x.copy_(self._exchange(x)[0])

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._places[self.rank] = x.clone()
        self._barrier.wait(TIMEOUT_S)
        found = list(self._places)
        self._barrier.wait(TIMEOUT_S)
        return found


def thread_ranks(size: int) -> list[ThreadRanks]:
    barrier, places = Barrier(size), [None] * size
    return [ThreadRanks(rank, barrier, places) for rank in range(size)]


def load_shares(directory: Path, config, size: int, **options) -> list[ShareDecoder]:
    return [
        load_model(directory, config=share_config(config, ranks.rank, size), ranks=ranks, **options)
        for ranks in thread_ranks(size)
    ]


def on_every_rank(shares: list[ShareDecoder], work: Callable[[ShareDecoder], T]) -> list[T]:
    """What ``work`` finds with each of the shares, all at once."""
    barrier = shares[0]._ranks._barrier

    def guarded(share: ShareDecoder) -> T:
        try:
            return work(share)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(guarded, shares))
