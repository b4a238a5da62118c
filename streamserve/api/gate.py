"""Who is let in while the server runs, and who is waited for when it is to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from streamserve.api.errors import HttpError, shutting_down


class Gate:
    """Who may come in, and how many are inside.

    Shutting down has two parts: ``close`` turns newcomers away, ``wait_empty`` returns when the
    last of those inside has left. Whoever comes back to an answer that is there is no newcomer.
    """

    def __init__(self, retry_after_s: float) -> None:
        self._retry_after_s = retry_after_s
        self._num_inside = 0
        self._is_open = True
        self._arriving: set[asyncio.Timeout] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def is_open(self) -> bool:
        """Whether new requests are taken."""
        return self._is_open

    @property
    def num_inside(self) -> int:
        """Requests between their arrival and their last byte, and answers that wait for readers."""
        return self._num_inside

    def check_open(self) -> None:
        """Raise ``HttpError`` 503 when closed."""
        if not self._is_open:
            raise self.refusal()

    @contextmanager
    def enter(self, *, goes_on: bool = False) -> Iterator[None]:
        """Hold a place while a request is served. Raises ``HttpError`` 503 when closed.

        ``goes_on``: it asks for no new work, so that it may come at any time.
        """
        if not goes_on:
            self.check_open()
        self._num_inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._empty.set()

    @asynccontextmanager
    async def arriving(self) -> AsyncIterator[None]:
        """Receive a request inside: raises ``HttpError`` 503 when the gate closes meanwhile."""
        timeout = asyncio.timeout(None)
        self._arriving.add(timeout)
        try:
            async with timeout:
                yield
        except TimeoutError:
            raise self.refusal() from None
        finally:
            self._arriving.discard(timeout)

    def refusal(self) -> HttpError:
        """What whoever is turned away is told."""
        return shutting_down(self._retry_after_s)

    def close(self) -> None:
        """Take no new requests, nor those that are not all there."""
        self._is_open = False
        now = asyncio.get_running_loop().time()
        while self._arriving:
            self._arriving.pop().reschedule(now)

    async def wait_empty(self) -> None:
        """Return when nobody is inside."""
        await self._empty.wait()
