"""What the process of a rank but the first runs: it loads its share and follows.

It ends when it is told to, and when the first rank is gone: whatever it does then, or waits for.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from streamserve.cli.compose import builder_of, set_up
from streamserve.cli.ranks import Failed, Order, meet
from streamserve.core.plan import ModelRunner
from streamserve.errors import StreamServeError
from streamserve.models.tensor_parallel.ranks import Ranks
from streamserve.runner.tensor_parallel.follow import follow
from streamserve.runner.tensor_parallel.lead import LeadRunner


class _Leader:
    """The first rank, as another one sees it."""

    def __init__(self, fd: int) -> None:
        self._connection = Connection(fd)
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._read, name="streamserve-leader", daemon=True).start()

    def send(self, message: Any) -> None:
        self._connection.send(message)

    def receive(self) -> Any:
        return self._inbox.get()

    def fail(self, error: BaseException) -> None:
        """Says why, and is gone."""
        said = error if isinstance(error, StreamServeError) else repr(error)
        with suppress(OSError):
            self._connection.send(Failed(said))
        os._exit(1)

    def _read(self) -> None:
        while True:
            try:
                self._inbox.put(self._connection.recv())
            except (EOFError, OSError):
                os._exit(1)


class _FollowingTeam:
    """`Team` of a rank but the first."""

    def __init__(self, ranks: Ranks, leader: _Leader) -> None:
        self.ranks = ranks
        self._leader = leader

    def least(self, number: int) -> int:
        self._leader.send(number)
        found: int = self._leader.receive()
        return found

    def steer(self, own: ModelRunner, commands: Mapping[str, Callable[[], None]]) -> LeadRunner:
        follow(self._leader.receive, own, commands, self._leader.fail)
        raise SystemExit(0)


def main(fd: int) -> None:
    """Be the rank that the first message says."""
    # Whoever ends the server ends the first rank, which lets answers finish.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    leader = _Leader(fd)
    try:
        _run(leader.receive(), leader)
    except SystemExit:
        os._exit(0)  # no thread is waited for that waits for another rank
    except BaseException as error:
        leader.fail(error)


def _run(order: Order, leader: _Leader) -> None:
    def quiet(_line: str) -> None:
        """The first rank says it."""

    torch.set_num_threads(order.num_threads)
    setup = set_up(order.args, quiet, quiet, rank=order.rank)
    leader.send("ready")
    leader.receive()
    ranks = meet(order, setup.device)
    leader.send("met")
    builder_of(replace(setup, team=_FollowingTeam(ranks, leader))).build()
