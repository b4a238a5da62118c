"""How the frames of a started response reach the socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol

from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

LINGER_S = 5.0
"""How long a connection that was closed after an error may take to deliver what it holds."""


class FrameWriter(Protocol):
    """Writes parts of a response's body. Each part arrives whole or not at all."""

    def write(self, body: bytes) -> Awaitable[None] | None:
        """Send ``body``; what is returned, if anything, must be awaited before the next call."""

    def write_now(self, body: bytes) -> bool:
        """Send ``body`` if nothing would have to be awaited; otherwise ``False``, and not sent."""

    def end_now(self, body: bytes) -> None:
        """Put the response's last part behind what waits for room already, if the server lets us.

        The connection must be closed next.
        """

    def close_connection(self) -> None:
        """End the connection once what was sent has left, or soon, if the server lets us."""


class AsgiWriter:
    """Any ASGI server's way."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def write(self, body: bytes) -> Awaitable[None]:
        return self._send({"type": "http.response.body", "body": body, "more_body": True})

    def write_now(self, body: bytes) -> bool:
        return False

    def end_now(self, body: bytes) -> None:
        """ASGI has no word for it."""

    def close_connection(self) -> None:
        """Nor for this."""


class UvicornWriter:
    """uvicorn's way without its message: what ``RequestResponseCycle.send`` does for such a body.

    Saves a dict, a coroutine and a dozen checks per token. The last part of a body must go
    through ``send``: the cycle then ends itself.
    """

    __slots__ = ("_cycle", "_flow", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._write = cycle.transport.write

    def write(self, body: bytes) -> Awaitable[None] | None:
        if self._cycle.disconnected:
            return None
        self._write(b"%x\r\n%b\r\n" % (len(body), body))
        return self._flow.drain() if self._flow.write_paused else None

    def write_now(self, body: bytes) -> bool:
        if self._flow.write_paused:
            return False
        if not self._cycle.disconnected:
            self._write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    def end_now(self, body: bytes) -> None:
        cycle = self._cycle
        if cycle.disconnected or cycle.response_complete:
            return
        assert body, "what follows would look like a success"
        self._write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        cycle.response_complete = True  # as ``send`` would
        cycle.message_event.set()
        cycle.transport.close()
        cycle.on_response()

    def close_connection(self) -> None:
        transport = self._cycle.transport
        transport.close()
        # A reader that does not read would keep what it was sent here for ever.
        asyncio.get_running_loop().call_later(LINGER_S, transport.abort)


def writer_of(send: Send) -> FrameWriter:
    """The fastest writer for a response whose start has been sent through ``send``."""
    cycle = getattr(send, "__self__", None)
    if isinstance(cycle, RequestResponseCycle) and cycle.chunked_encoding:
        return UvicornWriter(cycle)
    return AsgiWriter(send)
