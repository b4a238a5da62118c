"""A client that leaves cancels the work that is done for it."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive


class ClientGoneError(Exception):
    """The client has left: there is nobody to answer."""


class DisconnectGuard:
    """``async with``: the body is cancelled when the client leaves, and ``ClientGoneError`` raised.

    One task beside the caller's own. The request's body must have been read: whatever ``receive``
    still says can only be a disconnect.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_armed = True
        self._is_gone = False

    def release(self) -> None:
        """The answer is complete: a client that leaves from here on has what it asked for."""
        self._is_armed = False

    async def __aenter__(self) -> DisconnectGuard:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._num_cancelling = task.cancelling()
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_armed = False
        self._watcher.cancel()
        # As in ``asyncio.timeout``: a cancellation that is not ours goes its own way.
        if self._is_gone and self._task.uncancel() <= self._num_cancelling:
            if exc_type is asyncio.CancelledError:
                raise ClientGoneError from exc

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._is_armed:
            self._is_gone = True
            self._task.cancel()
