"""The body of ``POST /v1/chat/completions``, parsed at the edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamserve.api.chat_messages import ROLES, set_thoughts
from streamserve.api.choices import Choices, read_choices
from streamserve.api.extras import ExtraFields, read_extras
from streamserve.api.fields import (
    FieldTable,
    Reader,
    Refused,
    integer,
    nested,
    one_of,
    out_of_range,
    read_bool,
    read_object,
    read_str,
    require,
    require_in,
    schema_of,
    shown,
    typed,
    unsupported,
    wrong_type,
)
from streamserve.api.sampling import (
    ANNOTATIONS,
    COMMON_FIELDS,
    REFUSED,
    Common,
    read_common,
    sampling_params,
)
from streamserve.api.tool_fields import (
    ToolUse,
    read_tool_calls,
    read_tool_choice,
    read_tools,
    tool_use,
)
from streamserve.core.sampling_params import MAX_LOGPROBS, SamplingParams
from streamserve.errors import InvalidParameterError

MAX_MESSAGES = 4096

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

# What the renderer itself hands to a template.
_RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "chat_template",
        "continue_final_message",
        "documents",
        "messages",
        "self",
        "tools",
    }
)

_NOT_BUILT = "is not supported by this server yet"

# OpenAI gave these up for tools in 2023.
_LEGACY = "is not supported: use tools, tool_choice and tool_calls"

_MESSAGE_REFUSED = {
    "audio": Refused((), _NOT_BUILT),
    "function_call": Refused((), _LEGACY),
    "refusal": Refused((), _NOT_BUILT),
}
# What OpenAI's client puts on an assistant message and sends back with the next turn.
_MESSAGE_ANNOTATIONS = frozenset({"annotations"})


@typed({"enum": [*ROLES, "tool"]})
def _read_role(name: str, value: Any) -> str:
    role = read_str(name, value)
    if role == "function":
        raise unsupported(name, f"{role!r} {_LEGACY}")
    if role != "tool" and role not in ROLES:
        raise out_of_range(name, f"one of {', '.join(ROLES)}, tool", role)
    return ROLES.get(role, role)


@typed({"const": "text"})
def _read_part_type(name: str, value: Any) -> str:
    kind = read_str(name, value)
    if kind != "text":
        raise unsupported(name, f"{shown(kind)} is not supported: this server reads only text")
    return kind


# Prefixes are cached in any case. Clients of several providers mark them for all.
_PART_TABLE = FieldTable(
    {"type": _read_part_type, "text": read_str},
    annotations=frozenset({"cache_control"}),
    required=("type", "text"),
)


@nested({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_TABLE.schema()}]})
def _read_content(name: str, value: Any, unknown: list[str]) -> str | list[dict[str, str]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of text parts", value)
    return [_PART_TABLE.read_inner(f"{name}[{i}]", part, unknown) for i, part in enumerate(value)]


@typed({"type": "object", "propertyNames": {"not": {"enum": sorted(_RESERVED_KWARGS)}}})
def read_template_kwargs(name: str, value: Any) -> dict[str, Any]:
    """Variables for the chat template."""
    kwargs = read_object(name, value)
    for key in kwargs:
        if key in _RESERVED_KWARGS:
            raise InvalidParameterError(
                f"{name} must not hold {key!r}: it has a field of its own",
                param=name,
                code="invalid_value",
            )
    return kwargs


_MESSAGE_FIELDS: dict[str, Reader] = {
    "content": _read_content,
    "name": read_str,
    "reasoning": read_str,
    "reasoning_content": read_str,
    "role": _read_role,
    "tool_call_id": read_str,
    "tool_calls": read_tool_calls,
}
# Who alone may have what.
_OWNERS = {
    "reasoning": "assistant",
    "reasoning_content": "assistant",
    "tool_call_id": "tool",
    "tool_calls": "assistant",
}


def _check_message(where: str, message: dict[str, Any]) -> None:
    """See that the fields belong to the role, and bring them into the form templates expect."""
    role = message["role"]
    for field, owner in _OWNERS.items():
        if message.get(field) and role != owner:
            raise InvalidParameterError(
                f"{where}.{field} may be given only with role {owner!r}, got {role!r}",
                param=f"{where}.{field}",
                code="invalid_value",
            )
    if role == "assistant":
        message["content"] = message.get("content") or ""
        if thoughts := message.get("reasoning_content") or message.get("reasoning"):
            set_thoughts(message, thoughts)
    elif role == "tool" and not require_in(message, "tool_call_id", where):
        raise out_of_range(f"{where}.tool_call_id", "the id of a call", "")
    if require_in(message, "content", where) == []:
        raise out_of_range(f"{where}.content", "a string or at least one text part", [])
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)


MESSAGE_TABLE = FieldTable(_MESSAGE_FIELDS, _MESSAGE_REFUSED, _MESSAGE_ANNOTATIONS, ("role",))


def _plain_message(raw: Any) -> dict[str, Any] | None:
    """What nearly all messages are, without the names of fields: a chat may have thousands."""
    if not isinstance(raw, dict) or len(raw) != 2:
        return None
    role, content = raw.get("role"), raw.get("content")
    if not isinstance(role, str) or not isinstance(content, str) or role not in ROLES:
        return None
    return {"role": ROLES[role], "content": content}


# Only an assistant may have said nothing, and a tool says whose call it answers.
_CONTENT = {"content": schema_of(_read_content)}
_CALL_ID = {"tool_call_id": {"type": "string", "minLength": 1}}
_MESSAGE_SCHEMA = {
    **MESSAGE_TABLE.schema(),
    "anyOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {
            "properties": {"role": {"enum": sorted({*ROLES} - {"assistant"})}, **_CONTENT},
            "required": ["content"],
        },
        {
            "properties": {"role": {"const": "tool"}, **_CONTENT, **_CALL_ID},
            "required": ["content", "tool_call_id"],
        },
    ],
}


@nested({"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": _MESSAGE_SCHEMA})
def _read_messages(name: str, value: Any, unknown: list[str]) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list):
        raise wrong_type(name, "an array of messages", value)
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise out_of_range(name, f"an array of 1 to {MAX_MESSAGES} messages", value)
    messages: list[dict[str, Any]] = []
    for i, raw in enumerate(value):
        plain = _plain_message(raw)
        if plain is not None:
            messages.append(plain)
            continue
        where = f"{name}[{i}]"
        message = MESSAGE_TABLE.read_inner(where, raw, unknown)
        _check_message(where, message)
        messages.append(message)
    return tuple(messages)


read_effort = one_of(*EFFORTS)


CHAT_FIELDS: dict[str, Reader] = {
    **COMMON_FIELDS,
    "add_generation_prompt": read_bool,
    "add_special_tokens": read_bool,
    "chat_template": read_str,
    "chat_template_kwargs": read_template_kwargs,
    "continue_final_message": read_bool,
    "include_reasoning": read_bool,
    "logprobs": read_bool,
    "max_completion_tokens": integer(1),
    "max_tokens": integer(1),
    "messages": _read_messages,
    "parallel_tool_calls": read_bool,
    "reasoning_effort": read_effort,
    "thinking_token_budget": integer(-1),
    "tool_choice": read_tool_choice,
    "tools": read_tools,
    "top_logprobs": integer(0, MAX_LOGPROBS),
}

CHAT_REFUSED: dict[str, Refused] = {
    **{name: refused for name, refused in REFUSED.items() if name not in CHAT_FIELDS},
    "audio": Refused(),
    "documents": Refused(([],), _NOT_BUILT),
    "echo": Refused((False,), "is not supported for chat"),
    "function_call": Refused(("none", "auto"), _LEGACY),
    "functions": Refused(([],), _LEGACY),
    "media_io_kwargs": Refused(({},)),
    "mm_processor_kwargs": Refused(({},)),
    "modalities": Refused((["text"],), "is not supported: this server writes only text"),
    "moderation": Refused(),
    "prediction": Refused((), _NOT_BUILT),
    "return_prompt_text": Refused((False,), _NOT_BUILT),
    "verbosity": Refused(("medium",), _NOT_BUILT),
    "web_search_options": Refused(),
}


CHAT_TABLE = FieldTable(CHAT_FIELDS, CHAT_REFUSED, ANNOTATIONS, ("messages",))


@dataclass(frozen=True, slots=True)
class ReasoningOptions:
    """What a request says about thinking. ``budget`` is in tokens, ``None`` for no limit.

    ``is_enabled`` of ``None`` leaves it to the chat template. Errors name the fields in
    ``effort_param`` and ``budget_param``.
    """

    is_included: bool = True
    effort: str | None = None
    budget: int | None = None
    effort_param: str = "reasoning_effort"
    budget_param: str = "thinking_token_budget"
    is_enabled: bool | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat request whose every field is valid.

    ``messages`` hold role, content (a string or text parts), maybe name; the assistant's maybe
    tool calls and reasoning, a tool's the id of its call. ``chat_template_kwargs`` hold a
    ``chat_template`` of the request's as well.
    """

    common: Common
    messages: tuple[dict[str, Any], ...]
    params: SamplingParams
    extras: ExtraFields
    choices: Choices
    add_generation_prompt: bool
    continue_final_message: bool
    add_special_tokens: bool
    chat_template_kwargs: dict[str, Any]
    tools: ToolUse
    reasoning: ReasoningOptions


def parse_chat_request(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> ChatRequest:
    """Parse and check; ``defaults`` are the model's sampling defaults.

    Raises ``InvalidParameterError`` for the first field that is wrong or not supported.
    """
    values, unknown = CHAT_TABLE.read(body)
    messages: tuple[dict[str, Any], ...] = require(values, "messages")
    add_prompt, continue_final = check_final_message(values)
    return ChatRequest(
        common=read_common(values, unknown),
        messages=messages,
        params=sampling_params(
            values,
            defaults,
            max_tokens=_max_tokens(values),
            logprobs=_logprobs(values),
            prompt_logprobs=values.get("prompt_logprobs"),
        ),
        extras=read_extras(values),
        choices=read_choices(values),
        add_generation_prompt=add_prompt,
        continue_final_message=continue_final,
        add_special_tokens=values.get("add_special_tokens", False),
        chat_template_kwargs=template_kwargs(values),
        tools=tool_use(values),
        reasoning=_reasoning(values),
    )


def template_kwargs(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the request gives the chat template, a template of its own included."""
    own = {"chat_template": values["chat_template"]} if "chat_template" in values else {}
    return {**values.get("chat_template_kwargs", {}), **own}


def _reasoning(values: Mapping[str, Any]) -> ReasoningOptions:
    budget: int | None = values.get("thinking_token_budget")
    return ReasoningOptions(
        values.get("include_reasoning", True),
        values.get("reasoning_effort"),
        None if budget == -1 else budget,
    )


def check_final_message(values: Mapping[str, Any]) -> tuple[bool, bool]:
    """``add_generation_prompt`` and ``continue_final_message``; each says not the other."""
    continue_final = values.get("continue_final_message", False)
    add_prompt = values.get("add_generation_prompt", not continue_final)
    if continue_final and add_prompt:
        raise InvalidParameterError(
            "add_generation_prompt and continue_final_message cannot both be true",
            param="continue_final_message",
            code="invalid_value",
        )
    return add_prompt, continue_final


def _max_tokens(values: Mapping[str, Any]) -> int | None:
    old: int | None = values.get("max_tokens")
    new: int | None = values.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise InvalidParameterError(
            f"max_tokens ({old}) and max_completion_tokens ({new}) say different things: give one",
            param="max_tokens",
            code="invalid_value",
        )
    return old if new is None else new


def _logprobs(values: Mapping[str, Any]) -> int | None:
    top: int | None = values.get("top_logprobs")
    if values.get("logprobs", False):
        return top or 0
    if top:
        raise InvalidParameterError(
            f"top_logprobs ({top}) may be given only with logprobs: true",
            param="top_logprobs",
            code="invalid_value",
        )
    return None
