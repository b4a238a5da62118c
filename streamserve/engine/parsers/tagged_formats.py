"""Tool calls whose arguments have tags around them instead of being JSON.

Their values are typed by the tools' schemas: ``5`` is text where a string is asked for.
"""

from __future__ import annotations

from typing import ClassVar

from streamserve.engine.parsers.markers import NAME
from streamserve.engine.parsers.tagged_reader import TaggedReader, TagStyle
from streamserve.engine.parsers.tool_parser import MarkedParser, Reader


class TaggedParser(MarkedParser):
    """Text, then ``section_open``, and calls: ``call_open`` and a name, ``name_close``, arguments.

    ``section_open`` may be missing, unless a grammar makes the calls, and ``section_close``.
    ``has_sections``: a section holds any number of calls.
    """

    style: ClassVar[TagStyle]
    name_close: ClassVar[str]
    has_sections: ClassVar[bool] = False

    def _in_header(self) -> bool:
        found = NAME.match(self._buffer)
        assert found is not None
        name, rest = found[0], self._buffer[found.end() :]
        if not self._is_final and (not rest or self._is_beginning(rest)):
            return False
        if name not in self._tools or not rest.startswith(self.name_close):
            return self._fail()
        self._consume(len(name) + len(self.name_close))
        return self._read_with(self._new_reader(name))

    def _new_reader(self, name: str) -> Reader:
        return TaggedReader(self.style, name, self._tools[name], hold=self._hold)

    def _is_beginning(self, text: str) -> bool:
        return len(text) < len(self.name_close) and self.name_close.startswith(text)

    def _after_call(self) -> bool:
        if not self._at_text() or self._may_become(self.section_close):
            return False
        if self._buffer.startswith(self.section_close):
            self._consume(len(self.section_close))
            self._raw = ""
        return self._fail()


class Qwen3CoderParser(TaggedParser):
    """Qwen 3 Coder, Qwen 3.5 and others: ``<tool_call>``, lines of ``<function=name>``,
    ``<parameter=key>``, the value, ``</parameter>`` and ``</function>``, and ``</tool_call>``.

    Models forget ``<tool_call>``, or to close a parameter: the next one, or the function's end,
    ends it.
    """

    markers = ("<tool_call>", "</tool_call>")
    style = TagStyle(
        key_open="<parameter=",
        key_close=">",
        value_close="</parameter>",
        lenient_ends=("<parameter=", "</function>"),
        call_close="</function>",
        is_on_lines=True,
    )
    section_open, section_close = "<tool_call>", "</tool_call>"
    call_open, name_close = "<function=", ">"


class SeedOssParser(Qwen3CoderParser):
    """Seed-OSS: the same behind ``<seed:tool_call>``."""

    markers = ("<seed:tool_call>", "</seed:tool_call>")
    section_open, section_close = "<seed:tool_call>", "</seed:tool_call>"


class Glm45Parser(TaggedParser):
    """GLM 4.5 and later: ``<tool_call>name``, and for each argument ``<arg_key>key</arg_key>`` and
    ``<arg_value>value</arg_value>``, on lines of their own or not; then ``</tool_call>``.
    """

    markers = (
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    )
    style = TagStyle(
        key_open="<arg_key>",
        key_close="</arg_key>",
        value_open="<arg_value>",
        value_close="</arg_value>",
        call_close="</tool_call>",
    )
    section_open, section_close = "<tool_call>", ""
    call_open, name_close = "", ""

    def _after_call(self) -> bool:
        return self._fail() if self._at_text() else False


class MinimaxM2Parser(TaggedParser):
    """MiniMax M2: ``<minimax:tool_call>``, and for each call ``<invoke name="name">``, parameters
    as ``<parameter name="key">value</parameter>``, and ``</invoke>``; ``</minimax:tool_call>``.
    """

    markers = ("<minimax:tool_call>", "</minimax:tool_call>")
    style = TagStyle(
        key_open='<parameter name="',
        key_close='">',
        value_close="</parameter>",
        lenient_ends=('<parameter name="', "</invoke>"),
        call_close="</invoke>",
    )
    section_open, section_close = "<minimax:tool_call>", "</minimax:tool_call>"
    call_open, name_close = '<invoke name="', '">'
    has_sections = True

    def _after_call(self) -> bool:
        if not self._at_text() or self._may_become(self.call_open):
            return False
        if self._buffer.startswith(self.call_open):
            return self._before_call()
        return super()._after_call()
