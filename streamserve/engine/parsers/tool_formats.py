"""How the families of models write tool calls, and how a grammar makes them write."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Mapping
from typing import Any

from streamserve.engine.parsers.gemma_calls import Gemma4Parser
from streamserve.engine.parsers.list_formats import CohereParser
from streamserve.engine.parsers.markers import NAME, num_leading_spaces
from streamserve.engine.parsers.pythonic_formats import Lfm2Parser, Olmo3Parser, PythonicParser
from streamserve.engine.parsers.section_formats import (
    DeepSeekV3Parser,
    DeepSeekV31Parser,
    KimiK2Parser,
)
from streamserve.engine.parsers.tagged_formats import (
    Glm45Parser,
    MinimaxM2Parser,
    Qwen3CoderParser,
    SeedOssParser,
)
from streamserve.engine.parsers.tool_parser import ToolParser

_ADDED_ARGUMENTS = re.compile(r"\+ *tool\['function'\]\['arguments'\] *\+ *'(?:\\n|<｜)")
_ALPHANUMERICS = string.ascii_letters + string.digits
_TOOLS_OF_MESSAGE = r"(?:message|item)(?:\.tools\b|\[['\"]tools['\"]\])"


class HermesParser(ToolParser):
    """Hermes 2 Pro and later, Qwen 2.5, Qwen 3: ``<tool_call>{"name": …, "arguments": {…}}`` and
    ``</tool_call>`` (which may be missing), any number of times, mostly behind some text.
    """

    markers = ("<tool_call>", "</tool_call>")

    def _begin(self) -> bool:
        return self._in_text()

    def _in_text(self) -> bool:
        return self._say_until({"<tool_call>": self._read_call})

    def _after_call(self) -> bool:
        if not self._at_text() or self._may_become("</tool_call>"):
            return False
        if self._buffer.startswith("</tool_call>"):
            self._consume(len("</tool_call>"))
            self._raw = ""
        return self._fail()


class Llama3JsonParser(ToolParser):
    """Llama 3.1 and later: nothing but ``{"name": …, "parameters": {…}}``, several with ``;``
    between them, sometimes with ``<|python_tag|>`` before, or that behind some text.
    """

    markers = ("<|python_tag|>",)

    def _begin(self) -> bool:
        if not self._at_text() or self._may_become("<|python_tag|>"):
            return False
        return self._read_call() if self._buffer[0] == "{" else self._fail()

    def _in_text(self) -> bool:
        return self._say_until({"<|python_tag|>": self._read_call})

    def _after_call(self) -> bool:
        if not self._at_text():
            return False
        if self._buffer[0] == "{":
            return self._read_call()
        if self._buffer[0] in ";,":
            self._consume(1)
            return self._read_call()
        return self._fail()


class MistralParser(ToolParser):
    """Mistral: text, then ``[TOOL_CALLS]`` and an array of ``{"name": …, "arguments": {…}}``.

    Since the tokenizer's version 11 each call is ``[TOOL_CALLS]name{…}`` by itself, with
    ``[CALL_ID]id`` or ``[ARGS]`` between the name and the arguments in some versions.
    """

    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    @staticmethod
    def make_id() -> str:
        """Nine letters and digits: Mistral's templates accept no other."""
        return "".join(secrets.choice(_ALPHANUMERICS) for _ in range(9))

    def _begin(self) -> bool:
        return self._in_text()

    def _in_text(self) -> bool:
        return self._say_until({"[TOOL_CALLS]": self._after_marker})

    def _after_marker(self) -> bool:
        if not self._at_text():
            return False
        if self._buffer[0] == "[":
            self._consume(1)
            self._is_array = True
            return self._read_call()
        self._is_array = False
        return self._read_call() if self._buffer[0] == "{" else self._in_name()

    _is_array = False
    _name = ""

    def _in_name(self) -> bool:
        found = NAME.match(self._buffer)
        assert found is not None
        if found.end() == len(self._buffer) and not self._is_final:
            self._state = self._in_name
            return False
        self._name = self._consume(found.end())
        if self._name not in self._tools:
            return self._fail()
        self._state = self._before_arguments
        return True

    def _before_arguments(self) -> bool:
        if not self._at_text():
            return False
        if self._buffer[0] == "{":
            return self._read_call(self._name)
        if self._may_become("[ARGS]") or self._may_become("[CALL_ID]"):
            return False
        if self._buffer.startswith("[ARGS]"):
            self._consume(len("[ARGS]"))
            return True
        if not self._buffer.startswith("[CALL_ID]"):
            return self._fail()
        found = NAME.match(self._buffer, len("[CALL_ID]"))
        assert found is not None
        if found.end() == len(self._buffer) and not self._is_final:
            return False
        self._consume(found.end())
        return True

    def _after_call(self) -> bool:
        if not self._at_text():
            return False
        return self._after_item() if self._is_array else self._fail()


class Glm4Parser(ToolParser):
    """GLM 4: the name alone on the first line, and behind it the arguments; one call."""

    _name = ""

    def _begin(self) -> bool:
        if not self._at_text():
            return False
        found = NAME.match(self._buffer)
        assert found is not None
        name, rest = found[0], self._buffer[found.end() :]
        if not rest and not self._is_final and any(n.startswith(name) for n in self._tools):
            return False
        if name not in self._tools:
            return self._fail()
        self._name = self._consume(found.end())
        self._state = self._before_arguments
        return True

    def _before_arguments(self) -> bool:
        spaces = self._buffer[: num_leading_spaces(self._buffer)]
        if spaces == self._buffer and not self._is_final:
            return False
        self._consume(len(spaces))
        if "\n" not in spaces or not self._buffer.startswith("{"):
            return self._fail()
        return self._read_call(self._name)

    def _in_text(self) -> bool:
        return self._say_rest()

    def _after_call(self) -> bool:
        return self._fail() if self._at_text() else False


class Phi4MiniParser(ToolParser):
    """Phi 4 mini: text, then ``<|tool_call|>``, an array of ``{"name": …, "arguments": {…}}``, and
    ``<|/tool_call|>``; or ``functools`` and the array, and nothing else.
    """

    markers = ("<|tool_call|>", "<|/tool_call|>")

    def _begin(self) -> bool:
        if not self._at_text() or self._may_become("functools["):
            return False
        if self._buffer.startswith("functools["):
            self._consume(len("functools"))
            return self._in_array()
        return self._fail()

    def _in_text(self) -> bool:
        return self._say_until({"<|tool_call|>": self._in_array})

    def _in_array(self) -> bool:
        if not self._at_text():
            self._state = self._in_array
            return False
        if self._buffer[0] != "[":
            return self._fail()
        self._consume(1)
        return self._read_call()

    def _after_call(self) -> bool:
        if not self._at_text() or self._may_become("<|/tool_call|>"):
            return False
        if self._buffer.startswith("<|/tool_call|>"):
            self._consume(len("<|/tool_call|>"))
            self._raw = ""
            return self._fail()
        if self._buffer[0] in ",]":
            is_more = self._consume(1) == ","
            self._raw = "" if not is_more else self._raw
            return self._read_call() if is_more else True
        return self._fail()


class RequiredParser(ToolParser):
    """What the grammar of ``tool_choice: "required"`` makes: an array of
    ``{"name": …, "parameters": {…}}`` and nothing else.
    """

    def __init__(self, tools: Mapping[str, Any], *, max_calls: int | None = None) -> None:
        super().__init__(tools, max_calls=max_calls, is_certain=True)

    def _begin(self) -> bool:
        if not self._at_text():
            return False
        if self._buffer[0] != "[":
            return self._fail()
        self._consume(1)
        return self._read_call()

    def _in_text(self) -> bool:
        return self._say_rest()

    def _after_call(self) -> bool:
        return self._after_item()


class NamedParser(RequiredParser):
    """What the grammar of a named ``tool_choice`` makes: the arguments of one call."""

    def __init__(self, name: str) -> None:
        super().__init__({name: {}}, max_calls=1)
        self._name = name

    def _begin(self) -> bool:
        return self._read_call(self._name)


TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "glm4": Glm4Parser,
    "phi4_mini_json": Phi4MiniParser,
    "qwen3_coder": Qwen3CoderParser,
    "seed_oss": SeedOssParser,
    "glm45": Glm45Parser,
    "minimax_m2": MinimaxM2Parser,
    "kimi_k2": KimiK2Parser,
    "deepseek_v3": DeepSeekV3Parser,
    "deepseek_v31": DeepSeekV31Parser,
    "lfm2": Lfm2Parser,
    "pythonic": PythonicParser,
    "olmo3": Olmo3Parser,
    "gemma4": Gemma4Parser,
    "cohere": CohereParser,
}

TOOL_PARSER_ALIASES = {
    "glm47": "glm45",
    "qwen3_xml": "qwen3_coder",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
}
"""vLLM's other names of formats that are read here."""

_MARKS_OF_TEMPLATES = {
    "phi4_mini_json": ("<|tool|>", "<|/tool|>"),
    "seed_oss": ("<seed:tool_call>", "<function="),
    "qwen3_coder": ("<tool_call>", "<function=", "<parameter="),
    "glm45": ("<tool_call>", "<arg_key>", "<arg_value>"),
    "minimax_m2": ("<minimax:tool_call>", '<invoke name="', '<parameter name="'),
    "kimi_k2": ("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"),
    "deepseek_v3": ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "```json"),
    "deepseek_v31": ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
    "lfm2": ("List of tools: ", "<|im_start|>"),
    "cohere": ("<|START_ACTION|>", "tool_name"),
    "olmo3": ("<functions>", "<function_calls>"),
    "pythonic": ("[func_name1(params_name1=",),
    "gemma4": ("<|tool_call>call:",),
}


def tool_parser_of_template(source: str) -> str | None:
    """The name of the parser for what a chat template that knows tools has models write."""
    for name, marks in _MARKS_OF_TEMPLATES.items():
        if all(mark in source for mark in marks):
            return name
    if any(mark in source for mark in ("<function=", "<invoke name=", "<|tool_call")):
        return None  # calls in formats of their own
    if "<tool_call>" in source:
        return "hermes"
    if "[TOOL_CALLS]" in source:
        return "mistral"
    if "<|python_tag|>" in source or '"parameters": dictionary' in source:
        return "llama3_json"
    if "[gMASK]" in source and "metadata" in source:
        return "glm4"
    return None


def has_tools_in_messages(source: str, *, knows_tools: bool) -> bool:
    """Whether a chat template finds the tools in the system message.

    ``knows_tools``: there is a variable of that name, which it may have set to what it found there.
    """
    setter = "set tools = " if knows_tools else ""
    return re.search(setter + _TOOLS_OF_MESSAGE, source) is not None


def has_calls(source: str) -> bool:
    """Whether a chat template shows the calls of earlier messages."""
    return "tool_calls" in source


def has_text_arguments(source: str) -> bool:
    """Whether a chat template adds the arguments of calls to text, as JSON that they must be."""
    return _ADDED_ARGUMENTS.search(source) is not None


def has_results_in_calls(source: str) -> bool:
    """Whether a chat template finds the results of calls in the message of the calls alone."""
    return "tool_responses" in source and "tool_call_id" not in source
