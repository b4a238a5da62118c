"""The mailbox between the step loop and one request's reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput, Usage, merge_outputs
from streamserve.errors import EngineError, RequestCancelledError

_COMPACT_AFTER = 64
"""Unread outputs are folded into one when this many lie in the slot: memory stays that of text."""


_TOKEN_BYTES = 40
_LOGPROB_BYTES = 120
"""What an unread token costs beside its text, and each logprob of one, about."""


class TextSink(Protocol):
    """A reader's way to have its text written by the step loop itself, without being woken."""

    def __call__(self, text: str) -> bool:
        """Write ``text`` (not empty) now. ``False``: no room, nothing was written. Never waits."""


class RequestTimings:
    """When things happened to a request, in seconds of the engine's clock; ``None``: not yet.

    ``first_token`` and ``last_token`` are when the token's text was ready, not when it was
    delivered: the API stamps that.
    """

    __slots__ = ("arrival", "finished", "first_scheduled", "first_token", "last_token")

    def __init__(self, arrival: float) -> None:
        self.arrival = arrival
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.finished: float | None = None


class RequestStream:
    """A one-slot merging mailbox: what the reader has not fetched yet is one output.

    Event-loop thread only, one reader. Iterating yields outputs up to and including the one with a
    ``finish_reason``; if the request fails, what it had produced is delivered first and then
    ``EngineError`` is raised. Leaving early must close the stream (``close``, ``aclose`` or
    ``async with``): that aborts the request, and its blocks are free by the next step.

    A reader that wants nothing but the text may set ``sink``. While it waits in ``get`` the text
    then goes straight there; it is woken for what the sink has no room for, and for the end.

    With ``max_unread_bytes`` the slot is bounded: once more lies in it, ``on_full`` is called with
    the request's id and ``True``, and with ``False`` when the reader has fetched it all.
    """

    __slots__ = (
        "_ended",
        "_error",
        "_exhausted",
        "_is_cancelled",
        "_is_closed",
        "_is_full",
        "_loop",
        "_num_unread_bytes",
        "_on_close",
        "_on_full",
        "_unread",
        "_waiter",
        "finish_reason",
        "max_unread_bytes",
        "num_prompt_tokens",
        "on_scheduled",
        "ready_sink",
        "request_id",
        "sink",
        "timings",
        "usage",
    )

    def __init__(
        self,
        request_id: str,
        num_prompt_tokens: int,
        *,
        arrival_time: float,
        on_close: Callable[[str], object],
        on_full: Callable[[str, bool], object] | None = None,
    ) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = num_prompt_tokens
        self.timings = RequestTimings(arrival_time)
        self.finish_reason: FinishReason | None = None  # once it has ended, unless it failed
        self.usage: Usage | None = None  # once it has ended
        self.max_unread_bytes: int | None = None
        self._on_close = on_close
        self._on_full = on_full
        self._is_full = False
        self._num_unread_bytes = 0  # behind the first unread output
        self._loop = asyncio.get_running_loop()
        self._unread: list[RequestOutput] = []
        self._waiter: asyncio.Future[None] | None = None
        self.on_scheduled: Callable[[int], object] | None = None  # with the cached tokens
        self.sink: TextSink | None = None
        self.ready_sink: TextSink | None = None  # ``sink`` while the reader has all and waits
        self._error: EngineError | None = None
        self._ended = False  # the engine has said its last word
        self._exhausted = False  # and the reader has heard it
        self._is_closed = False
        self._is_cancelled = False

    @property
    def has_ended(self) -> bool:
        """Whether the engine has put the last output or failed the request."""
        return self._ended

    @property
    def is_closed(self) -> bool:
        """Whether the reader has left."""
        return self._is_closed

    @property
    def is_drained(self) -> bool:
        """Whether the reader has fetched everything put so far."""
        return not self._unread

    def put(self, output: RequestOutput) -> None:
        """Leave ``output`` for the reader. Never blocks; dropped if the reader has left.

        The stream owns ``output`` from here on. Called by the engine only.
        """
        assert not self._ended, f"{self.request_id}: an output after the last one"
        if output.finish_reason is not None:
            self._ended = True
            self.finish_reason = output.finish_reason
            self.usage = output.usage
            if self._is_cancelled:
                output.finish_reason = None
                self._error = RequestCancelledError()
        if self._is_closed:
            return
        unread = self._unread
        unread.append(output)
        if len(unread) > 1:
            self._grow(output)
        self._wake()

    def fail(self, error: EngineError, usage: Usage | None = None) -> None:
        """End the stream with ``error``, after what was put before. Called by the engine only."""
        assert not self._ended, f"{self.request_id}: a failure after the last output"
        self._ended = True
        self.usage = usage
        self._error = error
        self._wake()

    def get_nowait(self) -> RequestOutput | None:
        """Return everything since the last call as one output, ``None`` if there is nothing.

        Raises ``EngineError`` if the request failed, ``RuntimeError`` after the last output.
        """
        unread = self._unread
        if unread:
            output = unread[0] if len(unread) == 1 else merge_outputs(unread)
            self._unread = []
            self._exhausted = output.finish_reason is not None
            self._num_unread_bytes = 0
            if self._is_full:
                self._set_full(False)
            return output
        if self._error is not None:
            self._exhausted = True
            raise self._error
        if self._exhausted or self._is_closed:
            raise RuntimeError(f"the stream of {self.request_id} was read past its end")
        return None

    async def get(self) -> RequestOutput:
        """Wait for the next output. Raises as ``get_nowait``; nothing is lost if cancelled."""
        while (output := self.get_nowait()) is None:
            assert self._waiter is None, f"{self.request_id}: a stream has one reader"
            self._waiter = self._loop.create_future()
            self.ready_sink = self.sink
            try:
                await self._waiter
            finally:
                self._waiter = self.ready_sink = None
        return output

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._exhausted or (self._is_closed and self._error is None):
            raise StopAsyncIteration
        return await self.get()

    def cancel(self) -> bool:
        """Somebody else ends the request; its reader gets what there is and then an error.

        Returns whether there was one to end. Like ``close`` it frees all by the next step.
        """
        if self._ended:
            return False
        self._is_cancelled = True
        self._on_close(self.request_id)
        return True

    def close(self, finish_reason: FinishReason | None = None) -> None:
        """The reader leaves: abort the request unless it has ended. Idempotent, never waits.

        A ``finish_reason`` says that the reader has all that it wants, and why that was the end.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._unread = []
        if not self._ended:
            self._on_close(self.request_id)
            self.finish_reason = finish_reason or self.finish_reason
        self._wake()

    async def aclose(self) -> None:
        """``close``, for ``contextlib.aclosing``."""
        self.close()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def _grow(self, output: RequestOutput) -> None:
        """``output`` lies behind others: the reader is slow."""
        if len(self._unread) >= _COMPACT_AFTER:
            self._unread = [merge_outputs(self._unread)]
        if self.max_unread_bytes is not None:
            self._num_unread_bytes += _size_of(output)
            if self._num_unread_bytes > self.max_unread_bytes and not self._ended:
                self._set_full(True)  # again if it was: an engine may have to go on for a step

    def _set_full(self, is_full: bool) -> None:
        self._is_full = is_full
        if self._on_full is not None:
            self._on_full(self.request_id, is_full)

    def _wake(self) -> None:
        self.ready_sink = None  # what comes next comes behind what the reader is woken for
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _size_of(output: RequestOutput) -> int:
    """About how many bytes an output keeps, here or as a frame."""
    text = output.text
    num_bytes = len(text) if text.isascii() else 4 * len(text)
    num_logprobs = sum(1 + len(entry.top) for entry in output.logprobs)
    return num_bytes + _TOKEN_BYTES * len(output.token_ids) + _LOGPROB_BYTES * num_logprobs
