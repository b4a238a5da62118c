"""What the processes that share a model do together."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(Protocol):
    """Every rank makes the same calls in the same order; each waits for the slowest.

    A call raises RuntimeError when a rank is gone, or has not come within the time allowed.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, in its place if it is contiguous."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """``x`` [N, …] of every rank, in their order: [ranks, N, …]."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """The first rank's ``x``, which the others' is overwritten with."""
        ...


class ProcessRanks:
    """Over torch's own groups: NCCL between GPUs, gloo between CPUs.

    Calls are queued in the order of the device's current stream. No group of the whole process is
    made or needed: a program may have others.
    """

    def __init__(
        self, store: Any, rank: int, size: int, device: torch.device, timeout: timedelta
    ) -> None:
        """Meets the others at ``store``, one of torch's; returns when all are there.

        Raises RuntimeError.
        """
        self.rank, self.size = rank, size
        self._device = device
        self._is_aborted = False
        self._group = _group(store, rank, size, device, timeout)

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        _wait(self._group.allreduce([x], _options("AllreduceOptions")))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        found = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        _wait(self._group._allgather_base(found, x, _options("AllgatherOptions")))
        return found.view(self.size, *x.shape)

    def broadcast(self, x: Tensor) -> Tensor:
        _wait(self._group.broadcast([x], _options("BroadcastOptions")))
        return x

    def abort(self) -> None:
        """Ends what waits for a rank that is gone, with an error. Any thread; nothing comes after.

        gloo finds out by itself: the others' connections break.
        """
        if self._device.type == "cuda" and not self._is_aborted:
            self._is_aborted = True
            self._group.abort()

    def close(self) -> None:
        """Once nobody calls any more."""
        self._group.shutdown()


def _options(name: str) -> Any:
    options = getattr(dist.distributed_c10d, name)()
    # On the current stream itself: no other one waits for it, also in a graph.
    options.asyncOp = False
    return options


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()


def _group(store: Any, rank: int, size: int, device: torch.device, timeout: timedelta) -> Any:
    # Not in torch's annotations.
    untyped: Any = dist
    if device.type == "cuda":
        options = untyped.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return untyped.ProcessGroupNCCL(store, rank, size, options)
    options = untyped.ProcessGroupGloo._Options()
    options._timeout = timeout
    # Nobody else's network: the ranks are on one machine.
    options._devices = [untyped.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return untyped.ProcessGroupGloo(store, rank, size, options)
