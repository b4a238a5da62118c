"""`AnswerPlan` for gpt-oss, whose answers are messages of which each says who it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from streamserve.api.answer_plan import AnswerPlan
from streamserve.api.call_grammars import are_held, chosen, forced_in_format
from streamserve.api.chat_request import ChatRequest
from streamserve.api.fields import unsupported
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.structured_output import GrammarKind
from streamserve.core.thinking import Thinking, ThoughtText
from streamserve.engine.parsers.answer_format import HARMONY_CALLS, AnswerFormat, MarkIds
from streamserve.engine.parsers.harmony import (
    CHANNEL,
    END,
    MARKERS,
    MESSAGE,
    START,
    HarmonyScanner,
    Message,
    opened_by,
)
from streamserve.engine.parsers.harmony_answer import HarmonyParser

_ROLE = "assistant"
_EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmonyParsing:
    """As `AnswerParsing`. ``names`` are those of the tools."""

    opened: str
    names: frozenset[str]
    max_calls: int | None
    include_reasoning: bool
    are_calls_held: bool

    def new(self, token_bytes: Callable[[int], bytes]) -> HarmonyParser:
        return HarmonyParser(
            self.opened,
            self.names,
            token_bytes,
            max_calls=self.max_calls,
            is_certain=self.are_calls_held,
            include_reasoning=self.include_reasoning,
        )


class HarmonyPlan(AnswerPlan):
    """As `AnswerPlan`."""

    def params(self, prompt: str, marks: MarkIds) -> SamplingParams:
        """The request's sampling, and what tools and thoughts ask of it."""
        params, use = self._request.params, self._request.tools
        if use.is_forced:
            params = forced_in_format(params, use, HARMONY_CALLS)
        elif use.choice == "auto":
            params = chosen(params, use, HARMONY_CALLS)
        opened = opened_by(prompt)
        message = HarmonyScanner(opened).message
        params = replace(params, thinking=self._thinking(opened, message, params, marks))
        if params.stop and (message is None or message.is_thought):
            thoughts = ThoughtText(
                is_open=message is not None, start=_start_of_thoughts(opened), end=END
            )
            params = replace(params, thought_text=thoughts)
        if params.skip_special_tokens and any(marks.is_special(marker) for marker in MARKERS):
            params = replace(params, skip_special_tokens=False)
        return params

    def _thinking(
        self, opened: str, message: Message | None, params: SamplingParams, marks: MarkIds
    ) -> Thinking | None:
        """What holds until the thoughts end: a grammar is of what follows them.

        A grammar of calls is of whole messages, thoughts among them.
        """
        grammar, is_fresh = params.structured_output, opened.strip() == _ROLE
        is_open = message is not None and message.is_thought
        of_messages = grammar is not None and grammar.kind is GrammarKind.TOOL_CALLS
        if of_messages and not (is_fresh or is_open):
            assert grammar is not None
            raise unsupported(
                grammar.param,
                "that must be held to their schemas need an answer that begins with a message: "
                "continue_final_message and add_generation_prompt leave none here",
            )
        if message is not None and not is_open:
            return None
        if self._budget is None and (grammar is None or (of_messages and is_fresh)):
            return None
        start = _start_of_thoughts(opened)
        behind = START + _ROLE
        if grammar is None:
            behind += CHANNEL
        elif not of_messages:
            behind += f"{CHANNEL}final{MESSAGE}"
        return Thinking(
            is_open=is_open,
            start_token_ids=marks.ids(start),
            end_token_ids=marks.ids(END),
            budget=self._budget,
            start=start.encode(),
            end=END.encode(),
            next_token_ids=marks.ids(behind),
            not_next=marks.ids("analysis")[0],
        )

    def parsing(self, prompt: str) -> HarmonyParsing:
        """How the answer is read."""
        use = self._request.tools
        names = frozenset(tool.name for tool in use.tools) if self._parses_calls else frozenset()
        return HarmonyParsing(
            opened=opened_by(prompt),
            names=names,
            max_calls=None if use.is_parallel else 1,
            include_reasoning=self._request.reasoning.is_included,
            are_calls_held=are_held(self._request.params, use),
        )

    def _merged_kwargs(self) -> dict[str, Any]:
        """The request's own, and its effort; without any there are no thoughts."""
        kwargs, reasoning = self._request.chat_template_kwargs, self._request.reasoning
        effort, param = reasoning.effort, reasoning.effort_param
        if effort == "none":
            self._budget = 0
        if effort is None or effort == "none":
            return kwargs
        known = _EFFORTS if "reasoning_effort" in self._format.template_variables else ()
        if effort not in known:
            allowed = ", ".join(("none", *known))
            raise unsupported(param, f"must be one of {allowed} for this model, got {effort!r}")
        return {"reasoning_effort": effort, **kwargs}


def _start_of_thoughts(opened: str) -> str:
    """How thoughts begin behind what the prompt has opened."""
    role = "" if opened.strip() == _ROLE else START + _ROLE
    return f"{role}{CHANNEL}analysis{MESSAGE}"


def plan_answer(request: ChatRequest, answer_format: AnswerFormat) -> AnswerPlan:
    """The plan of a request to a model that answers so. Raises ``InvalidParameterError``."""
    kind = HarmonyPlan if answer_format.is_harmony else AnswerPlan
    return kind(request, answer_format)
