"""uvicorn's httptools protocol with what it lacks: a limit on headers, OpenAI's error shape."""

from __future__ import annotations

import asyncio
import http
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from streamserve.api.errors import error_type


class _HeadersTooLargeError(Exception):
    """Stops the parser: it holds what it has met of a header until that is complete."""


class ServeProtocol(HttpToolsProtocol):
    """One connection. ``max_header_bytes`` bounds the request line and all headers together.

    They must be there ``header_timeout_s`` after the connection or the request has begun; between
    two requests uvicorn's own ``timeout_keep_alive`` counts.
    """

    max_header_bytes = 64 * 2**10  # both set by ``protocol_class``
    header_timeout_s = 60.0

    _is_in_head = False
    _num_head_bytes = 0
    _num_unparsed_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # A header that never ends shows up in no callback.
        if self._is_in_head and not self.transport.is_closing():
            self._num_unparsed_bytes += len(data)
            if self._num_unparsed_bytes > self.max_header_bytes:
                self._refuse_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._num_head_bytes = 0
        self._num_unparsed_bytes = 0
        if self._head_timer is None:
            self._start_head_timer()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + len(b": \r\n"))

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if self._num_head_bytes > self.max_header_bytes:
            self._refuse_headers()
        else:
            self._refuse(400, msg, "invalid_http")

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.header_timeout_s, self._on_head_timer)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timer(self) -> None:
        if self._is_answering:  # a pipelined request: its time begins when it is its turn
            self._start_head_timer()
            return
        message = f"The headers must arrive within {self.header_timeout_s:g} s"
        self._refuse(408, message, "header_timeout")

    def _count(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > self.max_header_bytes:
            raise _HeadersTooLargeError  # httptools turns it into its own error

    def _refuse_headers(self) -> None:
        message = f"The request line and headers must be at most {self.max_header_bytes} bytes"
        self._refuse(431, message, "headers_too_large")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer without the application and end the connection: the parser is lost."""
        error = {"message": message, "type": error_type(status), "param": None, "code": code}
        body = orjson.dumps({"error": error})
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self._is_in_head = False
        if not self._is_answering:  # nothing may fall into another request's answer
            self.transport.write(head.encode() + body)
        self.transport.close()


def protocol_class(max_header_bytes: int, header_timeout_s: float) -> type[ServeProtocol]:
    """The protocol with limits of its own: uvicorn builds it by class, without arguments."""
    namespace: dict[str, Any] = {
        "max_header_bytes": max_header_bytes,
        "header_timeout_s": header_timeout_s,
    }
    return type("ServeProtocol", (ServeProtocol,), namespace)
