"""A response of server-sent events: its start, its pings, its end. What is sent is a subclass's."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, Required, TypedDict

from sse_starlette.sse import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

from streamserve.api.disconnect import DisconnectGuard
from streamserve.api.frames import PING
from streamserve.api.writer import AsgiWriter, FrameWriter, writer_of
from streamserve.errors import EngineError

logger = logging.getLogger(__name__)


class ReaderStalledError(EngineError):
    """The reader took nothing for too long."""

    status = 408

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"The reader left the connection full for {timeout_s:g} s", code="reader_stalled"
        )


class SseOptions(TypedDict, total=False):
    """What ``SseResponse`` is told whatever it sends: its subclasses hand it on."""

    headers: Required[Mapping[str, str]]
    ping_interval_s: Required[float]
    raw_send: Required[Send]
    stall_timeout_s: Required[float]
    on_stall: Required[Callable[[], None]]
    guard: DisconnectGuard | None


class _Nothing:
    """Stands in for the body iterator, which the token path does not use."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        raise NotImplementedError


class SseResponse(EventSourceResponse):
    """``name`` says in the log what it is an answer to.

    ``raw_send`` is the server's own ``send``, past the middlewares. Raises ``ClientGoneError``;
    ``guard`` is one that the caller holds already. A reader that leaves the connection full for
    ``stall_timeout_s`` gets an error instead of the rest, and ``on_stall`` is called.

    The base class serves a response with four tasks in a group of anyio's, which is 0.2 ms before
    the first byte; here the caller's own task sends, one more listens for the disconnect, and a
    ping is a timer. Its fourth would cancel every stream on SIGTERM: draining is ours.
    """

    def __init__(
        self,
        name: str,
        *,
        headers: Mapping[str, str],
        ping_interval_s: float,
        raw_send: Send,
        stall_timeout_s: float,
        on_stall: Callable[[], None],
        guard: DisconnectGuard | None = None,
        ping: bytes = PING,
    ) -> None:
        super().__init__(
            _Nothing(), headers={"Cache-Control": "no-cache", **headers}, ping=ping_interval_s
        )
        del self.headers["Connection"]  # the server's to say: it may close after this response
        self._name = name
        self._raw_send = raw_send
        self._stall_timeout_s = stall_timeout_s
        self._on_stall = on_stall
        self._guard = guard
        self._ping_frame = ping
        self._writer: FrameWriter = AsgiWriter(raw_send)
        self._num_written_before = 0  # when the timer last rang, or pinged
        self._ping_timer: asyncio.TimerHandle | None = None
        self._pinging: asyncio.Task[None] | None = None

    @abstractmethod
    async def _send_events(self) -> None:
        """Send everything; ``_send_last`` ends it. Headers are out."""

    @abstractmethod
    def _failure(self, exc: Exception) -> bytes:
        """The event that ends a response which failed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with AsyncExitStack() as stack:
                if self._guard is None:
                    self._guard = await stack.enter_async_context(DisconnectGuard(receive))
                await self._stream_response(send)
        finally:
            self.active = False
            self._stop_comments()

    async def _stream_response(self, send: Send) -> None:
        start: Message = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        try:
            await send(start)
            self._writer = writer_of(self._raw_send)
            self._start_ping_timer()
            await self._send_events()
        except EngineError as exc:
            await self._fail(exc)
        except Exception as exc:
            logger.exception("%s failed while it was streamed", self._name)
            await self._fail(exc)

    async def _fail(self, exc: Exception) -> None:
        """Headers are out: one event says what happened, and nothing looks like a success."""
        body = self._failure(exc)
        try:
            if isinstance(exc, ReaderStalledError):
                raise exc
            await self._send_last(body)
        except ReaderStalledError:
            self._on_stall()
            self._end()
            self._writer.end_now(body)
        # So that no client takes the answer for complete.
        self._writer.close_connection()

    async def _send(self, body: bytes) -> None:
        if (writing := self._writer.write(body)) is not None:
            await self._until_room(writing)

    async def _send_last(self, body: bytes) -> None:
        self._end()
        message = {"type": "http.response.body", "body": body, "more_body": False}
        sending = self._raw_send(message)
        await (self._until_room(sending) if self._writer.is_full else sending)

    async def _until_room(self, writing: Awaitable[Any]) -> None:
        """Wait for what ``FrameWriter.write`` returned. Raises ``ReaderStalledError``."""
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await writing
        except TimeoutError:
            raise ReaderStalledError(self._stall_timeout_s) from None

    def _end(self) -> None:
        """No comment may follow, and a reader that leaves has what there is."""
        self.active = False
        if self._guard is not None:
            self._guard.release()

    def _start_ping_timer(self) -> None:
        self._ping_timer = asyncio.get_running_loop().call_later(self.ping_interval, self._on_timer)

    def _on_timer(self) -> None:
        """Ping if nothing was sent since the last time, and nobody waits for a full socket."""
        if not self.active:
            return
        is_pinging = self._pinging is not None and not self._pinging.done()
        num_written = self._writer.num_written
        if num_written == self._num_written_before and not is_pinging:
            self._pinging = asyncio.create_task(self._ping(self._raw_send))
        self._num_written_before = num_written
        self._start_ping_timer()

    async def _ping(self, send: Send) -> None:
        """Send a ping. A write is atomic, so it never falls into the middle of a frame."""
        if not self.active:
            return
        writing = self._writer.write(self._ping_frame)
        self._num_written_before += 1
        if writing is not None:
            await writing

    def _stop_comments(self) -> None:
        if self._ping_timer is not None:
            self._ping_timer.cancel()
        if self._pinging is not None:
            self._pinging.cancel()
