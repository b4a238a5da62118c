"""The seam between serving a request and how its answer looks: one ``Wire`` for each format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from streamserve.api.extras import Prompt
from streamserve.api.whole import Choice
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.stream import TextSink

LateSink = Callable[[Callable[[bytes], bool], Callable[[], object]], TextSink | None]
"""Makes a sink, or not yet, of a function that writes bytes now or says that there is no room, and
one that it calls for each text that was written."""


class Frames(Protocol):
    """Renders one choice of a stream as bytes, any of which may be none.

    If ``is_plain`` a text is ``head + orjson.dumps(text) + tail`` once ``role`` is out, whoever
    writes it; otherwise each output is held and then rendered. ``late_sink``, if there is one, is
    asked after a text for what the step loop may write the next ones with by itself.
    """

    head: bytes
    tail: bytes

    @property
    def late_sink(self) -> LateSink | None:
        """See above."""

    @property
    def is_plain(self) -> bool:
        """Whether text is all, and looks always the same."""

    @property
    def holds_any(self) -> bool:
        """Whether something waits for text."""

    def hold(self, output: RequestOutput) -> None:
        """Keep what an output has besides its text for the next frame."""

    def role(self, usage: Usage) -> bytes:
        """What travels before the first text."""

    def echo_at_once(self, usage: Usage) -> bytes:
        """What is sent before there is any text."""

    def text(self, text: str, usage: Usage) -> bytes:
        """New text and what was held."""

    def last(self, finish_reason: str, usage: Usage, timing: dict[str, Any] | None) -> bytes:
        """What ends the choice, after its last text."""


class Wire(Protocol):
    """How one request's answer looks, streamed or whole."""

    @property
    def id(self) -> str:
        """The answer's id, and the engine's name for the request."""

    def frames(self, index: int, prompt: Prompt, parser: AnswerParser | None) -> Frames:
        """What renders a streamed choice."""

    def ending(self, usages: Sequence[Usage]) -> bytes:
        """What follows the last frame of the last choice of a stream."""

    def failure(self, exc: Exception, usages: Sequence[Usage]) -> bytes:
        """What ends a stream that failed: what it used, if that was asked for, and one event."""

    def whole(self, choices: Sequence[Choice]) -> bytes:
        """The answer that is not streamed."""
