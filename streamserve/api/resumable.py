"""A streamed answer that readers may leave and come back to, and one reader's way through it.

::

    engine's stream -> ResumableAnswer -> ReplayLog -> ReplayStream (a reader)
                       one task, parses                ReplayStream (another, or the same again)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Unpack

import orjson
from starlette.types import Receive, Scope, Send

from streamserve.api.deltas import chat_delta, content_of
from streamserve.api.errors import HttpError
from streamserve.api.frames import ChoiceFrames, openai_finish_reason
from streamserve.api.kept import KeptAnswer, KeptAnswers, KeptOrigin
from streamserve.api.metrics import Delivery
from streamserve.api.replay_log import ReplayLog
from streamserve.api.sse_response import SseOptions, SseResponse
from streamserve.api.success import check_success, end_early
from streamserve.api.wire import Wire
from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.parsers.events import Content, Event
from streamserve.engine.stream import RequestStream
from streamserve.errors import EngineError

logger = logging.getLogger(__name__)

_MAX_PIECE_BYTES = 16 * 2**10
"""Of text in one chunk: what was missed is sent in pieces that a slow socket can take."""


class ResumableAnswer(KeptAnswer):
    """Reads the engine's stream to its end and keeps what it says in ``log``.

    When the log is full of what no reader has passed, the stream is left unread, and the engine
    pauses the request.
    """

    def __init__(
        self,
        wire: Wire,
        origin: KeptOrigin,
        timeout_s: float,
        kept: KeptAnswers,
        *,
        frames: ChoiceFrames,
        stream: RequestStream,
        parser: AnswerParser | None,
        delivery: Delivery,
        max_bytes: int,
    ) -> None:
        super().__init__(wire.id, origin, timeout_s, kept)
        self.wire = wire
        self.frames = frames
        self.delivery = delivery
        self.log = ReplayLog(max_bytes)
        self.usage = Usage(stream.num_prompt_tokens)
        self.finish_reason = ""
        self.error: Exception | None = None
        self._stream = stream
        self._parser = parser
        self._readers: list[ReplayStream] = []
        self._last_position = 0
        self._room = asyncio.Event()

    @property
    def num_bytes(self) -> int:
        return self.log.num_bytes

    @property
    def is_over(self) -> bool:
        """Whether all that there will be is in ``log``."""
        return bool(self.finish_reason) or self.error is not None

    @contextmanager
    def attached(self, reader: ReplayStream) -> Iterator[None]:
        """Tell ``reader`` of news, and keep what it has not sent yet."""
        with self.read():
            self._readers.append(reader)
            self.moved()  # it may have more than the one before was known to have
            try:
                yield
            finally:
                self._readers.remove(reader)
                self._last_position = reader.position
                self.moved()  # it may have had less than the others

    def moved(self) -> None:
        """What every reader has passed may be more than it was."""
        self._room.set()

    async def run(self) -> None:
        """Make the answer. Ends with ``finish_reason`` or ``error`` set, unless cancelled."""
        reason = FinishReason.ABORT
        try:
            reason = await self._read_all()
        except Exception as exc:
            if not isinstance(exc, EngineError):
                logger.exception("%s failed while it was made", self.id)
            self.error = exc
            reason = self._stream.finish_reason or FinishReason.ERROR
            self._stream.close()
            self._count(self._stream.usage or self.usage)
            self.failed()
        finally:
            self._stream.close()
            self.delivery.end(reason)
            self._tell()

    async def _read_all(self) -> FinishReason:
        while True:
            output = await self._stream.get()
            reason = None if output.finish_reason is None else check_success(output)
            events = self._events_of(output)
            if reason is None and self._parser is not None and self._parser.is_over:
                reason = end_early(self._stream, output).finish_reason
            if reason is not None:
                events += [] if self._parser is None else self._parser.finish()
                num_calls = 0 if self._parser is None else self._parser.num_calls
                self.finish_reason = openai_finish_reason(reason, has_calls=num_calls > 0)
            self._count(output.usage)
            self.log.add(output.usage.completion_tokens, events)
            self._tell()
            if reason is not None:
                return reason
            while self.log.is_full and not self._drop():
                self._room.clear()
                await self._room.wait()

    def _drop(self) -> bool:
        """Forget the oldest of what every reader has passed; whether there is room now."""
        self.log.drop(min((r.position for r in self._readers), default=self._last_position))
        return not self.log.is_full

    def _events_of(self, output: RequestOutput) -> list[Event]:
        if self._parser is None:
            return [Content(output.text)] if output.text else []
        self._parser.count(output.token_ids)
        return self._parser.feed(output.text) if output.text else []

    def _count(self, usage: Usage) -> None:
        self.usage = usage
        if self._parser is not None:
            usage.reasoning_tokens = self._parser.num_reasoning_tokens

    def _tell(self) -> None:
        for reader in self._readers:
            reader.news.set()


class ReplayStream(SseResponse):
    """Sends an answer from ``position`` on: what is missed at once, the rest as it comes.

    ``position`` counts output tokens; below 0 the reader has not even the role. ``has_ids``: each
    chunk with text says its position, and what follows the text belongs to the last. ``is_first``:
    what the answer's delivery is measured by.
    """

    def __init__(
        self,
        answer: ResumableAnswer,
        position: int,
        *,
        has_ids: bool,
        is_first: bool = False,
        **options: Unpack[SseOptions],
    ) -> None:
        if has_ids:
            options["headers"] = {**options["headers"], "X-Stream-Id": answer.id}
        super().__init__(answer.id, **options)
        if not answer.log.first <= max(position, 0) <= answer.log.last:
            raise _not_there(position, answer.log)
        self.position = position
        self.news = asyncio.Event()
        self._answer = answer
        self._has_ids = has_ids
        self._is_first = is_first
        self._is_chat = answer.frames.is_chat
        self._knows_all = False  # the end, or how it failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._answer.attached(self):
            await super().__call__(scope, receive, send)
            if self._knows_all:
                self._answer.delivered()

    async def _send_events(self) -> None:
        answer = self._answer
        if self.position < 0:
            self.position = 0
            if opening := answer.frames.role(Usage(answer.usage.prompt_tokens)):
                await self._send(self._named(opening))
        while True:
            self.news.clear()
            has_ended = answer.is_over
            events, position = answer.log.after(self.position, _MAX_PIECE_BYTES)
            if events:
                await self._send_piece(events, position)
            elif has_ended:
                break
            else:
                await self.news.wait()
        if answer.error is not None:
            raise answer.error
        last = answer.frames.last(answer.finish_reason, answer.usage)
        await self._send_last(self._named(last) + answer.wire.ending([answer.usage]))
        self._knows_all = True

    async def _fail(self, exc: Exception) -> None:
        await super()._fail(exc)
        self._knows_all = exc is self._answer.error

    async def _send_piece(self, events: list[Event], position: int) -> None:
        answer = self._answer
        body = chat_delta(events) if self._is_chat else orjson.dumps(content_of(events))
        named = b"id: %s.%d\n" % (answer.id.encode(), position) if self._has_ids else b""
        await self._send(named + answer.frames.chunk_of(body))
        self.position = position
        answer.moved()
        if self._is_first:
            answer.delivery.text_sent()

    def _named(self, frame: bytes) -> bytes:
        """A frame without text: it says where the text before it ends."""
        if not self._has_ids:
            return frame
        return b"id: %s.%d\n%b" % (self._answer.id.encode(), self.position, frame)

    def _failure(self, exc: Exception) -> bytes:
        return self._answer.wire.failure(exc, [self._answer.usage])


def _not_there(position: int, log: ReplayLog) -> HttpError:
    if position > log.last:
        return HttpError(
            400,
            f"Last-Event-ID must name at most {log.last} tokens of this stream, got {position}",
            param="Last-Event-ID",
            code="invalid_value",
        )
    return HttpError(
        410,
        f"Of this stream only what follows {log.first} tokens is still there, got {position}",
        param="Last-Event-ID",
        code="stream_position_gone",
    )
