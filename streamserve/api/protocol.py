"""uvicorn's httptools protocol with what it lacks: limits on what a connection may cost.

::

    connection made    refused at the bound of connections, unless an idle one makes room
    first byte         a request's headers and body are here within one deadline, and within bytes
    its answer         made by the application
    taken              what is written already must go on leaving, however long it is
    idle               uvicorn's own ``timeout_keep_alive``
    closed             what was written may take a while to leave, and no longer

What is refused here never reaches the application; it is answered in OpenAI's error shape.
"""

from __future__ import annotations

import asyncio
import http
from collections.abc import Callable
from itertools import islice
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from streamserve.api.errors import error_type

MAX_PIPELINED = 16
"""Requests of one connection that may wait for the answer before them."""

_LINGER_S = 5.0
"""How long a closed connection may take to deliver its last bytes."""

_UPGRADE_OPTIONS = (b"upgrade", b"http2-settings")

_NUM_LOOKED_AT = 256  # connections, to find an idle one: a flood must stay cheap
_RETRY_AFTER_S = 1


class _HeadersTooLargeError(Exception):
    """Stops the parser: it holds what it has met of a header until that is complete."""


class _TooManyPipelinedError(Exception):
    """Stops the parser."""


def _nobody_counts(_code: str) -> None:
    """Stands in for who counts refusals."""


def _nobody_cares() -> None:
    """Stands in for who counts clients that were cut off."""


class _UnframedCycle(RequestResponseCycle):
    """An answer to HTTP/1.0, which knows no chunks: where no length is said, it ends with the
    connection.
    """

    _has_no_length = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            if b"content-length" not in names:
                self._has_no_length = True
                self.chunked_encoding = False
        elif self._has_no_length:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class ServeProtocol(HttpToolsProtocol):
    """One connection. ``max_header_bytes`` bounds the request line and all headers together.

    A request, its body included, must be there ``receive_timeout_s`` after it has begun, the first
    one after the connection was made. A client that takes nothing of what was written for
    ``stall_timeout_s`` is cut off; of a response that has not ended the application sees to it.
    """

    max_header_bytes = 64 * 2**10  # these are set by ``protocol_class``
    receive_timeout_s = 60.0
    stall_timeout_s = 60.0
    max_connections = 4096
    high_water_bytes = 32 * 2**10
    on_refused: Callable[[str], None] = staticmethod(_nobody_counts)
    on_stall: Callable[[], None] = staticmethod(_nobody_cares)

    _is_in_head = False
    _is_in_body = False
    _num_head_bytes = 0
    _num_unparsed_bytes = 0
    _num_body_bytes = 0  # of the data at hand
    _deadline: asyncio.TimerHandle | None = None
    _linger: asyncio.TimerHandle | None = None
    _running_cycle: RequestResponseCycle | None = None  # ``cycle`` is the last one pipelined
    _unsent_watch: asyncio.TimerHandle | None = None
    _num_unsent = 0  # when it was last looked at

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self.high_water_bytes)
        if len(self.connections) > self.max_connections and not self._is_room_made():
            message = f"The server has its limit of {self.max_connections} connections open"
            self._refuse(503, message, "too_many_connections")
        else:
            self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        for timer in (self._linger, self._unsent_watch):
            if timer is not None:
                timer.cancel()
        running = self._running_cycle
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # refused: what still comes is nobody's
            return
        self._num_body_bytes = 0
        self._unset_keepalive_if_required()
        self._feed(data)
        if self.transport.is_closing() or not (self._is_in_head or self._is_in_body):
            return
        # A header or a trailer that never ends shows up in no callback.
        self._num_unparsed_bytes = (
            0 if self._num_body_bytes else self._num_unparsed_bytes + len(data)
        )
        if self._num_unparsed_bytes > self.max_header_bytes:
            self._refuse_headers()

    def _feed(self, data: bytes) -> None:
        """As uvicorn, but for an upgrade, behind which that loses the request's body."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        except httptools.HttpParserUpgrade as upgrade:
            if self._is_offered_upgrade:
                self._decline_upgrade(data[upgrade.args[0] :])

    @property
    def _is_offered_upgrade(self) -> bool:
        """Whether the client would rather speak another protocol: Java's does, with its HTTP/2."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _decline_upgrade(self, rest: bytes) -> None:
        """Read the request again without the offer; ``rest`` is what came behind its head."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                kept = b", ".join(o for o in options if o.lower() not in _UPGRADE_OPTIONS)
                lines.append(b"connection: " + kept)
            elif name not in _UPGRADE_OPTIONS:
                lines.append(b"%b: %b" % (name, value))
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join([*lines, b"", rest]))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._num_head_bytes = 0
        self._num_unparsed_bytes = 0
        if self._deadline is None:
            self._start_deadline()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(b": \r\n"))
        if self._is_in_head:  # what follows a body is no header of the request
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_offered_upgrade:
            return
        self._is_in_head = False
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _TooManyPipelinedError
        num_waiting = len(self.pipeline)
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            self.cycle.__class__ = _UnframedCycle
        if len(self.pipeline) == num_waiting:
            self._running_cycle = self.cycle
        self._is_in_body = True

    def on_body(self, body: bytes) -> None:
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_offered_upgrade:
            return
        self._is_in_body = False
        self._stop_deadline()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._running_cycle = self.pipeline[-1][0]
        super().on_response_complete()
        if self._unsent_watch is None:
            self._watch_unsent()

    def send_400_response(self, msg: str) -> None:
        if self._num_head_bytes > self.max_header_bytes:
            self._refuse_headers()
        else:
            self._refuse(400, msg, "invalid_http")

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.is_closing():
            return
        if self.transport.get_write_buffer_size():  # its client still takes the last response
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
            return
        self._close()

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything on it."""
        is_alive = self.timeout_keep_alive_task is not None
        return is_alive and not self.transport.get_write_buffer_size()

    @property
    def _is_answering(self) -> bool:
        """Whether the last request that has begun a body waits for its answer, or has a part."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _may_be_answered(self) -> bool:
        """Whether a refusal would fall into no other answer, and not follow its own request's."""
        if self._is_in_body:
            return not self.pipeline and not self.cycle.response_started
        return not self._is_answering

    def _watch_unsent(self) -> None:
        """Look again later whether something has left of what waits for the socket, if it does."""
        self._num_unsent = self.transport.get_write_buffer_size()
        self._unsent_watch = None
        if self._num_unsent:
            self._unsent_watch = self.loop.call_later(self.stall_timeout_s, self._on_unsent)

    def _on_unsent(self) -> None:
        # While it is not full, the next response may have added to it.
        is_growing = self._is_answering and not self.flow.write_paused
        if not is_growing and self.transport.get_write_buffer_size() >= self._num_unsent:
            self.on_stall()
            self.transport.abort()
        else:
            self._watch_unsent()

    def _is_room_made(self) -> bool:
        """Close a connection that is idle; false where none is found."""
        for connection in islice(self.connections, _NUM_LOOKED_AT):
            if isinstance(connection, ServeProtocol) and connection.is_idle:
                connection.timeout_keep_alive_handler()
                return True
        return False

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.receive_timeout_s, self._on_deadline)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        is_waiting = self._is_answering if self._is_in_head else bool(self.pipeline)
        if is_waiting:  # a pipelined request: its time begins when it is its turn
            self._start_deadline()
            return
        self._deadline = None
        message = f"The request must arrive within {self.receive_timeout_s:g} s"
        self._refuse(408, message, "receive_timeout")

    def _count(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > self.max_header_bytes:
            raise _HeadersTooLargeError  # httptools turns it into its own error

    def _refuse_headers(self) -> None:
        message = f"The request line and headers must be at most {self.max_header_bytes} bytes"
        self._refuse(431, message, "headers_too_large")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer without the application and end the connection: the parser is lost."""
        self.on_refused(code)
        error = {"message": message, "type": error_type(status), "param": None, "code": code}
        body = orjson.dumps({"error": error})
        retry = f"retry-after: {_RETRY_AFTER_S}\r\n" if status == 503 else ""
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{retry}"
            "connection: close\r\n\r\n"
        )
        if self._may_be_answered:
            self.transport.write(head.encode() + body)
        if self._is_answering:
            self.cycle.disconnected = True  # the application has nobody to answer any more
            self.cycle.message_event.set()
        self._is_in_head = False
        self._close()

    def _close(self) -> None:
        """Close, and do not wait for ever for a peer that does not read."""
        self._stop_deadline()
        self.transport.close()
        if self._linger is None:
            self._linger = self.loop.call_later(_LINGER_S, self.transport.abort)


def protocol_class(
    *,
    max_header_bytes: int,
    receive_timeout_s: float,
    stall_timeout_s: float,
    max_connections: int,
    high_water_bytes: int,
    on_refused: Callable[[str], None] = _nobody_counts,
    on_stall: Callable[[], None] = _nobody_cares,
) -> type[ServeProtocol]:
    """The protocol with limits of its own: uvicorn builds it by class, without arguments.

    Writers wait while more than ``high_water_bytes`` lie in front of the socket. ``on_refused`` is
    called with the error code of what is refused, ``on_stall`` when a client is cut off.
    """
    namespace: dict[str, Any] = {
        "max_header_bytes": max_header_bytes,
        "receive_timeout_s": receive_timeout_s,
        "stall_timeout_s": stall_timeout_s,
        "max_connections": max_connections,
        "high_water_bytes": high_water_bytes,
        "on_refused": staticmethod(on_refused),
        "on_stall": staticmethod(on_stall),
    }
    return type("ServeProtocol", (ServeProtocol,), namespace)
