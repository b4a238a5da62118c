"""One answer's parser: the thoughts are taken off first, then the calls are found in the rest."""

from __future__ import annotations

from collections.abc import Sequence

from streamserve.engine.parsers.events import Content, Event, Reasoning, joined
from streamserve.engine.parsers.reasoning import ReasoningParser, ThoughtTokens
from streamserve.engine.parsers.response import ResponseParser
from streamserve.engine.parsers.tool_parser import ToolParser


class AnswerParser:
    """What one choice's text says, piece by piece. ``num_calls`` are those shown so far.

    ``has_reasoning`` says whether there may be thoughts at all; ``num_reasoning_tokens`` is
    ``None`` if not.
    """

    def __init__(
        self,
        *,
        reasoning: ReasoningParser | None = None,
        response: ResponseParser | None = None,
        tools: ToolParser | None = None,
        tokens: ThoughtTokens | None = None,
        include_reasoning: bool = True,
    ) -> None:
        self._reasoning = reasoning
        self._response = response
        self._tools = tools
        self._tokens = tokens
        self._include_reasoning = include_reasoning
        self.has_reasoning = reasoning is not None

    @property
    def num_calls(self) -> int:
        return 0 if self._tools is None else self._tools.num_calls

    @property
    def is_over(self) -> bool:
        """Whether nothing that may follow would be shown."""
        return self._tools is not None and self._tools.is_over

    @property
    def num_reasoning_tokens(self) -> int | None:
        return None if self._tokens is None else self._tokens.count

    @property
    def is_past_thoughts(self) -> bool:
        """Whether the tokens that were counted include all of the thoughts, or there are none."""
        return self._tokens is None or self._tokens.is_over

    @property
    def is_thinking(self) -> bool:
        """Whether the tokens that were counted end in thoughts."""
        return self._tokens is not None and self._tokens.is_inside

    def count(self, token_ids: Sequence[int]) -> None:
        """Take the ids of the next tokens, for ``num_reasoning_tokens`` alone."""
        if self._tokens is not None:
            self._tokens.feed(token_ids)

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what has become certain."""
        events = [Content(text)] if self._reasoning is None else self._reasoning.feed(text)
        return joined(self._find_calls(events))

    def finish(self) -> list[Event]:
        """The text has ended; return what was held back."""
        events = [] if self._reasoning is None else self._find_calls(self._reasoning.finish())
        if self._response is not None:
            events += self._calls_in(self._response.finish())
        if self._tools is not None:
            events += self._tools.finish()
        return joined(events)

    def _find_calls(self, events: Sequence[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                response = self._response
                found += self._calls_in(response.feed(event.text) if response else event.text)
            elif self._include_reasoning or not isinstance(event, Reasoning):
                found.append(event)
        return found

    def _calls_in(self, text: str) -> list[Event]:
        return [Content(text)] if self._tools is None else self._tools.feed(text)
