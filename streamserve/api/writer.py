"""How the frames of a started response reach the socket."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class FrameWriter(Protocol):
    """Writes parts of a response's body. Each part arrives whole or not at all."""

    def write(self, body: bytes) -> Awaitable[None] | None:
        """Send ``body``; what is returned, if anything, must be awaited before the next call."""

    def write_now(self, body: bytes) -> bool:
        """Send ``body`` if nothing would have to be awaited; otherwise ``False``, and not sent."""

    def close_connection(self) -> None:
        """End the connection once what was sent has left, if the server lets us."""


class AsgiWriter:
    """Any ASGI server's way."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def write(self, body: bytes) -> Awaitable[None]:
        return self._send({"type": "http.response.body", "body": body, "more_body": True})

    def write_now(self, body: bytes) -> bool:
        return False

    def close_connection(self) -> None:
        """ASGI has no word for it."""


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

    def close_connection(self) -> None:
        self._cycle.transport.close()


def writer_of(send: Send) -> FrameWriter:
    """The fastest writer for a response whose start has been sent through ``send``."""
    cycle = getattr(send, "__self__", None)
    if isinstance(cycle, RequestResponseCycle) and cycle.chunked_encoding:
        return UvicornWriter(cycle)
    return AsgiWriter(send)
