"""Harmony, as gpt-oss writes it: an answer is messages, and each says who it is for.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>
    …<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>

The first begins in the prompt, which ends with ``<|start|>assistant``. What is said in ``analysis``
are thoughts. Messages to ``functions.`` are calls, and all others, ``final`` or not, are content.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from streamserve.engine.parsers.markers import may_become, num_undecided

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
CONSTRAIN = "<|constrain|>"
MARKERS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, "<|call|>", "<|return|>")
_ENDS = (END, "<|call|>", "<|return|>")
_AFTER_BODY = (*_ENDS, START, CHANNEL)
_AFTER_ROLE = (CHANNEL, CONSTRAIN, MESSAGE, " to=", "to=")
_LONGEST_HEADER = 256  # characters, and each mark is one
_HEADER = re.compile(rf"(?:[\w .:/=-]|<\|channel\|>|<\|constrain\|>){{0,{_LONGEST_HEADER}}}")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([\w.-]+)")
_FUNCTIONS = "functions."


class Message(NamedTuple):
    """What the header of a message says; two that say the same are two objects."""

    channel: str = ""
    recipient: str = ""

    @property
    def is_thought(self) -> bool:
        """Whether nobody but the model itself should read it."""
        return self.channel == "analysis" and not self.recipient.startswith(_FUNCTIONS)


class Segment(NamedTuple):
    """``text`` of a message's body, or, without a message, what stands between bodies.

    ``size`` characters of the answer were read for it. A body begins with none.
    """

    message: Message | None
    text: str
    size: int


def opened_by(prompt: str) -> str:
    """The header that a prompt begins and the answer goes on with, to its end if it is there.

    Empty where the prompt leaves no message open.
    """
    begin = prompt.rfind(START)
    if begin < 0 or any(mark in prompt[begin:] for mark in _ENDS):
        return ""
    header = prompt[begin + len(START) :]
    end = header.find(MESSAGE)
    return header if end < 0 else header[: end + len(MESSAGE)]


class HarmonyScanner:
    """Takes an answer apart. What no header comes of is content, to the next mark."""

    def __init__(self, opened: str) -> None:
        """``opened`` is `opened_by` of the prompt."""
        self._buffer = ""
        self._is_final = False
        self._found: list[Segment] = []
        self._opened = opened.removesuffix(MESSAGE)
        self._has_role = True
        self.message: Message | None = None  # whose body is being read
        self._state: Callable[[], bool] = self._in_header if opened else self._between
        if opened.endswith(MESSAGE):
            self._begin_body(self._opened)

    def feed(self, text: str) -> list[Segment]:
        """Take the next text; return what has become certain."""
        self._buffer += text
        return self._run()

    def finish(self) -> list[Segment]:
        """The text has ended; return what was held back."""
        self._is_final = True
        return self._run()

    def _run(self) -> list[Segment]:
        while self._buffer and self._state():
            pass
        found, self._found = self._found, []
        return found

    def _take(self, size: int, *, is_body: bool = False) -> None:
        if not size:
            return
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        if is_body:
            self._found.append(Segment(self.message, text, size))
        else:
            self._found.append(Segment(None, "", size))

    def _between(self) -> bool:
        text = self._buffer.lstrip()
        num_spaces = len(self._buffer) - len(text)
        if not text and self._is_final:
            return False
        for mark in (START, *_ENDS):
            if text.startswith(mark):
                self._take(num_spaces + len(mark))
                if mark == START:
                    self._begin_header(has_role=False)
                return True
        if text.startswith(CHANNEL):
            self._take(num_spaces)
            self._begin_header(has_role=True)
            return True
        if not self._is_final and any(may_become(text, mark) for mark in _AFTER_BODY):
            return False
        self._begin_body("")
        return True

    def _begin_header(self, *, has_role: bool) -> None:
        self._opened, self._has_role = "", has_role
        self._state = self._in_header

    def _in_header(self) -> bool:
        buffer = self._buffer
        if self._has_role and not buffer.startswith(_AFTER_ROLE):
            if not self._is_final and any(may_become(buffer, mark) for mark in _AFTER_ROLE):
                return False
            self._begin_body("")
            return True
        found = _HEADER.match(buffer)
        assert found is not None
        end = found.end()
        if buffer.startswith(MESSAGE, end):
            header = self._opened + buffer[:end]
            self._take(end + len(MESSAGE))
            self._begin_body(header)
            return True
        if any(may_become(buffer[end:], mark) for mark in (CHANNEL, CONSTRAIN, MESSAGE)):
            return False
        self._begin_body("")
        self._take(end, is_body=True)
        return True

    def _begin_body(self, header: str) -> None:
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        self.message = Message(
            channel[1] if channel else "",
            recipient[1] if recipient else "",
        )
        self._found.append(Segment(self.message, "", 0))
        self._state = self._in_body

    def _in_body(self) -> bool:
        buffer = self._buffer
        if "<" not in buffer:  # as all marks have
            self._take(len(buffer), is_body=True)
            return False
        found = [(at, mark) for mark in _AFTER_BODY if (at := buffer.find(mark)) >= 0]
        if not found:
            held = 0 if self._is_final else max(num_undecided(buffer, m) for m in _AFTER_BODY)
            self._take(len(buffer) - held, is_body=True)
            return False
        self._take(min(found)[0], is_body=True)
        self.message = None
        self._state = self._between
        return True


class HarmonyTokens:
    """Counts the tokens of thoughts, without those of the headers and marks around them.

    As `ReasoningTokens`, but that thoughts may come back: ``is_over`` while something is said.
    """

    def __init__(self, opened: str, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._scanner = HarmonyScanner(opened)
        self._starts: deque[int] = deque()  # of tokens that are not decided on
        self._num_read = self._num_decided = 0  # bytes
        self._count = 0

    @property
    def count(self) -> int:
        """Of what has come, what may still be the beginning of a mark included."""
        return self._count + (len(self._starts) if self._is_thinking else 0)

    @property
    def is_over(self) -> bool:
        """Whether the tokens end in something that is said."""
        return self._scanner.message is not None and not self._is_thinking

    @property
    def is_inside(self) -> bool:
        """Whether the tokens end in thoughts or in a header."""
        return not self.is_over

    @property
    def _is_thinking(self) -> bool:
        return self._scanner.message is not None and self._scanner.message.is_thought

    def feed(self, token_ids: Sequence[int]) -> None:
        """Take the next tokens."""
        for token_id in token_ids:
            # A character for each byte: a mark is ASCII, and its place is the bytes' then.
            text = self._token_bytes(token_id).decode("latin-1")
            self._starts.append(self._num_read)
            self._num_read += len(text)
            for segment in self._scanner.feed(text):
                self._decide(segment)

    def _decide(self, segment: Segment) -> None:
        self._num_decided += segment.size
        is_thought = segment.message is not None and segment.message.is_thought
        while self._starts and self._starts[0] < self._num_decided:
            self._starts.popleft()
            self._count += is_thought


def call_header(name: str) -> str:
    """What stands before the arguments of a call of a function, behind the role."""
    return f"{CHANNEL}commentary to={_FUNCTIONS}{name} {CONSTRAIN}json{MESSAGE}"


def called_function(message: Message, names: Collection[str]) -> str | None:
    """The function that a message calls, if it is one of ``names``."""
    name = message.recipient.removeprefix(_FUNCTIONS)
    return name if name in names else None
