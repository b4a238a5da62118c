"""How a model writes thoughts and calls: by the flags, else by what its chat template says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.parsers.harmony import CHANNEL, MESSAGE
from streamserve.engine.parsers.reasoning import REASONING_PARSERS, reasoning_parser_of_template
from streamserve.engine.parsers.tool_formats import (
    TOOL_PARSER_ALIASES,
    TOOL_PARSERS,
    has_calls,
    has_results_in_calls,
    has_text_arguments,
    has_tools_in_messages,
    tool_parser_of_template,
)
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import ConfigError

HARMONY = "openai_gptoss"
HARMONY_CALLS = "openai"
TOOL_PARSER_NAMES = (*TOOL_PARSERS, HARMONY_CALLS)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """The names of the parsers, ``None`` where the model has no such thing.

    ``template_variables`` are the names that the chat template reads; ``has_tools_in_messages``:
    it finds tools in the system message. ``has_text_arguments``: it takes a call's for JSON;
    ``has_calls``: it shows those of earlier messages; ``has_results_in_calls``: it finds what tools
    gave in the message that calls them.
    ``template_defaults`` are variables that it gets where a request does not say them.
    """

    tool_parser: str | None = None
    reasoning_parser: str | None = None
    template_variables: frozenset[str] = frozenset()
    has_tools_in_messages: bool = False
    has_text_arguments: bool = False
    has_calls: bool = False
    has_results_in_calls: bool = False
    template_defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("tool-call-parser", self.tool_parser, TOOL_PARSER_NAMES)
        _one_of("reasoning-parser", self.reasoning_parser, REASONING_PARSERS)
        if self.tool_parser is not None and self.is_harmony != (self.tool_parser == HARMONY_CALLS):
            raise ConfigError(
                f"--tool-call-parser {HARMONY_CALLS} and --reasoning-parser {HARMONY} are one "
                f"format, got {self.tool_parser} and {self.reasoning_parser}"
            )

    @property
    def is_harmony(self) -> bool:
        """Whether answers are messages, in gpt-oss's format."""
        return self.reasoning_parser == HARMONY


class MarkIds:
    """Token ids of the marks around thoughts and calls, remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, tuple[int, ...]] = {}

    def ids(self, mark: str) -> tuple[int, ...]:
        """The ids that a mark is written in."""
        if mark not in self._ids:
            self._ids[mark] = tuple(self._tokenizer.encode(mark, add_special_tokens=False))
        return self._ids[mark]

    def is_special(self, mark: str) -> bool:
        """Whether ``skip_special_tokens`` would leave it out, or a token of it."""
        return any(self._tokenizer.is_special(token_id) for token_id in self.ids(mark))


def choose_answer_format(
    template: ChatTemplate,
    *,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    enable_auto_tool_choice: bool | None = None,
    template_defaults: Mapping[str, Any] = MappingProxyType({}),
) -> AnswerFormat:
    """The parsers that the flags name, or else those of the template.

    With ``enable_auto_tool_choice`` there must be one for calls, with ``False`` there is none.
    Raises ``ConfigError``.
    """
    if tool_parser is not None:
        tool_parser = TOOL_PARSER_ALIASES.get(tool_parser, tool_parser)
    variables = template.variables
    knows_tools = "tools" in variables
    in_messages = has_tools_in_messages(template.text, knows_tools=knows_tools)
    if reasoning_parser is None:
        reasoning_parser = _reasoning_parser(tool_parser, template.text)
    if reasoning_parser == HARMONY and tool_parser is None:
        tool_parser = HARMONY_CALLS if knows_tools else None
    elif tool_parser is None and (knows_tools or in_messages):
        tool_parser = tool_parser_of_template(template.text)
    if enable_auto_tool_choice is False:
        tool_parser = None
    elif enable_auto_tool_choice and tool_parser is None:
        raise ConfigError(
            "--enable-auto-tool-choice needs a --tool-call-parser here: the chat template"
            f" ({template.source}) does not tell which of {', '.join(TOOL_PARSER_NAMES)} it is"
        )
    return AnswerFormat(
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        template_variables=variables,
        has_tools_in_messages=in_messages,
        has_text_arguments=has_text_arguments(template.text),
        has_calls=has_calls(template.text),
        has_results_in_calls=has_results_in_calls(template.text),
        template_defaults=dict(template_defaults),
    )


def _reasoning_parser(tool_parser: str | None, template: str) -> str | None:
    is_harmony = CHANNEL in template and MESSAGE in template
    if tool_parser == HARMONY_CALLS or (tool_parser is None and is_harmony):
        return HARMONY
    return reasoning_parser_of_template(template)


def _one_of(flag: str, value: str | None, names: tuple[str, ...]) -> None:
    if value is not None and value not in names:
        raise ConfigError(f"--{flag} must be one of {', '.join(names)}, got {value!r}")
