"""The processes of the other ranks: started, watched and ended by the first one's."""

from __future__ import annotations

import logging
import pickle
import shutil
import subprocess
import tempfile
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import torch
import torch.distributed as dist

from streamserve.core.plan import ModelRunner
from streamserve.engine.child import start_child
from streamserve.errors import DeviceDeadError, ModelLoadError, StreamServeError
from streamserve.models.tensor_parallel.ranks import ProcessRanks
from streamserve.runner.tensor_parallel.lead import STEP_LIMIT_S, LeadRunner
from streamserve.runner.tensor_parallel.messages import Message

logger = logging.getLogger(__name__)

_MEET_LIMIT_S = 120.0
_END_LIMIT_S = 10.0
_LOOK_EVERY_S = 0.5
_NOTICE_LIMIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Order:
    """The first thing that a rank's process is sent: what it is to be."""

    args: Namespace
    rank: int
    size: int
    meeting_point: str
    num_threads: int  # on a CPU


@dataclass(frozen=True, slots=True)
class Failed:
    """The last thing that a rank's process sends."""

    error: StreamServeError | str


def meet(order: Order, device: torch.device) -> ProcessRanks:
    """Returns when all ranks have come. Raises RuntimeError when one does not."""
    store = cast(Any, dist).FileStore(order.meeting_point, order.size)
    store.set_timeout(timedelta(seconds=_MEET_LIMIT_S))
    limit = timedelta(seconds=STEP_LIMIT_S)
    return ProcessRanks(store, order.rank, order.size, device, limit)


class Workers:
    """`Followers` in processes of their own. Any thread may call.

    They have no terminal and take no signals: they end when they are told to, or when this process
    is gone.
    """

    def __init__(self, orders: list[Order]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: dict[Connection, int] = {}
        self._inbox: dict[int, list[Any]] = {order.rank: [] for order in orders}
        self._news = threading.Condition()
        self._failure: DeviceDeadError | None = None
        self._cause: StreamServeError | str | None = None
        self._listeners: list[Callable[[DeviceDeadError], None]] = []
        self._is_closing = False
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        try:
            for order in orders:
                process, sock = start_child("streamserve.cli.rank_main")
                self._processes.append(process)
                connection = Connection(sock.detach())
                self._connections[connection] = order.rank
                connection.send(order)
        except BaseException:
            self._kill()
            raise
        self._threads = [
            threading.Thread(target=work, name=f"streamserve-ranks-{name}", daemon=True)
            for name, work in (("in", self._receive), ("out", self._write))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pids(self) -> list[int]:
        """Of the other ranks, in their order."""
        return [process.pid for process in self._processes]

    @property
    def failure(self) -> DeviceDeadError | None:
        """See `Followers`."""
        return self._failure

    @property
    def cause(self) -> StreamServeError | None:
        """What a rank said that could not start, or that one has died; None: all are well."""
        self._wait_for_failure()
        if self._failure is None or isinstance(self._cause, StreamServeError):
            return self._cause if isinstance(self._cause, StreamServeError) else None
        return ModelLoadError(f"a rank could not start: {self._cause or self._failure}")

    def send(self, message: Message | int) -> None:
        """See `Followers`."""
        self._outbox.put(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def answers(self) -> list[Any]:
        """The next thing that each rank sends. Raises DeviceDeadError when one is gone."""
        with self._news:
            while self._failure is None and not all(self._inbox.values()):
                self._news.wait()
            if self._failure is not None:
                raise self._failure
            return [inbox.pop(0) for inbox in self._inbox.values()]

    def on_failure(self, tell: Callable[[DeviceDeadError], None]) -> None:
        """See `Followers`."""
        self._listeners.append(tell)
        if self._failure is not None:
            tell(self._failure)

    def fail(self, error: DeviceDeadError) -> None:
        """See `Followers`."""
        # One that is gone breaks the sums of the others, who may notice first.
        self._wait_for_failure()
        self._fail(error)

    def _wait_for_failure(self) -> None:
        with self._news:
            self._news.wait_for(lambda: self._failure is not None, _NOTICE_LIMIT_S)

    def _fail(self, error: DeviceDeadError) -> None:
        with self._news:
            if self._failure is not None or self._is_closing:
                return
            self._failure = error
            self._news.notify_all()
        self._kill()
        for tell in reversed(self._listeners):  # who waits hears of it first
            tell(error)

    def close(self) -> None:
        """See `Followers`."""
        self._is_closing = True
        self._outbox.put(None)  # behind what was sent
        for process in self._processes:
            try:
                process.wait(0.0 if self._failure is not None else _END_LIMIT_S)
            except subprocess.TimeoutExpired:
                logger.warning("rank's process %d does not end: killed", process.pid)
                process.kill()
                process.wait()
        for thread in self._threads:
            thread.join()
        for connection in self._connections:
            connection.close()

    def kill(self) -> None:
        """Ends them at once, where nothing is lost."""
        self._is_closing = True
        self._kill()
        self.close()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            for connection in self._connections:
                try:
                    connection.send_bytes(message)
                except OSError:
                    continue  # it is gone, and the other thread says so

    def _receive(self) -> None:
        open_ones = dict(self._connections)
        while open_ones and not (self._is_closing and self._failure is not None):
            for found in wait(list(open_ones), _LOOK_EVERY_S):
                assert isinstance(found, Connection)
                try:
                    self._take(open_ones[found], found.recv())
                except (EOFError, OSError):
                    self._miss(open_ones.pop(found))

    def _take(self, rank: int, message: Any) -> None:
        if isinstance(message, Failed):
            self._cause = self._cause or message.error
            self._fail(DeviceDeadError(f"rank {rank} has failed: {message.error}"))
            return
        with self._news:
            self._inbox[rank].append(message)
            self._news.notify_all()

    def _miss(self, rank: int) -> None:
        if not self._is_closing:
            pid = self._processes[rank - 1].pid
            self._fail(DeviceDeadError(f"rank {rank} (process {pid}) has died"))


class LeadingTeam:
    """`Team` of the first rank: it starts the others. ``num_threads``: of each rank on a CPU."""

    def __init__(self, args: Namespace, path: Path, device: torch.device) -> None:
        """Returns when all have met. Raises what one says that cannot start."""
        size = args.tensor_parallel_size
        given = {name: value for name, value in vars(args).items() if not callable(value)}
        # The tokenizer and the rest of what serves are the first rank's alone.
        plain = Namespace(**{**given, "model": str(path), "revision": None})
        self.num_threads = num_threads = max(1, torch.get_num_threads() // size)
        directory = tempfile.mkdtemp(prefix="streamserve-")
        try:
            orders = [
                Order(plain, rank, size, f"{directory}/ranks", num_threads) for rank in range(size)
            ]
            self.workers = Workers(orders[1:])
            try:
                self.workers.answers()
                self.workers.send(0)
                self.ranks = meet(orders[0], device)
                self.workers.on_failure(lambda _error: self.ranks.abort())
                self.workers.answers()
            except BaseException as error:
                self.abandon(error)
                raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def least(self, number: int) -> int:
        """See `Team`."""
        found: int = min(number, *self.workers.answers())
        self.workers.send(found)
        return found

    def steer(self, own: ModelRunner, commands: Mapping[str, Callable[[], None]]) -> LeadRunner:
        """See `Team`."""
        return LeadRunner(own, self.workers, commands, release=self.ranks.close)

    def abandon(self, error: BaseException) -> None:
        """Ends the other ranks, since the start ends with ``error``.

        Raises what one of them has said in its place, where that is why.
        """
        is_said = isinstance(error, StreamServeError) and not isinstance(error, DeviceDeadError)
        is_own = is_said or not isinstance(error, Exception)  # an interrupt
        cause = None if is_own else self.workers.cause
        self.workers.kill()
        if cause is not None:
            raise cause from error
