"""Responses that are written with nobody there, and who comes to read them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Unpack

from streamserve.api.responses.frames import stream_error
from streamserve.api.responses.store import Owner, Turn
from streamserve.api.responses.wire import ResponseWire
from streamserve.api.sse_response import SseOptions, SseResponse
from streamserve.api.success import check_success
from streamserve.engine.outputs import Usage
from streamserve.engine.stream import RequestStream
from streamserve.errors import EngineError

logger = logging.getLogger(__name__)

_MAX_PIECE_BYTES = 16 * 2**10


class EventLog:
    """Events by their numbers, from 0, and whether more will come."""

    def __init__(self, events: Sequence[bytes] = (), *, is_complete: bool = False) -> None:
        self.events = list(events)
        self.is_complete = is_complete
        self._more = asyncio.Event()

    def add(self, frames: bytes) -> None:
        """Take events that were rendered together."""
        # JSON has no line breaks of its own.
        self.events += [event + b"\n\n" for event in frames.split(b"\n\n")[:-1]]
        self._wake()

    def end(self) -> None:
        """No event will follow."""
        self.is_complete = True
        self._wake()

    async def wait(self) -> None:
        """Return when there is more, or the end."""
        await self._more.wait()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()


class BackgroundRun:
    """One response on its way. ``ended`` is called once, when its last event is in the log.

    ``turn`` is what it reads; what it says is not yet there.
    """

    def __init__(
        self,
        stream: RequestStream,
        wire: ResponseWire,
        owner: Owner,
        turn: Turn,
        ended: Callable[[BackgroundRun], None],
    ) -> None:
        self.owner = owner
        self.turn = turn
        self.log = EventLog()
        self._stream = stream
        self._wire = wire
        self._ended = ended
        self.log.add(wire.events.echo_at_once(Usage(stream.num_prompt_tokens)))
        self._task = asyncio.create_task(self._run())

    @property
    def id(self) -> str:
        return self._stream.request_id

    @property
    def response(self) -> bytes:
        """The response as it is now."""
        if self._wire.response is not None:
            return self._wire.response
        has_begun = self._stream.timings.first_scheduled is not None
        return self._wire.events.now("in_progress" if has_begun else "queued")

    def cancel(self) -> None:
        """Free the request, which has not ended; what there is of the answer stays."""
        self._task.cancel()
        self._end(self._wire.events.cancelled(self._stream.usage))

    async def _run(self) -> None:
        stream, frames, log = self._stream, self._wire.events, self.log
        try:
            has_begun = False
            while True:
                output = await stream.get()
                if not has_begun:
                    has_begun = True
                    log.add(frames.begun())
                if output.finish_reason is not None:
                    break
                frames.hold(output)
                if output.text:
                    log.add(frames.text(output.text, output.usage))
            check_success(output)
            frames.hold(output)
            if output.text or frames.holds_any:
                log.add(frames.text(output.text, output.usage))
            last = frames.last(output.finish_reason, output.usage)
        except EngineError as exc:
            last = frames.failure(exc, stream.usage)
        except Exception as exc:
            logger.exception("%s failed in the background", stream.request_id)
            last = frames.failure(exc, stream.usage)
        self._end(last)

    def _end(self, last: bytes) -> None:
        self._stream.close()
        self.log.add(last)
        self._ended(self)
        self.log.end()


class LogResponse(SseResponse):
    """The events of a log from a number on, those that are there and those that will come."""

    def __init__(
        self,
        name: str,
        log: EventLog,
        start: int,
        **options: Unpack[SseOptions],
    ) -> None:
        super().__init__(name, **options)
        self._log = log
        self._position = start

    async def _send_events(self) -> None:
        log = self._log
        while True:
            start, end = self._position, self._next_position()
            piece = b"".join(log.events[start:end])
            if log.is_complete and end >= len(log.events):
                await self._send_last(piece)
                return
            if piece:
                self._position = end
                await self._send(piece)
            else:
                await log.wait()

    def _next_position(self) -> int:
        """Behind as many of the events that are there as a slow socket can take, at least one."""
        events, end = self._log.events, self._position
        num_bytes = 0
        while end < len(events) and num_bytes < _MAX_PIECE_BYTES:
            num_bytes += len(events[end])
            end += 1
        return end

    def _failure(self, exc: Exception) -> bytes:
        """Of this reader only: the response goes on."""
        return stream_error(exc, self._position)
