"""Server-sent events out of an HTTP/1.1 response, piece by piece as it comes off the socket."""

from __future__ import annotations

from collections.abc import Callable

import httptools

_MAX_ERROR_BYTES = 2000


class EventParser:
    """Splits a body into the ``data`` of its events; comments and other fields are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of every event that ends in ``piece``."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif self._data and line in {b"", b"\r"}:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events


class ResponseParser:
    """One response. ``on_event`` gets the data of each event of a good one.

    After an answer that is not a 200, ``body`` holds its beginning. Feeding raises
    ``httptools.HttpParserError`` for what is not HTTP.
    """

    def __init__(self, on_event: Callable[[bytes], None]) -> None:
        self._on_event = on_event
        self._events = EventParser()
        self._http = httptools.HttpResponseParser(self)
        self.status = 0
        self.body = b""
        self.is_complete = False

    def feed(self, data: bytes) -> None:
        """Take what the socket gave."""
        self._http.feed_data(data)

    def on_headers_complete(self) -> None:
        """Called by httptools."""
        self.status = self._http.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Called by httptools."""
        if self.status != 200:
            self.body = (self.body + body)[:_MAX_ERROR_BYTES]
            return
        for event in self._events.feed(body):
            self._on_event(event)

    def on_message_complete(self) -> None:
        """Called by httptools."""
        self.is_complete = True
