"""Chat completions and completions on the wire."""

from __future__ import annotations

from collections.abc import Sequence

from streamserve.api.errors import error_content
from streamserve.api.extras import Extras, Prompt
from streamserve.api.frames import (
    DONE,
    ChoiceFrames,
    Envelope,
    FrameOptions,
    error_frame,
    usage_frame,
)
from streamserve.api.parsed_frames import ParsedFrames
from streamserve.api.sampling import StreamOptions
from streamserve.api.whole import Choice, whole_answer
from streamserve.engine.outputs import Usage
from streamserve.engine.parsers.answer import AnswerParser


class OpenAIWire:
    """An answer of ``n`` choices to each prompt."""

    def __init__(self, envelope: Envelope, options: StreamOptions, extras: Extras, n: int) -> None:
        self._envelope = envelope
        self._options = options
        self._extras = extras
        self._n = n

    @property
    def id(self) -> str:
        return self._envelope.id

    def frames(self, index: int, prompt: Prompt, parser: AnswerParser | None) -> ChoiceFrames:
        """The chunks of one choice."""
        options: FrameOptions = {
            "include_usage": self._options.include_usage,
            "continuous_usage": self._options.continuous_usage_stats,
            "prompt": prompt,
            "extras": self._extras,
        }
        if parser is None:
            return ChoiceFrames(self._envelope, index, **options)
        return ParsedFrames(self._envelope, index, parser, **options)

    def ending(self, usages: Sequence[Usage]) -> bytes:
        """``[DONE]``, and before it the usage if it was asked for."""
        return self._usage(usages) + DONE

    def failure(self, exc: Exception, usages: Sequence[Usage]) -> bytes:
        """An event with the status that it would have been; no ``[DONE]`` follows."""
        return self._usage(usages) + error_frame(*error_content(exc))

    def _usage(self, usages: Sequence[Usage]) -> bytes:
        if not self._options.include_usage:
            return b""
        return usage_frame(self._envelope, usages, self._n)

    def whole(self, choices: Sequence[Choice]) -> bytes:
        """The JSON of all choices."""
        return whole_answer(self._envelope, choices, self._extras, self._n)
