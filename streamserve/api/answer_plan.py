"""What a chat request's tools and reasoning mean for its prompt, its sampling and its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from streamserve.api.call_grammars import are_held, chosen, forced, may_be_free
from streamserve.api.chat_request import ChatRequest
from streamserve.api.family_messages import family_messages
from streamserve.api.fields import unsupported
from streamserve.api.tool_fields import ToolUse
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.thinking import Thinking, ThoughtText
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.parsers.answer_format import AnswerFormat, MarkIds
from streamserve.engine.parsers.reasoning import (
    THINK,
    ReasoningParser,
    ReasoningTokens,
    ThinkState,
    ThoughtMarks,
    state_after_prompt,
    thought_marks,
)
from streamserve.engine.parsers.response import ResponseParser, response_marks
from streamserve.engine.parsers.tool_formats import TOOL_PARSERS, NamedParser, RequiredParser
from streamserve.engine.parsers.tool_parser import ToolParser
from streamserve.engine.template_turns import text_of
from streamserve.errors import InvalidParameterError

_THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Variables of chat templates that turn thoughts on and off: Qwen's and others', DeepSeek's."""


class Parsing(Protocol):
    """How an answer is read. May be pickled."""

    def new(self, token_bytes: Callable[[int], bytes]) -> AnswerParser:
        """One choice's parser, before its first character."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerParsing:
    """A `Parsing` of thoughts, and then calls, each with its parser."""

    state: ThinkState
    use: ToolUse | None
    tool_parser: str | None
    include_reasoning: bool
    are_calls_held: bool
    thought_marks: ThoughtMarks = THINK
    response_marks: tuple[ThoughtMarks, ...] = ()
    is_continued: bool = False

    def new(self, token_bytes: Callable[[int], bytes]) -> AnswerParser:
        has_reasoning = self.state is not ThinkState.OVER
        start, end = (mark.encode() for mark in self.thought_marks)
        tokens = ReasoningTokens(self.state, token_bytes, start=start, end=end)
        return AnswerParser(
            reasoning=ReasoningParser(self.state, self.thought_marks) if has_reasoning else None,
            response=self._response_parser(),
            tools=None if self.use is None else self._tool_parser(self.use),
            tokens=tokens if has_reasoning else None,
            include_reasoning=self.include_reasoning,
        )

    def _response_parser(self) -> ResponseParser | None:
        if not self.response_marks:
            return None
        return ResponseParser(self.response_marks, is_open=self.is_continued)

    def _tool_parser(self, use: ToolUse) -> ToolParser:
        tools = {tool.name: tool.parameters for tool in use.tools}
        max_calls = None if use.is_parallel else 1
        if use.name is not None:
            return NamedParser(use.name)
        if use.is_forced:
            return RequiredParser(tools, max_calls=max_calls)
        return TOOL_PARSERS[self.tool_parser or ""](
            tools, max_calls=max_calls, is_certain=self.are_calls_held
        )


class AnswerPlan:
    """One request's way with tools and thoughts. ``is_plain``: it has neither.

    Raises ``InvalidParameterError`` for what this server's model cannot do.
    """

    def __init__(self, request: ChatRequest, answer_format: AnswerFormat) -> None:
        self._request = request
        self._format = answer_format
        use = request.tools
        if use.choice == "auto" and answer_format.tool_parser is None:
            raise InvalidParameterError(
                "tools with tool_choice 'auto' are not supported: this model's chat template does"
                " not know them, and the server was started without --tool-call-parser",
                param="tools",
                code="unsupported_parameter",
            )
        self._parses_calls = use.choice != "none"
        has_reasoning = answer_format.reasoning_parser is not None
        self.is_plain = not (self._parses_calls or has_reasoning)
        self._thought_marks = thought_marks(answer_format.reasoning_parser or "")
        self._response_marks = response_marks(answer_format.reasoning_parser or "")
        reasoning = request.reasoning
        if reasoning.budget is not None and not has_reasoning:
            raise unsupported(
                reasoning.budget_param,
                "is not supported: this model does not think, or the server must be told"
                " --reasoning-parser",
            )
        self._budget = reasoning.budget
        if has_reasoning and reasoning.is_enabled is False:
            self._budget = 0  # for a template that opens the thoughts all the same
        self._template_kwargs = {**answer_format.template_defaults, **self._merged_kwargs()}

    @property
    def rendering(self) -> dict[str, Any]:
        """How the messages are rendered, as ``Preprocessor.chat`` takes it."""
        return {
            "add_generation_prompt": self._request.add_generation_prompt,
            "continue_final_message": self._request.continue_final_message,
            "add_special_tokens": self._request.add_special_tokens,
            "tools": self._shown_tools,
            **self._template_kwargs,
        }

    @property
    def _shown_tools(self) -> list[dict[str, Any]] | None:
        """What the chat template sees.

        With ``tool_choice: "none"`` no tool: what the model does not know, it does not call.
        """
        use = self._request.tools
        return [tool.definition for tool in use.tools] if use.choice != "none" else None

    @property
    def messages(self) -> tuple[dict[str, Any], ...]:
        """The messages as the family's templates accept them."""
        return family_messages(self._request.messages, self._format, self._shown_tools)

    def params(self, prompt: str, marks: MarkIds) -> SamplingParams:
        """The request's sampling, and what tools and thoughts ask of it."""
        params, use = self._request.params, self._request.tools
        if use.is_forced:
            params = forced(params, use)
        elif use.choice == "auto":
            params = chosen(params, use, self._format.tool_parser or "")
        state, budget = self._state(prompt), self._budget
        if state is not ThinkState.OVER and not (
            budget is None and params.structured_output is None
        ):
            start, end = self._thought_marks
            thinking = Thinking(
                is_open=state is ThinkState.INSIDE,
                start_token_ids=marks.ids(start),
                end_token_ids=marks.ids(end),
                start=start.encode(),
                end=end.encode(),
                budget=budget,
                is_optional=may_be_free(params.structured_output),
            )
            params = replace(params, thinking=thinking)
        if state is not ThinkState.OVER and params.stop:
            start, end = self._thought_marks
            is_open = state is ThinkState.INSIDE
            params = replace(
                params, thought_text=ThoughtText(is_open=is_open, start=start, end=end)
            )
        if params.skip_special_tokens and self._has_special_markers(marks):
            params = replace(params, skip_special_tokens=False)
        return params

    def _has_special_markers(self, marks: MarkIds) -> bool:
        markers: tuple[str, ...] = ()
        if self._parses_calls and not self._request.tools.is_forced:
            markers += TOOL_PARSERS[self._format.tool_parser or ""].markers
        if self._format.reasoning_parser is not None:
            markers += self._thought_marks
        for marks_of_text in self._response_marks:
            markers += marks_of_text
        return any(marks.is_special(marker) for marker in markers)

    def parsing(self, prompt: str) -> Parsing | None:
        """How the answer is read; ``None``: its text is the content after all."""
        use, state = self._request.tools, self._state(prompt)
        if state is ThinkState.OVER and not (self._parses_calls or self._response_marks):
            return None
        return AnswerParsing(
            state=state,
            use=use if self._parses_calls else None,
            tool_parser=self._format.tool_parser,
            include_reasoning=self._request.reasoning.is_included,
            are_calls_held=are_held(self._request.params, use),
            thought_marks=self._thought_marks,
            response_marks=self._response_marks,
            is_continued=self._request.continue_final_message,
        )

    def _state(self, prompt: str) -> ThinkState:
        if self._format.reasoning_parser is None:
            return ThinkState.OVER
        last = self._request.messages[-1]
        continued = text_of(last["content"]) if self._request.continue_final_message else None
        return state_after_prompt(self._format.reasoning_parser, prompt, continued)

    def _merged_kwargs(self) -> dict[str, Any]:
        """The request's own, and what its options of reasoning mean to the template."""
        kwargs, reasoning = self._request.chat_template_kwargs, self._request.reasoning
        effort, variables = reasoning.effort, self._format.template_variables
        switch = next((name for name in _THINKING_SWITCHES if name in variables), None)
        if reasoning.is_enabled is not None and switch is not None:
            kwargs = {switch: reasoning.is_enabled, **kwargs}
        if effort is None:
            return kwargs
        if "reasoning_effort" in variables and not (effort == "none" and switch is not None):
            return {"reasoning_effort": effort, **kwargs}
        if switch is not None:
            return {switch: effort != "none", **kwargs}
        if effort == "none" and self._format.reasoning_parser is None:
            return kwargs
        raise unsupported(
            self._request.reasoning.effort_param,
            f"{effort!r} is not supported: this model's chat template does not know it",
        )
