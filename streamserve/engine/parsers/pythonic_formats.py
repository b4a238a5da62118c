"""Tool calls in Python's syntax: a list of ``name(key=value, …)``."""

from __future__ import annotations

from streamserve.engine.parsers.list_formats import ListParser
from streamserve.engine.parsers.markers import NAME
from streamserve.engine.parsers.python_reader import PythonReader


class PythonicParser(ListParser):
    """Llama 3.2 and 4 where a template asks for it: nothing but ``[name(key=value), …]``, or that
    between ``<|python_start|>`` and ``<|python_end|>``, maybe behind some text.
    """

    section_open, section_close = "<|python_start|>", "<|python_end|>"
    markers = (section_open, section_close)

    def _begin(self) -> bool:
        if not self._at_text():
            return False
        return self._in_list() if self._buffer[0] == "[" else self._fail()

    def _before_call(self) -> bool:
        if not self._at_text():
            return False
        if self._buffer[0] == "{":
            return self._read_call()
        found = NAME.match(self._buffer)
        assert found is not None
        name, end = found[0], found.end()
        if end == len(self._buffer) and not self._is_final:
            return False
        if name not in self._tools or not self._buffer.startswith("(", end):
            return self._fail()
        self._consume(end + 1)
        return self._read_with(PythonReader(name, hold=self._hold))


class Lfm2Parser(PythonicParser):
    """LFM 2 and later: text, then ``<|tool_call_start|>[name(key=value), …]<|tool_call_end|>``;
    where the system asks for JSON, the list is one of ``{"name": …, "arguments": {…}}``.
    """

    section_open, section_close = "<|tool_call_start|>", "<|tool_call_end|>"
    markers = (section_open, section_close)

    def _begin(self) -> bool:
        return self._in_text()


class Olmo3Parser(Lfm2Parser):
    """OLMo 3: text, then ``<function_calls>``, calls on lines of their own, and
    ``</function_calls>``.
    """

    section_open, section_close = "<function_calls>", "</function_calls>"
    markers = (section_open, section_close)

    def _after_call(self) -> bool:
        if not self._at_text() or self._may_become(self.section_close):
            return False
        if self._buffer[0] in ",]" or self._buffer.startswith(self.section_close):
            return super()._after_call()
        self._state = self._before_call
        return True
