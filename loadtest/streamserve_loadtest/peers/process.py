"""A server as a process group: started, waited for, stopped in between, ended for certain."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_POLL_S = 0.05
_TERMINATE_S = 10.0
_LOG_TAIL = 1500


class PeerError(Exception):
    """A server that did not start, died or hangs; the message says which and shows its log."""


class ServerProcess:
    """One running server. Its group is frozen while others are measured: some spin when idle."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], port: int, log: Path
    ) -> None:
        self.command = tuple(command)
        self.port = port
        self._log = log
        self._started = time.monotonic()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process that was started, which leads its group."""
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_alive(self) -> bool:
        """Whether the process that was started still runs."""
        return self._process.poll() is None

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended, or does before so many seconds have passed."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def log_tail(self) -> str:
        """The end of what it printed."""
        return self._log.read_bytes()[-_LOG_TAIL:].decode("utf-8", "replace")

    def wait_until_ready(
        self, path: str, timeout_s: float, on_wait: Callable[[float], None] | None = None
    ) -> float:
        """Seconds from the command until ``path`` answers 200. Raises ``PeerError``."""
        while True:
            elapsed = time.monotonic() - self._started
            if not self.is_alive:
                code = self._process.returncode
                raise PeerError(f"ended with {code} while starting:\n{self.log_tail}")
            if elapsed > timeout_s:
                raise PeerError(f"not ready after {timeout_s:g} s:\n{self.log_tail}")
            if _answers(self.port, path):
                return elapsed
            if on_wait is not None:
                on_wait(elapsed)
            time.sleep(_POLL_S)

    def freeze(self) -> None:
        """Take it off the processors."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it and everything that it started."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(_TERMINATE_S)
        except subprocess.TimeoutExpired:
            pass
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
