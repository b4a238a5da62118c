"""What a model thinks before it answers: ``<think>…</think>``, then the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from enum import Enum, auto
from typing import NamedTuple, Protocol

from streamserve.engine.parsers.events import Content, Event, Reasoning, joined
from streamserve.engine.parsers.markers import may_become, num_undecided

THINK_START = "<think>"
THINK_END = "</think>"


class ThoughtMarks(NamedTuple):
    """What a family writes around its thoughts."""

    start: str = THINK_START
    end: str = THINK_END


THINK = ThoughtMarks()
_MARKS = {
    "mistral": ThoughtMarks("[THINK]", "[/THINK]"),
    "seed_oss": ThoughtMarks("<seed:think>", "</seed:think>"),
    "cohere": ThoughtMarks("<|START_THINKING|>", "<|END_THINKING|>"),
    "gemma4": ThoughtMarks("<|channel>thought", "<channel|>"),
}
_ALWAYS_THINK = ("deepseek_r1", "kimi_k2", "minimax_m2")
REASONING_PARSERS = (
    *("qwen3", "deepseek_r1", "openai_gptoss", "mistral", "seed_oss", "gemma4"),
    *("glm45", "deepseek_v3", "kimi_k2", "minimax_m2", "cohere"),
)
"""Some differ in an answer that does not begin with its mark when the prompt says nothing:
DeepSeek R1 and others think all the same, until ``</think>``. One is Harmony: `harmony`."""


def thought_marks(parser: str) -> ThoughtMarks:
    """The marks that a parser of thoughts looks for."""
    return _MARKS.get(parser, THINK)


def reasoning_parser_of_template(source: str) -> str | None:
    """The parser for what a chat template says of thoughts: it takes an answer without any, too."""
    marks = {**_MARKS, "qwen3": THINK}
    return next((name for name, mark in marks.items() if mark.end in source), None)


class ThinkState(Enum):
    """Where an answer stands; ``UNDECIDED``: it thinks if it begins with the mark."""

    UNDECIDED = auto()
    INSIDE = auto()
    OVER = auto()


def state_after_prompt(parser: str, prompt: str, continued: str | None) -> ThinkState:
    """Where the answer to a rendered prompt begins: templates open, or close, the thinking.

    ``continued`` is the message that the answer goes on with, if it does.
    """
    marks = thought_marks(parser)
    if continued is not None:
        start, end = continued.rfind(marks.start), continued.rfind(marks.end)
        if start < 0 and end < 0:
            return ThinkState.OVER
        return ThinkState.INSIDE if start > end else ThinkState.OVER
    tail = prompt[-64:].rstrip()
    if tail.endswith(marks.start):
        return ThinkState.INSIDE
    if tail.endswith(marks.end):
        return ThinkState.OVER
    return ThinkState.INSIDE if parser in _ALWAYS_THINK else ThinkState.UNDECIDED


class ReasoningParser:
    """Splits one answer. White space around the thoughts belongs to neither part."""

    def __init__(self, state: ThinkState, marks: ThoughtMarks = THINK) -> None:
        self._marks = marks
        self._buffer = ""
        self._is_final = False
        states: dict[ThinkState, Callable[[], list[Event]]] = {
            ThinkState.UNDECIDED: self._undecided,
            ThinkState.INSIDE: self._opening,
            ThinkState.OVER: self._content,
        }
        self._state = states[state]

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what has become certain."""
        self._buffer += text
        return joined(self._state())

    def finish(self) -> list[Event]:
        """The text has ended; return what was held back."""
        self._is_final = True
        return joined(self._state())

    def _undecided(self) -> list[Event]:
        text = self._buffer.lstrip()
        if not self._is_final and may_become(text, self._marks.start):
            return []
        self._state = self._opening if text.startswith(self._marks.start) else self._content
        return self._state()

    def _opening(self) -> list[Event]:
        """The mark may come first, even if the prompt ends with it."""
        text = self._buffer.lstrip()
        if not self._is_final and may_become(text, self._marks.start):
            return []
        self._buffer = text.removeprefix(self._marks.start)
        self._state = self._first_thought
        return self._state()

    def _first_thought(self) -> list[Event]:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return []
        self._state = self._inside
        return self._state()

    def _inside(self) -> list[Event]:
        buffer = self._buffer
        end = buffer.find(self._marks.end)
        if end >= 0:
            self._buffer = buffer[end + len(self._marks.end) :]
            self._state = self._gap
            return [Reasoning(buffer[:end].rstrip()), *self._gap()]
        size = len(buffer)
        if not self._is_final:
            size -= num_undecided(buffer, self._marks.end)
        size = len(buffer[:size].rstrip())
        self._buffer = buffer[size:]
        return [Reasoning(buffer[:size])]

    def _gap(self) -> list[Event]:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return []
        self._state = self._content
        return self._content()

    def _content(self) -> list[Event]:
        text, self._buffer = self._buffer, ""
        return [Content(text)]


class ThoughtTokens(Protocol):
    """Counts the tokens of thoughts among those of an answer.

    ``is_over``: what comes next is no thought. ``is_inside``: it is one, or the end of them.
    """

    @property
    def count(self) -> int: ...
    @property
    def is_over(self) -> bool: ...
    @property
    def is_inside(self) -> bool: ...

    def feed(self, token_ids: Sequence[int]) -> None:
        """Take the next tokens."""


class ReasoningTokens:
    """Counts the tokens of the thoughts, without those of the marks around them.

    By the tokens' own bytes: a mark may be one token or several. ``is_over`` once the end was met,
    or cannot come.
    """

    def __init__(
        self,
        state: ThinkState,
        token_bytes: Callable[[int], bytes],
        *,
        start: bytes = THINK_START.encode(),
        end: bytes = THINK_END.encode(),
    ) -> None:
        """``start`` and ``end`` are the marks."""
        self._token_bytes = token_bytes
        self._start_mark, self._end_mark = start, end
        self._is_open = state is ThinkState.INSIDE
        self._is_undecided = state is not ThinkState.OVER
        self.is_over = state is ThinkState.OVER
        self._starts: list[int] = []  # of tokens, within ``_bytes``
        self._bytes = b""
        self.count = 0

    @property
    def is_inside(self) -> bool:
        """Whether what comes next is a thought, or the end of the thoughts."""
        return not self.is_over and (self._is_open or not self._is_undecided)

    def copy(self) -> ReasoningTokens:
        """One that goes on from here by itself."""
        other = copy(self)
        other._starts = list(self._starts)
        return other

    def feed(self, token_ids: Sequence[int]) -> None:
        """Take the next tokens."""
        for token_id in token_ids:
            if self.is_over:
                return
            self._starts.append(len(self._bytes))
            self._bytes += self._token_bytes(token_id)
            if self._is_undecided:
                self._look_for_start()
            else:
                self.count += 1
                self._look_for_end()

    def _look_for_start(self) -> None:
        text = self._bytes.lstrip()
        if text.startswith(self._start_mark):
            self._starts, self._bytes = [], b""
            self._is_undecided = False
        elif not self._start_mark.startswith(text):
            self._is_undecided = False
            self.is_over = not self._is_open
            self.count = len(self._starts) if self._is_open else 0
            self._look_for_end()

    def _look_for_end(self) -> None:
        starts = self._starts
        end = self._bytes.find(self._end_mark)
        if end >= 0:
            self.count -= sum(start >= end for start in starts)
            self.is_over = True
            return
        # Only what may still be a part of the mark is looked at again.
        cut = len(self._bytes) - len(self._end_mark) + 1
        num_done = sum(start <= cut for start in starts[1:])
        if num_done:
            first = starts[num_done]
            self._bytes = self._bytes[first:]
            self._starts = [start - first for start in starts[num_done:]]
