"""How the frames of a started response reach the socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from orjson import dumps
from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from streamserve.engine.stream import TextSink

LINGER_S = 5.0
"""How long a connection that was closed after an error may take to deliver what it holds."""


class FrameWriter(Protocol):
    """Writes parts of a response's body. Each part arrives whole or not at all."""

    num_written: int
    """Parts so far."""

    @property
    def is_full(self) -> bool:
        """Whether the next part must wait for room, as far as the server says."""

    def write(self, body: bytes) -> Awaitable[None] | None:
        """Send ``body``; what is returned, if anything, must be awaited before the next call."""

    def write_now(self, body: bytes) -> bool:
        """Send ``body`` if nothing would have to be awaited; otherwise ``False``, and not sent."""

    def text_sink(self, head: bytes, tail: bytes, sent: Callable[[], object]) -> TextSink | None:
        """As ``write_now`` for frames that hold a text, as JSON, between ``head`` and ``tail``.

        ``sent`` is called for each that was sent. ``None``: such frames would have to be awaited.
        """

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
        self.num_written = 0

    @property
    def is_full(self) -> bool:
        return True

    def write(self, body: bytes) -> Awaitable[None]:
        self.num_written += 1
        return self._send({"type": "http.response.body", "body": body, "more_body": True})

    def write_now(self, body: bytes) -> bool:
        return False

    def text_sink(self, head: bytes, tail: bytes, sent: Callable[[], object]) -> None:
        return None

    def end_now(self, body: bytes) -> None:
        """ASGI has no word for it."""

    def close_connection(self) -> None:
        """Nor for this."""


class UvicornWriter:
    """uvicorn's way without its message: what ``RequestResponseCycle.send`` does for such a body.

    Saves a dict, a coroutine and a dozen checks per token. The last part of a body must go
    through ``send``: the cycle then ends itself.
    """

    __slots__ = ("_cycle", "_flow", "_write", "num_written")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._write = cycle.transport.write
        self.num_written = 0

    @property
    def is_full(self) -> bool:
        return self._flow.write_paused

    def write(self, body: bytes) -> Awaitable[None] | None:
        self.num_written += 1
        if self._cycle.disconnected:
            return None
        self._write(b"%x\r\n%b\r\n" % (len(body), body))
        return self._flow.drain() if self._flow.write_paused else None

    def write_now(self, body: bytes) -> bool:
        if self._flow.write_paused:
            return False
        self.num_written += 1
        if not self._cycle.disconnected:
            self._write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    def text_sink(self, head: bytes, tail: bytes, sent: Callable[[], object]) -> TextSink:
        cycle, flow, write = self._cycle, self._flow, self._write
        num_around = len(head) + len(tail)

        def sink(text: str) -> bool:
            if flow.write_paused:
                return False
            content = dumps(text)
            if not cycle.disconnected:
                size = num_around + len(content)
                write(b"%x\r\n%b%b%b\r\n" % (size, head, content, tail))
            self.num_written += 1
            sent()
            return True

        return sink

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
