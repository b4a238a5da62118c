"""The server's side of the worker process that tries grammars."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

from streamserve.engine.child import start_child

_CLOSE_S = 5.0


class Task(NamedTuple):
    """A grammar to be tried, in the fields of ``StructuredOutput``."""

    kind: str
    text: str
    whitespace_pattern: str | None


class Verdict(NamedTuple):
    """llguidance's notation of a good grammar, or what is wrong with it."""

    grammar: str
    error: str


class GrammarTrial:
    """Starts the worker when it is first needed, and again after it has died. One thread."""

    def __init__(
        self,
        special_tokens: Sequence[bytes] = (),
        *,
        cpu_limit_s: float = 1.0,
        memory_limit: int = 2**30,
    ) -> None:
        """``cpu_limit_s`` is of processor time, so that a busy machine refuses nothing.

        Each tool, or tag of a structural tag, adds a fortieth of a second to it.
        """
        self._special_tokens = list(special_tokens)
        self._cpu_limit_s = cpu_limit_s
        self._memory_limit = memory_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._is_closed = False

    def __call__(self, task: Task) -> Verdict:
        """What the worker says, however long it takes; that it is too large if it dies of it."""
        try:
            return self._ask(task)
        finally:
            if self._is_closed:  # meanwhile
                self._end()

    def close(self) -> None:
        """End the worker. Idempotent; from any thread."""
        self._is_closed = True
        self._end()

    def _ask(self, task: Task) -> Verdict:
        if self._process is not None and self._process.poll() is not None:
            self._end()  # it has died of something else, while it had nothing to do
        try:
            connection = self._connection or self._start()
            connection.send(tuple(task))
            connection.poll(None)  # another thread may close meanwhile, which recv would not bear
            return Verdict(*connection.recv())
        except (EOFError, OSError):
            pass  # it has closed its end: it is about to be dead
        return Verdict("", self._why())

    def _end(self) -> None:
        connection, self._connection = self._connection, None
        process, self._process = self._process, None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            process.wait(_CLOSE_S)

    def _start(self) -> Connection:
        self._process, ours = start_child(
            "streamserve.engine.grammar_worker",
            self._cpu_limit_s,
            self._memory_limit,
            is_silent=True,
        )
        self._connection = Connection(ours.detach())
        self._connection.send(self._special_tokens)
        return self._connection

    def _why(self) -> str:
        """Clean up behind a worker that gave no answer."""
        process = self._process
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_CLOSE_S)
        status = None if process is None else process.poll()
        self._end()
        if status == -signal.SIGPROF:
            return f"too complex: it takes longer than the limit of {self._cpu_limit_s:g} s"
        return f"too complex: it needs more than the limit of {self._memory_limit >> 20} MiB"
