"""How a model writes thoughts and calls: by the flags, else by what its chat template says."""

from __future__ import annotations

from dataclasses import dataclass

from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.parsers.reasoning import REASONING_PARSERS, THINK_END
from streamserve.engine.parsers.tool_formats import TOOL_PARSERS, tool_parser_of_template
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """The names of the parsers, ``None`` where the model has no such thing.

    ``template_variables`` are the names that the chat template reads.
    """

    tool_parser: str | None = None
    reasoning_parser: str | None = None
    template_variables: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _one_of("tool-call-parser", self.tool_parser, tuple(TOOL_PARSERS))
        _one_of("reasoning-parser", self.reasoning_parser, REASONING_PARSERS)


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
        """Whether it is one token, and ``skip_special_tokens`` would leave it out."""
        ids = self.ids(mark)
        return len(ids) == 1 and self._tokenizer.is_special(ids[0])


def choose_answer_format(
    template: ChatTemplate,
    *,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    enable_auto_tool_choice: bool | None = None,
) -> AnswerFormat:
    """The parsers that the flags name, or else those of the template.

    With ``enable_auto_tool_choice`` there must be one for calls, with ``False`` there is none.
    Raises ``ConfigError``.
    """
    variables = template.variables
    if tool_parser is None and "tools" in variables:
        tool_parser = tool_parser_of_template(template.text)
    if enable_auto_tool_choice is False:
        tool_parser = None
    elif enable_auto_tool_choice and tool_parser is None:
        raise ConfigError(
            "--enable-auto-tool-choice needs a --tool-call-parser here: the chat template"
            f" ({template.source}) does not tell which of {', '.join(TOOL_PARSERS)} it is"
        )
    if reasoning_parser is None and THINK_END in template.text:
        # It takes an answer without thoughts for what it is.
        reasoning_parser = "qwen3"
    return AnswerFormat(
        tool_parser=tool_parser, reasoning_parser=reasoning_parser, template_variables=variables
    )


def _one_of(flag: str, value: str | None, names: tuple[str, ...]) -> None:
    if value is not None and value not in names:
        raise ConfigError(f"--{flag} must be one of {', '.join(names)}, got {value!r}")
