"""A response on the wire, and what becomes of it when it has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from streamserve.api.extras import Prompt
from streamserve.api.logprobs import TokenNames
from streamserve.api.prompts import Prepared
from streamserve.api.responses.frames import Finished, ResponseFrames, Snapshots
from streamserve.api.whole import Choice
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.tokenizer import Tokenizer


class ResponseWire:
    """One response, streamed or whole: ``finished`` is called once it has ended either way, and
    ``response`` is then all of it.
    """

    def __init__(
        self,
        key: str,
        fields: dict[str, Any],
        prepared: Prepared,
        *,
        tokenizer: Tokenizer,
        clock: Callable[[], float],
        finished: Finished,
    ) -> None:
        """``key`` is the id without its prefix; ``fields`` is all that does not change."""
        settings = prepared.settings
        assert settings is not None
        self.id = f"resp_{key}"
        self._finished = finished
        self.response: bytes | None = None
        parser = None if prepared.parsing is None else prepared.parsing.new(tokenizer.token_bytes)
        self.events = ResponseFrames(
            key,
            Snapshots(fields, clock),
            self._end,
            parser=parser,
            names=None if prepared.params.logprobs is None else TokenNames(tokenizer),
            shows_summary=settings.shows_summary,
            seals_thoughts=settings.seals_thoughts,
            is_queued=settings.is_background,
            namespaces=settings.namespaces,
        )

    def frames(self, _index: int, _prompt: Prompt, _parser: AnswerParser | None) -> ResponseFrames:
        """There is one choice, and its parser is ours."""
        return self.events

    def ending(self, _usages: Sequence[Usage]) -> bytes:
        """The last event was the end."""
        return b""

    def failure(self, exc: Exception, usages: Sequence[Usage]) -> bytes:
        """``response.failed``."""
        return self.events.failure(exc, usages[0])

    def whole(self, choices: Sequence[Choice]) -> bytes:
        """The response that the events of a stream would have added up to."""
        [choice] = choices
        events, usage = self.events, choice.usage
        events.hold(RequestOutput(choice.text, choice.token_ids, usage, choice.logprobs))
        if choice.text or events.holds_any:
            events.text(choice.text, usage)
        events.last(choice.finish_reason, usage)
        assert self.response is not None
        return self.response

    def _end(self, response: bytes, output: bytes) -> None:
        self.response = response
        self._finished(response, output)
