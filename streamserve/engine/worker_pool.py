"""Warm processes for work that would hold the interpreter lock for more than a millisecond.

A worker that dies, or works longer than it may, is killed and replaced, and the work that it had
gets an error. Nothing here outlives the server: a worker whose socket is closed ends.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable

from streamserve.engine.child import start_child
from streamserve.engine.turns import Turns
from streamserve.engine.worker_main import ANSWER_HEAD, DONE, REQUEST_HEAD, Handler
from streamserve.errors import EngineError

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0
_STREAM_LIMIT = 2**20
_NICENESS = 5


class WorkerTimeoutError(Exception):
    """The work took longer than it may; its worker is gone."""


class _Worker:
    """One process and the socket to it. Does one piece of work at a time."""

    def __init__(self, factory: Callable[[], Handler]) -> None:
        self._process, self._socket = start_child("streamserve.engine.worker_main")
        self._first = pickle.dumps((_NICENESS, factory))
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    async def warm_up(self) -> None:
        """Return when the worker is ready. Raises what ``call`` raises."""
        if self._streams is None:
            await self._exchange(self._first, _START_TIMEOUT_S)

    async def call(self, payload: bytes, timeout_s: float) -> bytes:
        """The handler's answer, or raises what it raised.

        Raises ``WorkerTimeoutError``, and ``EngineError`` if the worker has died. After those two,
        and a cancellation, it must be closed.
        """
        await self.warm_up()
        return await self._exchange(payload, timeout_s)

    async def _exchange(self, payload: bytes, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await self._connect()
                writer.write(REQUEST_HEAD.pack(len(payload), timeout_s))
                writer.write(payload)
                head = await reader.readexactly(ANSWER_HEAD.size)
                length, outcome = ANSWER_HEAD.unpack(head)
                answer = await reader.readexactly(length)
        except TimeoutError:
            raise WorkerTimeoutError from None
        except (OSError, asyncio.IncompleteReadError) as error:
            raise WorkerDiedError from error
        if outcome == DONE:
            return answer
        raise pickle.loads(answer)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(
                sock=self._socket, limit=_STREAM_LIMIT
            )
        return self._streams

    def close(self) -> None:
        """Kill the process. Idempotent."""
        self._process.kill()
        if self._streams is not None:
            self._streams[1].close()
        else:
            self._socket.close()
        # It is as good as dead, but a large one takes milliseconds to go.
        asyncio.get_running_loop().run_in_executor(None, self._process.wait)


class WorkerDiedError(EngineError):
    """The process that had the work is gone."""

    def __init__(self) -> None:
        super().__init__("the process that prepared the prompt has died", code="worker_died")


class WorkerPool:
    """Up to ``max_workers`` processes, of which one is kept warm. Event-loop thread only.

    Work goes to the first that is idle: what one has remembered is worth most if it gets it all.
    """

    def __init__(self, factory: Callable[[], Handler], *, max_workers: int = 2) -> None:
        """``factory`` is pickled; it is called in each worker and returns what does the work."""
        self._factory = factory
        self._workers: list[_Worker | None] = [None] * max_workers
        self._is_busy = [False] * max_workers
        self._turns = Turns(max_workers)
        self._warming: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def pids(self) -> list[int]:
        """Of the processes that there are, idle or busy."""
        return [worker.pid for worker in self._workers if worker is not None]

    def start(self) -> None:
        """Begin to warm the first worker, before any work; that may come before it is ready."""
        self._warming = asyncio.create_task(self._warm_first(), name="streamserve-warm-worker")

    async def call(self, payload: bytes, *, timeout_s: float, owner: str = "") -> bytes:
        """What the handler makes of ``payload``. Owners have workers in turn.

        Raises what it raises, ``WorkerTimeoutError`` when that takes longer than ``timeout_s``, not
        counting the wait for a worker, and ``EngineError`` when the worker dies.
        """
        if self._warming is not None and not self._warming.done():
            await asyncio.wait([self._warming])  # sooner ready than another that starts now
        async with self._turns.place(owner):
            place = self._is_busy.index(False)
            self._is_busy[place] = True
            try:
                return await self._work(place, payload, timeout_s)
            finally:
                self._is_busy[place] = False

    def close(self) -> None:
        """Kill all workers. Idempotent; what they were doing raises ``EngineError``."""
        self._is_closed = True
        if self._warming is not None:
            self._warming.cancel()
        for place in range(len(self._workers)):
            self._drop(place)

    async def _warm_first(self) -> None:
        async with self._turns.place(""):
            self._is_busy[0] = True
            try:
                await self._worker(0).warm_up()
            except (WorkerTimeoutError, EngineError):
                logger.exception("a worker process did not start")
                self._drop(0)
            finally:
                self._is_busy[0] = False

    async def _work(self, place: int, payload: bytes, timeout_s: float) -> bytes:
        try:
            return await self._worker(place).call(payload, timeout_s)
        except WorkerDiedError:
            logger.exception("a worker process has died")
            self._drop(place)
            raise
        except (WorkerTimeoutError, asyncio.CancelledError):
            self._drop(place)
            raise

    def _worker(self, place: int) -> _Worker:
        if self._is_closed:
            raise EngineError("the server is shutting down")
        worker = self._workers[place]
        if worker is not None and worker.is_dead:
            logger.error("worker process %d has died while it was idle", worker.pid)
            self._drop(place)
            worker = None
        if worker is None:
            worker = self._workers[place] = _Worker(self._factory)
        return worker

    def _drop(self, place: int) -> None:
        worker, self._workers[place] = self._workers[place], None
        if worker is not None:
            worker.close()
