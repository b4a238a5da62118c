"""Texts cut anywhere, and what a parser makes of the pieces."""

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import strategies as st

from streamserve.engine.parsers.events import ParsedMessage
from streamserve.engine.parsers.reasoning import ReasoningParser
from streamserve.engine.parsers.tool_parser import ToolParser

cuts = st.lists(st.integers(0, 400), max_size=30)


def pieces(text: str, bounds: list[int]) -> list[str]:
    """``text`` cut at ``bounds``, which may lie anywhere."""
    inside = sorted({bound % (len(text) + 1) for bound in bounds})
    return [text[a:b] for a, b in pairwise([0, *inside, len(text)])]


def read(parser: ReasoningParser | ToolParser, parts: Iterable[str]) -> ParsedMessage:
    """Everything that ``parts`` say."""
    message = ParsedMessage()
    for part in parts:
        message.add(parser.feed(part))
    message.add(parser.finish())
    return message
