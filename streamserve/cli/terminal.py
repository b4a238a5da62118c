"""The terminal of ``streamserve chat``: what is typed, and answers with their thoughts apart."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, TextIO

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_BLOCK = '"""'


class Piece(NamedTuple):
    """More of an answer, or of what was thought before it."""

    text: str
    is_thought: bool = False


class Screen:
    """Shows one answer after the other.

    Thoughts are dimmed where that can be shown, and an empty line is between them and the answer.
    Where nobody watches, in a file or a pipe, there is the answer alone.
    """

    def __init__(self, stream: TextIO, *, is_watched: bool, has_colours: bool) -> None:
        self._stream = stream
        self._is_watched = is_watched
        self._dim, self._plain = (_DIM, _PLAIN) if has_colours else ("", "")
        self._is_in_thoughts = False

    @classmethod
    def of_stdout(cls) -> Screen:
        """The standard output. NO_COLOR and a dumb terminal are told by the environment."""
        is_watched = sys.stdout.isatty()
        has_colours = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return cls(sys.stdout, is_watched=is_watched, has_colours=is_watched and has_colours)

    def show(self, piece: Piece) -> None:
        """Show it at once."""
        text = piece.text
        if piece.is_thought:
            if not self._is_watched:
                return
            if not self._is_in_thoughts:
                text = self._dim + text
        elif self._is_in_thoughts:
            text = f"{self._plain}\n\n{text}"
        self._is_in_thoughts = piece.is_thought
        print(text, end="", flush=True, file=self._stream)

    def end(self, remark: str = "") -> None:
        """The answer has ended, or was left."""
        plain = self._plain if self._is_in_thoughts else ""
        self._is_in_thoughts = False
        print(plain + remark, flush=True, file=self._stream)


def is_typed() -> bool:
    """Whether somebody sits before the standard input."""
    return sys.stdin is not None and sys.stdin.isatty()


def prepare_typing() -> None:
    """Give ``input`` arrow keys, a history, and pasted lines as one text, where that exists."""
    with suppress(ImportError):
        import readline  # noqa: F401  that is all it takes


def read_line(prompt: str) -> str:
    """As ``input``; the end where there is no standard input at all."""
    if sys.stdin is None:
        raise EOFError
    return input(prompt)


def read_message(read: Callable[[str], str], prompt: str) -> str:
    r"""One message: a line, several of which all but the last end with ``\``, or those between
    two ``\"\"\"``. Raises ``EOFError`` where there is nothing more.
    """
    more = "… " if prompt else ""
    line = read(prompt)
    if line.lstrip().startswith(_BLOCK):
        return _read_block(read, line.lstrip().removeprefix(_BLOCK), more)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        try:
            lines.append(read(more))
        except EOFError:
            break
    return "\n".join(lines).strip()


def _read_block(read: Callable[[str], str], line: str, more: str) -> str:
    lines = [line]
    while not lines[-1].rstrip().endswith(_BLOCK):
        try:
            lines.append(read(more))
        except EOFError:
            return "\n".join(lines).strip()
    lines[-1] = lines[-1].rstrip().removesuffix(_BLOCK)
    return "\n".join(lines).strip()


def forget_stdout() -> None:
    """Nobody reads any more: what is still to be flushed goes nowhere."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
