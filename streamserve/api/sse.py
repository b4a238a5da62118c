"""The streamed answer: an sse-starlette response with a token path of its own.

Per token there is one string dump and one write, past the middlewares (they act on headers only):
made by the step loop itself while the socket has room, else by the task that waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Unpack

from orjson import dumps

from streamserve.api.metrics import Delivery
from streamserve.api.progress import ProgressComments
from streamserve.api.sse_response import SseOptions, SseResponse
from streamserve.api.success import check_success, end_early
from streamserve.api.timing import TimedDelivery
from streamserve.api.wire import Frames, Wire
from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.progress import RequestProgress
from streamserve.engine.stream import RequestStream


class StreamedChoice:
    """One choice on its way: its stream and its frames."""

    __slots__ = ("delivery", "frames", "parser", "stream", "usage")

    def __init__(
        self,
        stream: RequestStream,
        frames: Frames,
        delivery: Delivery,
        parser: AnswerParser | None = None,
    ) -> None:
        """``parser`` is what ``frames`` reads its text through, if it does."""
        self.stream = stream
        self.frames = frames
        self.parser = parser
        self.delivery = delivery
        self.usage = Usage(prompt_tokens=stream.num_prompt_tokens)

    def end(self) -> None:
        """The answer has failed, with this choice or another: it goes no further."""
        was_aborted = self.stream.finish_reason is FinishReason.ABORT
        self.delivery.end(FinishReason.ABORT if was_aborted else FinishReason.ERROR)
        self.stream.close()
        if self.stream.usage is not None:
            reasoning_tokens = self.usage.reasoning_tokens
            self.usage = replace(self.stream.usage, reasoning_tokens=reasoning_tokens)

    def rendered(self, output: RequestOutput) -> bytes:
        """More of an answer whose text is not all, or does not always look the same."""
        self.frames.hold(output)
        if not output.text:
            return b""
        self.usage = output.usage
        return self.frames.text(output.text, output.usage)

    def timing(self, last: RequestOutput) -> dict[str, Any] | None:
        """What the chunk after the last text says, if it was asked for."""
        if not isinstance(self.delivery, TimedDelivery):
            return None
        if last.text:  # leaves with the timing, which is written before
            self.delivery.times.stamp()
        return self.delivery.times.content(self.stream, last.usage)


class AnswerStream(SseResponse):
    """Streams ``choices`` until each has ended. Closing their streams is the caller's.

    If one fails, so does the answer, and none of the others goes on.
    """

    def __init__(
        self,
        wire: Wire,
        choices: Sequence[StreamedChoice],
        *,
        ping: bytes,
        progress_of: Callable[[str], RequestProgress | None] | None = None,
        **options: Unpack[SseOptions],
    ) -> None:
        super().__init__(wire.id, ping=ping, **options)
        self._wire = wire
        self._choices = choices
        self._progress_of = progress_of
        self._progress: ProgressComments | None = None

    async def _send_events(self) -> None:
        if self._progress_of is not None:
            streams = [choice.stream for choice in self._choices]
            self._progress = ProgressComments(streams, self._progress_of, self._writer.write_now)
            self._progress.start()
        if len(self._choices) == 1:
            await self._pump(self._choices[0], self._ending)
        else:
            await self._pump_all()

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
        frames, delivery, parser = choice.frames, choice.delivery, choice.parser
        head, tail, is_plain = frames.head, frames.tail, frames.is_plain
        is_open, rest = False, b""
        if echo := frames.echo_at_once(choice.usage):
            await self._send(echo)
        sent = delivery.text_sent
        sink = self._writer.text_sink(head, tail, sent) if is_plain else None
        late_sink = frames.late_sink
        while True:
            output = await get()
            if output.finish_reason is not None:
                break
            if is_plain:
                if not output.text:
                    continue
                body = head + dumps(output.text) + tail
            else:
                body = choice.rendered(output)
                if parser is not None and parser.is_over:
                    rest = body
                    delivery.text_sent()
                    output = end_early(choice.stream, output)
                    break
                if not body:
                    continue
            if not is_open:
                is_open = True
                body = self._opening(choice, output) + body
            if (writing := write(body)) is not None:
                await self._until_room(writing)
            delivery.text_sent()
            if late_sink is not None and sink is None:
                sink = late_sink(self._writer.write_now, sent)
            if sink is not None:  # the opening is out: while this task waits, the step loop writes
                choice.stream.sink = sink
        finish_reason = check_success(output)
        frames.hold(output)
        body = rest if is_open else self._opening(choice, output) + rest
        choice.usage = output.usage
        if output.text or frames.holds_any:
            body += frames.text(output.text, output.usage)
        body += frames.last(finish_reason, output.usage, choice.timing(output))
        await (self._send(body) if ending is None else self._send_last(body + ending()))
        if output.text:
            delivery.text_sent()
        delivery.end(finish_reason)

    def _opening(self, choice: StreamedChoice, first: RequestOutput) -> bytes:
        """What travels with the first text: by then it is known what the prefix cache held."""
        usage = first.usage
        start = Usage(prompt_tokens=usage.prompt_tokens, cached_tokens=usage.cached_tokens)
        return choice.frames.role(start)

    def _ending(self) -> bytes:
        return self._wire.ending([choice.usage for choice in self._choices])

    def _failure(self, exc: Exception) -> bytes:
        for choice in self._choices:
            choice.end()
        return self._wire.failure(exc, [choice.usage for choice in self._choices])

    def _end(self) -> None:
        self._stop_progress()  # nothing may follow
        super()._end()

    def _stop_comments(self) -> None:
        self._stop_progress()
        super()._stop_comments()

    def _stop_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
