"""The typed events of a streamed response, and the response that they add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import orjson

from streamserve.api.errors import error_content
from streamserve.api.logprobs import TokenNames, chat_logprobs
from streamserve.api.responses.output import (
    CallItem,
    MessageItem,
    OpenItem,
    ReasoningItem,
    SummaryItem,
    TypedEvent,
)
from streamserve.core.plan import TokenLogprobs
from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.parsers.events import CallArguments, CallStart, Content, Event, Reasoning
from streamserve.engine.stream import TextSink

_dumps = orjson.dumps

Finished = Callable[[bytes, bytes], None]
"""Called once with the whole response and its output items, both JSON."""


class Snapshots:
    """A response as JSON at any time: what it repeats of its request is rendered once."""

    def __init__(self, fields: dict[str, Any], clock: Callable[[], float]) -> None:
        self._head = _dumps(fields)[:-1]
        self._clock = clock

    def now(
        self,
        status: str,
        output: bytes = b"[]",
        usage: Usage | None = None,
        error: dict[str, Any] | None = None,
        incomplete: str | None = None,
    ) -> bytes:
        """The response with this status."""
        changing = {
            "status": status,
            "completed_at": int(self._clock()) if status == "completed" else None,
            "error": error,
            "incomplete_details": None if incomplete is None else {"reason": incomplete},
            "usage": None if usage is None else usage_content(usage),
        }
        return self._head + b"," + _dumps(changing)[1:-1] + b',"output":' + output + b"}"


def usage_content(usage: Usage) -> dict[str, Any]:
    """The ``usage`` object."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class ResponseFrames:
    """Renders one response. ``finished`` is called before the last event leaves, with the end."""

    head = tail = b""
    is_plain = False  # every event has a number

    def __init__(
        self,
        key: str,
        snapshots: Snapshots,
        finished: Finished,
        *,
        parser: AnswerParser | None,
        names: TokenNames | None,
        shows_summary: bool,
        seals_thoughts: bool,
        is_queued: bool = False,
        namespaces: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    ) -> None:
        """``key`` makes the items' ids the response's own; ``is_queued``: nobody waits for it;
        ``namespaces``: of the functions that are in one, and their names there.
        """
        self._key = key
        self._snapshots = snapshots
        self._finished = finished
        self._parser = parser
        self._names = names
        self._shows_summary = shows_summary
        self._seals_thoughts = seals_thoughts
        self._is_queued = is_queued
        self._namespaces = namespaces
        self._number = 0
        self._item: OpenItem | None = None
        self._done: list[bytes] = []  # items as JSON
        self._held: list[TokenLogprobs] = []
        self._early: list[TokenLogprobs] = []  # as long as they may be of thoughts
        self._has_thought = False

    @property
    def holds_any(self) -> bool:
        return bool(self._held)

    def hold(self, output: RequestOutput) -> None:
        """Count thoughts, and keep the logprobs of what is none."""
        parser = self._parser
        if self._names is None:
            if parser is not None:
                parser.count(output.token_ids)
            return
        if parser is None:
            self._held += output.logprobs
            return
        for entry in output.logprobs:
            self._has_thought |= parser.is_thinking
            was_past = parser.is_past_thoughts
            parser.count((entry.token_id,))
            if was_past:
                self._held.append(entry)
                continue
            self._early.append(entry)
            self._has_thought |= parser.is_thinking
            if parser.is_past_thoughts:
                if not self._has_thought:  # there were none after all
                    self._held += self._early
                self._early = []

    def echo_at_once(self, _usage: Usage) -> bytes:
        """A client learns the id, and that it is its turn, without waiting for text."""
        status = "queued" if self._is_queued else "in_progress"
        first = self._snapshot(b"created", self._snapshots.now(status))
        name = b"queued" if self._is_queued else b"in_progress"
        return first + self._snapshot(name, self._snapshots.now(status))

    def begun(self) -> bytes:
        """What was queued has its first token."""
        return self._snapshot(b"in_progress", self._snapshots.now("in_progress"))

    def role(self, _usage: Usage) -> bytes:
        return b""

    def text(self, text: str, _usage: Usage) -> bytes:
        events: Sequence[Event] = (Content(text),)
        if self._parser is not None:
            events = self._parser.feed(text)
        return self.events(events)

    def late_sink(
        self, write_now: Callable[[bytes], bool], sent: Callable[[], object]
    ) -> TextSink | None:
        """What writes more of a message that will be the last item, if nothing else can come."""
        item = self._item
        if self._parser is not None or self._names is not None or not isinstance(item, MessageItem):
            return None
        opening = _opening(item.delta_name)
        head = item.delta_head
        tail = item.plain_tail + b"}\n\n"
        pieces = item.pieces

        def write(text: str) -> bool:
            if not write_now(b"%b%d%b%b%b" % (opening, self._number, head, _dumps(text), tail)):
                return False
            self._number += 1
            pieces.append(text)
            sent()
            return True

        return write

    def last(
        self, finish_reason: str, usage: Usage, _timing: dict[str, Any] | None = None
    ) -> bytes:
        frames = b""
        if self._parser is not None:
            frames = self.events(self._parser.finish())
            usage.reasoning_tokens = self._parser.num_reasoning_tokens
        if self._item is None and not self._done:
            frames += self.events((Content(""),))
        is_cut = finish_reason == FinishReason.LENGTH
        status = "incomplete" if is_cut else "completed"
        frames += self._close(status)
        reason = "max_output_tokens" if is_cut else None
        return frames + self._end(status.encode(), status, usage=usage, incomplete=reason)

    def failure(self, exc: Exception, usage: Usage | None) -> bytes:
        """The end of a response that failed, with what there is of it."""
        status, content = error_content(exc)
        code = "rate_limit_exceeded" if status == 429 else "server_error"
        error = {"code": code, "message": content["message"]}
        return self._close("incomplete") + self._end(b"failed", "failed", error=error, usage=usage)

    def cancelled(self, usage: Usage | None) -> bytes:
        """The end of a response that was cancelled. There is no event of its own for it."""
        return self._close("incomplete") + self._end(b"incomplete", "cancelled", usage=usage)

    def now(self, status: str) -> bytes:
        """The response as it is now."""
        return self._snapshots.now(status, self._output)

    def events(self, events: Sequence[Event]) -> bytes:
        """What the parser said, as typed events."""
        return b"".join([self._frame(shown) for event in events for shown in self._shown(event)])

    @property
    def _output(self) -> bytes:
        return b"[" + b",".join(self._done) + b"]"

    def _shown(self, event: Event) -> list[TypedEvent]:
        shown: list[TypedEvent] = []
        if not self._is_more(event):
            shown += self._closing("completed")
            self._item = self._new_item(event)
            shown += self._item.opening()
        item = self._item
        assert item is not None
        if not isinstance(event, CallStart):
            logprobs = self._take_logprobs(item)
            if event.text or logprobs:
                shown.append(item.delta(event.text, logprobs))
        return shown

    def _is_more(self, event: Event) -> bool:
        """Whether ``event`` goes on with the item that is open."""
        match event:
            case Content():
                return isinstance(self._item, MessageItem)
            case Reasoning():
                return isinstance(self._item, ReasoningItem)
            case CallArguments():
                return True
        return False

    def _new_item(self, event: Event) -> OpenItem:
        index = len(self._done)
        if isinstance(event, Content):
            return MessageItem(self._id(MessageItem), index)
        if isinstance(event, Reasoning):
            kind = SummaryItem if self._shows_summary else ReasoningItem
            return kind(self._id(kind), index, is_sealed=self._seals_thoughts)
        assert isinstance(event, CallStart)
        namespace, name = self._namespaces.get(event.name, (None, event.name))
        return CallItem(self._id(CallItem), index, event.call_id, name, namespace)

    def _id(self, kind: type[OpenItem]) -> str:
        return f"{kind.prefix}_{self._key}_{len(self._done)}"

    def _take_logprobs(self, item: OpenItem) -> list[dict[str, Any]]:
        if not self._held or self._names is None or not isinstance(item, MessageItem):
            return []
        entries, self._held = self._held, []
        content: list[dict[str, Any]] = chat_logprobs(entries, self._names)["content"]
        return content

    def _close(self, status: str) -> bytes:
        return b"".join([self._frame(shown) for shown in self._closing(status)])

    def _closing(self, status: str) -> list[TypedEvent]:
        """End the item that is open, if there is one."""
        item = self._item
        if item is None:
            return []
        self._item = None
        self._done.append(_dumps(item.content(status)))
        return item.closing(status)

    def _end(self, name: bytes, status: str, **how: Any) -> bytes:
        response = self._snapshots.now(status, self._output, **how)
        self._finished(response, self._output)
        return self._snapshot(name, response)

    def _snapshot(self, name: bytes, response: bytes) -> bytes:
        return self._frame(TypedEvent(b"response." + name, b',"response":' + response))

    def _frame(self, event: TypedEvent) -> bytes:
        number = self._number
        self._number += 1
        return b"%b%d%b}\n\n" % (_opening(event.name), number, event.body)


def _opening(name: bytes) -> bytes:
    return b'event: %b\ndata: {"type":"%b","sequence_number":' % (name, name)


def stream_error(exc: Exception, number: int) -> bytes:
    """The event that ends a stream of events which failed, though its response may not have."""
    _, content = error_content(exc)
    rest = {"code": content["code"], "message": content["message"], "param": content["param"]}
    return b"%b%d,%b\n\n" % (_opening(b"error"), number, _dumps(rest)[1:])
