"""Tool calls in a list between two marks."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from streamserve.engine.parsers.call_reader import CallReader
from streamserve.engine.parsers.tool_parser import ToolParser


class ListParser(ToolParser):
    """Text, then ``section_open``, a list of calls, whose brackets models forget, and
    ``section_close``.
    """

    section_open: ClassVar[str]
    section_close: ClassVar[str]

    @abstractmethod
    def _before_call(self) -> bool:
        """The state before a call of the list."""

    def _begin(self) -> bool:
        return self._in_text()

    def _in_text(self) -> bool:
        return self._say_until({self.section_open: self._in_list})

    def _in_list(self) -> bool:
        self._state = self._in_list
        if not self._at_text():
            return False
        if self._buffer[0] == "[":
            self._consume(1)
        self._state = self._before_call
        return True

    def _after_call(self) -> bool:
        if not self._at_text() or self._may_become(self.section_close):
            return False
        if self._buffer[0] == ",":
            self._consume(1)
            self._state = self._before_call
            return True
        if self._buffer[0] == "]":
            self._consume(1)
            self._raw = ""
            return True
        if self._buffer.startswith(self.section_close):
            self._consume(len(self.section_close))
            self._raw = ""
        return self._fail()


class CohereParser(ListParser):
    """Command R7B, Command A and later: ``<|START_ACTION|>``, an array of
    ``{"tool_call_id": "0", "tool_name": …, "parameters": {…}}``, and ``<|END_ACTION|>``.
    """

    section_open, section_close = "<|START_ACTION|>", "<|END_ACTION|>"
    markers = (section_open, section_close)

    def _before_call(self) -> bool:
        return self._read_with(CallReader(self._tools, name_key="tool_name", hold=self._hold))
