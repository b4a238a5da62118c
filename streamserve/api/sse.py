"""The streamed answer: an sse-starlette response with a token path of its own.

Per token there is one string dump and one write, past the middlewares (they act on headers only):
made by the step loop itself while the socket has room, else by the task that waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from orjson import dumps
from sse_starlette.sse import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

from streamserve.api.disconnect import DisconnectGuard
from streamserve.api.errors import error_content
from streamserve.api.frames import DONE, PING, ChoiceFrames, Envelope, error_frame, usage_frame
from streamserve.api.metrics import Delivery
from streamserve.api.progress import ProgressComments
from streamserve.api.timing import TimedDelivery
from streamserve.api.writer import AsgiWriter, FrameWriter, writer_of
from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.engine.progress import RequestProgress
from streamserve.engine.stream import RequestStream, TextSink
from streamserve.errors import EngineError

logger = logging.getLogger(__name__)


class RequestAbortedError(EngineError):
    """The engine gave the request up before its answer was complete."""

    status = 503

    def __init__(self) -> None:
        super().__init__(
            "The request was aborted before its answer was complete: the server is shutting down",
            code="aborted",
        )


def check_success(output: RequestOutput) -> None:
    """Raise unless ``output`` is part of a success: a cut answer must not look like a whole one."""
    if output.finish_reason is FinishReason.ABORT:
        raise RequestAbortedError
    if output.finish_reason is FinishReason.ERROR:
        raise EngineError("The request failed while it was being served")


class StreamedChoice:
    """One choice on its way: its stream and its frames."""

    __slots__ = ("delivery", "frames", "stream", "usage")

    def __init__(self, stream: RequestStream, frames: ChoiceFrames, delivery: Delivery) -> None:
        self.stream = stream
        self.frames = frames
        self.delivery = delivery
        self.usage = Usage(prompt_tokens=stream.num_prompt_tokens)

    def timing(self, last: RequestOutput) -> dict[str, Any] | None:
        """What the chunk after the last text says, if it was asked for."""
        if not isinstance(self.delivery, TimedDelivery):
            return None
        if last.text:  # leaves with the timing, which is written before
            self.delivery.times.stamp()
        return self.delivery.times.content(self.stream, last.usage)


class _Nothing:
    """Stands in for the body iterator, which the token path does not use."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        raise NotImplementedError


class AnswerStream(EventSourceResponse):
    """Streams ``choices`` until each has ended. Closing their streams is the caller's.

    ``raw_send`` is the server's own ``send``, past the middlewares. Raises ``ClientGoneError``.

    The base class serves a response with four tasks in a group of anyio's, which is 0.2 ms before
    the first byte; here the caller's own task sends, one more listens for the disconnect, and a
    ping is a timer. Its fourth would cancel every stream on SIGTERM: draining is ours.
    """

    def __init__(
        self,
        envelope: Envelope,
        choices: Sequence[StreamedChoice],
        *,
        include_usage: bool,
        num_per_prompt: int = 1,
        headers: dict[str, str],
        ping_interval_s: float,
        raw_send: Send,
        progress_of: Callable[[str], RequestProgress | None] | None = None,
    ) -> None:
        super().__init__(
            _Nothing(), headers={"Cache-Control": "no-cache", **headers}, ping=ping_interval_s
        )
        self._envelope = envelope
        self._choices = choices
        self._include_usage = include_usage
        self._num_per_prompt = num_per_prompt
        self._raw_send = raw_send
        self._writer: FrameWriter = AsgiWriter(raw_send)
        self._num_sent = 0  # frames; pings do not count
        self._num_sent_before = 0
        self._ping_timer: asyncio.TimerHandle | None = None
        self._pinging: asyncio.Task[None] | None = None
        self._progress_of = progress_of
        self._progress: ProgressComments | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with DisconnectGuard(receive) as self._guard:
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
            if self._progress_of is not None:
                streams = [choice.stream for choice in self._choices]
                self._progress = ProgressComments(
                    streams, self._progress_of, self._writer.write_now
                )
                self._progress.start()
            if len(self._choices) == 1:
                await self._pump(self._choices[0], self._ending)
            else:
                await self._pump_all()
        except EngineError as exc:
            await self._fail(exc)
        except Exception as exc:
            logger.exception("%s failed while it was streamed", self._envelope.id)
            await self._fail(exc)

    async def _pump_all(self) -> None:
        """Several choices interleave: each is sent when its own tokens come."""
        try:
            async with asyncio.TaskGroup() as group:
                for choice in self._choices:
                    group.create_task(self._pump(choice, None))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        await self._send_last(self._ending())

    async def _pump(self, choice: StreamedChoice, ending: Callable[[], bytes] | None) -> None:
        """Send one choice to its end. ``ending``, if given, ends the response in the same write."""
        get, write = choice.stream.get, self._writer.write
        frames, delivery = choice.frames, choice.delivery
        head, tail, is_plain = frames.head, frames.tail, frames.is_plain
        opening = frames.role(choice.usage)  # travels with the first text
        if echo := frames.echo_at_once(choice.usage):
            await self._send(echo)
        sink = self._sink_of(frames, delivery)
        while True:
            output = await get()
            if output.finish_reason is not None:
                break
            text = output.text
            if is_plain:
                if not text:
                    continue
                body = head + dumps(text) + tail
            else:
                frames.hold(output)
                if not text:
                    continue
                body = frames.text(text, output.usage)
                if not body:
                    continue
            if opening:
                body = opening + body
                opening = b""
            if (writing := write(body)) is not None:
                await writing
            self._num_sent += 1
            delivery.text_sent()
            if is_plain:  # and the opening is out: while this task waits, the step loop writes
                choice.stream.sink = sink
        check_success(output)
        choice.usage = output.usage
        frames.hold(output)
        body = opening
        if output.text or frames.holds_any:
            body += frames.text(output.text, output.usage)
        body += frames.last(output.finish_reason, output.usage, choice.timing(output))
        await (self._send(body) if ending is None else self._send_last(body + ending()))
        if output.text:
            delivery.text_sent()
        delivery.end(output.finish_reason)

    def _sink_of(self, frames: ChoiceFrames, delivery: Delivery) -> TextSink:
        """What the step loop calls with a token's text while the socket has room."""
        head, tail = frames.head, frames.tail
        write_now, text_sent = self._writer.write_now, delivery.text_sent

        def sink(text: str) -> bool:
            if not write_now(head + dumps(text) + tail):
                return False
            self._num_sent += 1
            text_sent()
            return True

        return sink

    def _ending(self) -> bytes:
        """What follows the last choice's last chunk."""
        if not self._include_usage:
            return DONE
        usages = [choice.usage for choice in self._choices]
        return usage_frame(self._envelope, usages, self._num_per_prompt) + DONE

    async def _fail(self, exc: Exception) -> None:
        """Headers are out: one event says what status it would have been, and no ``[DONE]``."""
        for choice in self._choices:
            choice.delivery.end(FinishReason.ERROR)
        await self._send_last(error_frame(*error_content(exc)))
        # So that no client takes the answer for complete.
        self._writer.close_connection()

    async def _send(self, body: bytes) -> None:
        if (writing := self._writer.write(body)) is not None:
            await writing
        self._num_sent += 1

    async def _send_last(self, body: bytes) -> None:
        self.active = False  # no ping may follow, and no progress
        if self._progress is not None:
            self._progress.stop()
        self._guard.release()
        await self._raw_send({"type": "http.response.body", "body": body, "more_body": False})

    def _start_ping_timer(self) -> None:
        self._ping_timer = asyncio.get_running_loop().call_later(self.ping_interval, self._on_timer)

    def _on_timer(self) -> None:
        """Ping if nothing was sent since the last time, and nobody waits for a full socket."""
        if not self.active:
            return
        is_pinging = self._pinging is not None and not self._pinging.done()
        if self._num_sent == self._num_sent_before and not is_pinging:
            self._pinging = asyncio.create_task(self._ping(self._raw_send))
        self._num_sent_before = self._num_sent
        self._start_ping_timer()

    async def _ping(self, send: Send) -> None:
        """Send a comment. A write is atomic, so it never falls into the middle of a frame."""
        if self.active and (writing := self._writer.write(PING)) is not None:
            await writing

    def _stop_comments(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._ping_timer is not None:
            self._ping_timer.cancel()
        if self._pinging is not None:
            self._pinging.cancel()
