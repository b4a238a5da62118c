"""Tool calls whose arguments are JSON, in a section of special tokens."""

from __future__ import annotations

from typing import ClassVar

from streamserve.engine.parsers.markers import num_undecided
from streamserve.engine.parsers.tool_parser import MarkedParser

_MAX_HEADER = 128  # characters


class SectionParser(MarkedParser):
    """Text, then ``section_open``, and calls: ``call_open``, a header with the name,
    ``header_close``, the arguments, ``arguments_close``, ``call_close``; then ``section_close``.
    """

    call_close: ClassVar[str]
    header_close: ClassVar[str]
    arguments_close: ClassVar[str] = ""

    header: ClassVar[str]
    """What a grammar writes between ``call_open`` and the arguments; a 0 is any number."""
    arguments_end: ClassVar[str] = ""

    @staticmethod
    def _name(header: str) -> str:
        """The function that a header names."""
        return header.strip()

    def _in_header(self) -> bool:
        end = self._buffer.find(self.header_close)
        size = end if end >= 0 else len(self._buffer) - num_undecided(
            self._buffer, self.header_close
        )  # fmt: skip
        if size > _MAX_HEADER or (end < 0 and self._is_final):
            return self._fail()
        if end < 0:
            return False
        name = self._name(self._buffer[:end])
        self._consume(end + len(self.header_close))
        return self._read_call(name) if name in self._tools else self._fail()

    def _after_call(self) -> bool:
        if not self._at_text():
            return False
        for mark in (self.arguments_close, self.call_close, self.section_close):
            if mark and self._may_become(mark):
                return False
            if mark and self._buffer.startswith(mark):
                self._consume(len(mark))
                self._raw = ""
                return True
        is_call = self._may_become(self.call_open) or self._buffer.startswith(self.call_open)
        return self._before_call() if is_call else self._fail()


class KimiK2Parser(SectionParser):
    """Kimi K2: the header is ``functions.name:0``, with the number of the call in the chat."""

    section_open, section_close = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    call_open, call_close = "<|tool_call_begin|>", "<|tool_call_end|>"
    header_close = "<|tool_call_argument_begin|>"
    header = "functions.{}:0" + header_close
    markers = (section_open, section_close, call_open, call_close, header_close)

    @staticmethod
    def _name(header: str) -> str:
        return header.strip().removeprefix("functions.").rpartition(":")[0]


class DeepSeekV31Parser(SectionParser):
    """DeepSeek V3.1: the header is the name."""

    section_open, section_close = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    call_open, call_close = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    header_close = "<｜tool▁sep｜>"
    header = "{}" + header_close
    markers = (section_open, section_close, call_open, call_close, header_close)


class DeepSeekV3Parser(DeepSeekV31Parser):
    """DeepSeek V3 and R1: the header is ``function``, the separator and the name, and the arguments
    are a code block.
    """

    header_close = "\n```json\n"
    header = "function<｜tool▁sep｜>{}" + header_close
    arguments_close, arguments_end = "```", "\n```"

    @staticmethod
    def _name(header: str) -> str:
        return header.rpartition("<｜tool▁sep｜>")[2].strip()
