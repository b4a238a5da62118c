"""The body of ``POST /v1/responses``, parsed at the edge, and the chat request that it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from streamserve.api.chat_request import (
    ChatRequest,
    ReasoningOptions,
    read_template_kwargs,
    template_kwargs,
)
from streamserve.api.choices import Choices
from streamserve.api.extras import read_extras
from streamserve.api.fields import (
    FieldTable,
    Reader,
    Refused,
    TypedReader,
    integer,
    out_of_range,
    read_bool,
    read_str,
    require,
    schema_of,
)
from streamserve.api.responses.fields import (
    ENCRYPTED,
    LOGPROBS,
    PLAIN_TEXT,
    ReasoningFields,
    TextFormat,
    read_include,
    read_metadata,
    read_reasoning,
    read_stream_options,
    read_text,
    read_truncation,
)
from streamserve.api.responses.items import Item, read_id, read_input
from streamserve.api.responses.messages import chat_messages
from streamserve.api.responses.references import NO_REFERENCES, References
from streamserve.api.responses.tools import (
    AllowedTools,
    names_in_namespaces,
    read_tool_choice,
    read_tools,
    shown_tools,
    use_of_tools,
)
from streamserve.api.sampling import (
    COMMON_FIELDS,
    SAMPLING_FIELDS,
    TIME_FIELDS,
    Common,
    read_common,
    sampling_params,
)
from streamserve.api.structured import STRUCTURED_FIELDS
from streamserve.api.tool_fields import ToolChoice
from streamserve.core.sampling_params import MAX_LOGPROBS, SamplingParams
from streamserve.errors import InvalidParameterError


def _described(reader: Reader, description: str) -> Reader:
    return TypedReader(reader, {**schema_of(reader), "description": description})


RESPONSES_FIELDS: dict[str, Reader] = {
    **SAMPLING_FIELDS,
    **{name: reader for name, reader in STRUCTURED_FIELDS.items() if name != "response_format"},
    **{
        name: COMMON_FIELDS[name]
        for name in (*TIME_FIELDS, "cache_salt", "model", "priority", "stream", "user")
    },
    "background": read_bool,
    "chat_template": read_str,
    "chat_template_kwargs": read_template_kwargs,
    "include": read_include,
    "include_reasoning": read_bool,
    "input": read_input,
    "instructions": read_str,
    "max_output_tokens": integer(1),
    "max_tool_calls": integer(1),
    "metadata": read_metadata,
    "parallel_tool_calls": read_bool,
    "previous_response_id": read_id,
    "reasoning": read_reasoning,
    "store": read_bool,
    "stream_options": read_stream_options,
    "text": read_text,
    "thinking_token_budget": integer(-1),
    "tool_choice": read_tool_choice,
    "tools": read_tools,
    "top_logprobs": _described(
        integer(0, MAX_LOGPROBS), "How many alternatives to report for each token of the text."
    ),
    "truncation": read_truncation,
}

# Repeated by the response where OpenAI's does; they say nothing about the answer.
_REPEATED = ("prompt_cache_key", "safety_identifier")
_ANNOTATIONS = frozenset(
    {*_REPEATED, "prompt_cache_options", "prompt_cache_retention", "service_tier"}
)

_NOT_HERE = "is not supported"
_REFUSED: dict[str, Refused] = {
    "access_programs": Refused(),
    "background_options": Refused(({},)),
    "best_of": Refused((1,)),
    "context_management": Refused(([],)),
    "conversation": Refused((), f"{_NOT_HERE}: use previous_response_id"),
    "image": Refused(),
    "logprobs": Refused((False,), f"{_NOT_HERE}: use top_logprobs, or include"),
    "max_completion_tokens": Refused((), f"{_NOT_HERE}: use max_output_tokens"),
    "max_tokens": Refused((), f"{_NOT_HERE}: use max_output_tokens"),
    "messages": Refused((), f"{_NOT_HERE}: use input"),
    "moderation": Refused(),
    "n": Refused((1,)),
    "prompt": Refused((), f"{_NOT_HERE}: there are no stored prompts"),
    "reasoning_effort": Refused((), f"{_NOT_HERE}: use reasoning.effort"),
    "response_format": Refused((), f"{_NOT_HERE}: use text.format"),
    "verbosity": Refused(("medium",)),
}
RESPONSES_TABLE = FieldTable(RESPONSES_FIELDS, _REFUSED, _ANNOTATIONS, ("input",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a request says about its response, and not about the chat. ``repeated``: in so many
    words. ``input`` are its own items as JSON, ``previous`` the response that it goes on with.
    """

    previous: str | None
    is_background: bool
    is_stored: bool | None  # None: not said
    shows_summary: bool
    seals_thoughts: bool
    repeated: dict[str, Any]
    namespaces: dict[str, tuple[str, str]] = field(default_factory=dict)
    input: bytes = b"[]"


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """A body whose every field is valid. ``truncates``: what is too long loses its beginning."""

    chat: ChatRequest
    settings: Settings
    truncates: bool

    @property
    def common(self) -> Common:
        """What the chat says as every request does."""
        return self.chat.common


def parse_responses_request(
    body: Mapping[str, Any], defaults: Mapping[str, Any], references: References = NO_REFERENCES
) -> ResponsesRequest:
    """Parse and check; ``defaults`` are the model's sampling defaults, ``references`` what the body
    refers to.

    Raises ``InvalidParameterError`` for the first field that is wrong or not supported.
    """
    values, unknown = RESPONSES_TABLE.read(body)
    given: tuple[Item, ...] = require(values, "input")
    text: TextFormat = values.get("text", PLAIN_TEXT)
    reasoning: ReasoningFields = values.get("reasoning", ReasoningFields())
    include = values.get("include", ())
    background, store = values.get("background", False), values.get("store")
    if background and store is False:
        raise InvalidParameterError(
            "background: true may be given only with store: true",
            param="background",
            code="invalid_value",
        )
    params = _params(values, defaults, text, include)
    previous_id: str | None = values.get("previous_response_id")
    items = [references.resolved(item) for item in given]
    messages = chat_messages(
        values.get("instructions"), (*references.items_before(previous_id), *items)
    )
    if not messages:
        raise out_of_range("input", "at least one item", [])
    budget: int | None = values.get("thinking_token_budget")
    chat = ChatRequest(
        common=read_common(values, unknown),
        messages=messages,
        params=params,
        extras=read_extras({}),
        choices=Choices(),
        add_generation_prompt=True,
        continue_final_message=False,
        add_special_tokens=False,
        chat_template_kwargs=template_kwargs(values),
        tools=use_of_tools(values),
        reasoning=ReasoningOptions(
            values.get("include_reasoning", True),
            reasoning.effort,
            None if budget == -1 else budget,
            "reasoning.effort",
        ),
    )
    if params.logprobs is not None and chat.tools.choice == "auto":
        raise InvalidParameterError(
            "top_logprobs may not be given with tools that the answer may call: set tool_choice"
            " to 'none'",
            param="top_logprobs",
            code="invalid_value",
        )
    settings = Settings(
        previous=previous_id,
        is_background=background,
        is_stored=store,
        shows_summary=reasoning.summary is not None,
        seals_thoughts=ENCRYPTED in include,
        repeated=_repeated(body, values, params, text, reasoning),
        namespaces=names_in_namespaces(values.get("tools", ())),
        input=orjson.dumps(items),
    )
    return ResponsesRequest(chat, settings, values.get("truncation") == "auto")


def _params(
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    text: TextFormat,
    include: Sequence[str],
) -> SamplingParams:
    top: int | None = values.get("top_logprobs")
    params = sampling_params(
        values,
        defaults,
        max_tokens=values.get("max_output_tokens"),
        logprobs=(top or 0) if top or LOGPROBS in include else None,
        prompt_logprobs=None,
    )
    if text.grammar is None:
        return params
    if params.structured_output is not None:
        other = params.structured_output.param
        raise InvalidParameterError(
            f"text.format and {other} both say what the answer looks like: give one",
            param="text.format",
            code="invalid_value",
        )
    return replace(params, structured_output=text.grammar)


def _repeated(
    body: Mapping[str, Any],
    values: Mapping[str, Any],
    params: SamplingParams,
    text: TextFormat,
    reasoning: ReasoningFields,
) -> dict[str, Any]:
    """What a response says of its request, in OpenAI's words."""
    notes = {name: body.get(name) for name in _REPEATED}
    return {
        "background": values.get("background", False),
        "instructions": values.get("instructions"),
        "max_output_tokens": values.get("max_output_tokens"),
        "max_tool_calls": values.get("max_tool_calls"),
        "metadata": values.get("metadata", {}),
        "parallel_tool_calls": values.get("parallel_tool_calls", True),
        "previous_response_id": values.get("previous_response_id"),
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "service_tier": "default",
        "temperature": params.temperature,
        "text": text.shown,
        "tool_choice": _shown_choice(values.get("tool_choice")),
        "tools": shown_tools(values.get("tools", ())),
        "top_logprobs": values.get("top_logprobs", 0),
        "top_p": params.top_p,
        "truncation": values.get("truncation", "disabled"),
        "user": values.get("user"),
        **{name: note for name, note in notes.items() if isinstance(note, str)},
    }


def _shown_choice(choice: ToolChoice | AllowedTools | None) -> str | dict[str, Any]:
    if choice is None:
        return "auto"
    if isinstance(choice, AllowedTools):
        tools = [{"type": "function", "name": name} for name in choice.names]
        return {"type": "allowed_tools", "mode": choice.mode, "tools": tools}
    if choice.name is not None:
        return {"type": "function", "name": choice.name}
    return choice.choice
