"""One streamed chat completion over a socket of its own, with little work per chunk."""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson

from streamserve_loadtest.prompts import Message
from streamserve_loadtest.records import Record
from streamserve_loadtest.sse import ResponseParser


@dataclass(frozen=True, slots=True)
class Target:
    """A server: where it is, what it calls its model, and what it wants beside the usual fields.

    A field of ``extra_body`` that is None is left out of the request.
    """

    url: str
    model: str
    api_key: str | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def request_bytes(self, messages: list[Message], max_tokens: int) -> bytes:
        """A whole HTTP/1.1 request."""
        address = urlsplit(self.url)
        fields = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra_body,
        }
        body = orjson.dumps({name: v for name, v in fields.items() if v is not None})
        head = (
            f"POST {address.path.rstrip('/')}/v1/chat/completions HTTP/1.1\r\n"
            f"Host: {address.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n"
        )
        if self.api_key:
            head += f"Authorization: Bearer {self.api_key}\r\n"
        return head.encode() + b"\r\n" + body


class Exchange(asyncio.Protocol):
    """One request in flight. ``done`` is set when it has ended, in whatever way.

    ``epoch`` is the ``perf_counter`` that the record's times count from.
    """

    def __init__(
        self, request: bytes, record: Record, epoch: float, cancel_after: int | None
    ) -> None:
        self._request = request
        self._record = record
        self._epoch = epoch
        self._cancel_after = cancel_after
        self._parser = ResponseParser(self._on_event)
        self._transport: asyncio.Transport | None = None
        self._now = 0.0
        self._has_done_mark = False
        self.texts: list[str] = []
        self.done = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter() - self._epoch
        try:
            self._parser.feed(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")
        if self._parser.is_complete:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.is_set() and exc is not None:
            self._fail(f"connection lost: {exc}")
        self._end()

    def cancel(self) -> None:
        """The reader leaves, if the answer has not ended."""
        if not self.done.is_set():
            self._record.is_cancelled = self._record.error is None
            self._end()

    def _on_event(self, data: bytes) -> None:
        if self.done.is_set():  # cancelled in the middle of what the socket gave
            return
        if data == b"[DONE]":
            self._has_done_mark = True
            return
        event = orjson.loads(data)
        if "error" in event:
            self._fail(str(event["error"]))
            return
        if usage := event.get("usage"):
            self._take_usage(usage)
        for choice in event.get("choices") or ():
            self._record.finish_reason = choice.get("finish_reason") or self._record.finish_reason
            text = (choice.get("delta") or {}).get("content")
            if text:
                self._take_text(text)

    def _take_text(self, text: str) -> None:
        record = self._record
        record.chunk_times.append(self._now)
        record.chunk_chars.append(len(text))
        self.texts.append(text)
        if self._cancel_after is not None and len(record.chunk_times) >= self._cancel_after:
            self.cancel()

    def _take_usage(self, usage: dict[str, Any]) -> None:
        record = self._record
        record.prompt_tokens = usage.get("prompt_tokens")
        record.completion_tokens = usage.get("completion_tokens")
        details = usage.get("prompt_tokens_details") or {}
        record.cached_tokens = details.get("cached_tokens")

    def _fail(self, message: str) -> None:
        self._record.error = self._record.error or message

    def _end(self) -> None:
        if self.done.is_set():
            return
        record = self._record
        record.ended_at = time.perf_counter() - self._epoch
        if self._parser.status not in {0, 200}:
            body = self._parser.body.decode("utf-8", "replace")
            self._fail(f"HTTP {self._parser.status}: {body}")
        elif not record.is_cancelled and not (self._has_done_mark or record.finish_reason):
            self._fail("the stream ended without finish_reason and [DONE]")
        self.done.set()
        if self._transport is not None:
            self._transport.abort()


async def exchange(
    target: Target,
    request: bytes,
    record: Record,
    *,
    epoch: float,
    cancel_after: int | None = None,
    timeout_s: float = 600.0,
) -> str:
    """Run one request to its end and return its text. What goes wrong is in ``record.error``.

    If this coroutine is cancelled, the reader leaves and the record says so.
    """
    address = urlsplit(target.url)
    loop = asyncio.get_running_loop()
    protocol = Exchange(request, record, epoch, cancel_after)
    try:
        async with asyncio.timeout(timeout_s):
            await loop.create_connection(
                lambda: protocol, address.hostname or "", address.port or 80
            )
            await protocol.done.wait()
    except TimeoutError:
        record.error = f"no end within {timeout_s:g} s"
        protocol.cancel()
    except OSError as error:
        record.error = f"no connection: {error}"
        protocol.cancel()
    except asyncio.CancelledError:
        protocol.cancel()
        raise
    return "".join(protocol.texts)


def first_model(url: str, api_key: str | None = None) -> str:
    """The first model that a server lists. Raises ``OSError`` if it cannot be asked."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=10)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        connection.request("GET", f"{address.path.rstrip('/')}/v1/models", headers=headers)
        response = connection.getresponse()
        body = response.read()
    except http.client.HTTPException as error:
        raise OSError(f"{url} does not speak HTTP: {error!r}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise OSError(f"{url}/v1/models answers {response.status}: {body[:200]!r}")
    return str(orjson.loads(body)["data"][0]["id"])
