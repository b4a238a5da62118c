"""The body of ``POST /v1/chat/completions``, parsed at the edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamserve.api.choices import Choices, read_choices
from streamserve.api.extras import ExtraFields, read_extras
from streamserve.api.fields import (
    Reader,
    Refused,
    integer,
    out_of_range,
    read_bool,
    read_fields,
    read_object,
    read_str,
    require,
    shown,
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
from streamserve.core.sampling_params import MAX_LOGPROBS, SamplingParams
from streamserve.errors import InvalidParameterError

MAX_MESSAGES = 4096

# What the renderer itself hands to a template.
_RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "continue_final_message",
        "documents",
        "messages",
        "self",
        "tools",
    }
)

# Templates know "system"; OpenAI's newer name for the same voice is mapped to it.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_REFUSED_ROLES = ("tool", "function")

_NOT_BUILT = "is not supported by this server yet"

_MESSAGE_REFUSED = {
    "audio": Refused((), _NOT_BUILT),
    "function_call": Refused((), _NOT_BUILT),
    "reasoning": Refused(("",), _NOT_BUILT),
    "reasoning_content": Refused(("",), _NOT_BUILT),
    "refusal": Refused((), _NOT_BUILT),
    "tool_call_id": Refused((), _NOT_BUILT),
    "tool_calls": Refused(([],), _NOT_BUILT),
}
# What OpenAI's client puts on an assistant message and sends back with the next turn.
_MESSAGE_ANNOTATIONS = frozenset({"annotations"})


def _read_role(name: str, value: Any) -> str:
    role = read_str(name, value)
    if role in _REFUSED_ROLES:
        raise InvalidParameterError(
            f"{name} {role!r} {_NOT_BUILT}", param=name, code="unsupported_parameter"
        )
    if role not in _ROLES:
        raise out_of_range(name, f"one of {', '.join(_ROLES)}", role)
    return _ROLES[role]


def _read_part(name: str, value: Any) -> dict[str, str]:
    part = read_object(name, value)
    kind = read_str(f"{name}.type", require_in(part, "type", name))
    if kind != "text":
        raise InvalidParameterError(
            f"{name}.type {shown(kind)} is not supported: this server reads only text",
            param=f"{name}.type",
            code="unsupported_parameter",
        )
    for field in part:
        if field not in {"type", "text"}:
            raise InvalidParameterError(
                f"{name}.{shown(field)[1:-1]} is not supported",
                param=name,
                code="unsupported_parameter",
            )
    text = read_str(f"{name}.text", require_in(part, "text", name))
    return {"type": "text", "text": text}


def require_in(values: Mapping[str, Any], field: str, where: str) -> Any:
    """The value of a field that an inner object must have."""
    if values.get(field) is None:
        raise InvalidParameterError(
            f"{where}.{field} is required", param=where, code="missing_required_parameter"
        )
    return values[field]


def _read_content(name: str, value: Any) -> str | list[dict[str, str]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of text parts", value)
    if not value:
        raise out_of_range(name, "a string or at least one text part", value)
    return [_read_part(f"{name}[{i}]", part) for i, part in enumerate(value)]


def _read_template_kwargs(name: str, value: Any) -> dict[str, Any]:
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
    "role": _read_role,
}


@dataclass(frozen=True, slots=True)
class _Messages:
    items: tuple[dict[str, Any], ...]
    unknown: tuple[str, ...]


def _plain_message(raw: Any) -> dict[str, Any] | None:
    """What nearly all messages are, without the names of fields: a chat may have thousands."""
    if not isinstance(raw, dict) or len(raw) != 2:
        return None
    role, content = raw.get("role"), raw.get("content")
    if not isinstance(role, str) or not isinstance(content, str) or role not in _ROLES:
        return None
    return {"role": _ROLES[role], "content": content}


def _read_messages(name: str, value: Any) -> _Messages:
    if not isinstance(value, list):
        raise wrong_type(name, "an array of messages", value)
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise out_of_range(name, f"an array of 1 to {MAX_MESSAGES} messages", value)
    items: list[dict[str, Any]] = []
    unknown: list[str] = []
    for i, raw in enumerate(value):
        plain = _plain_message(raw)
        if plain is not None:
            items.append(plain)
            continue
        where = f"{name}[{i}]"
        message, unknown_here = read_fields(
            read_object(where, raw),
            honoured=_MESSAGE_FIELDS,
            refused=_MESSAGE_REFUSED,
            annotations=_MESSAGE_ANNOTATIONS,
            prefix=f"{where}.",
        )
        role = require_in(message, "role", where)
        if role == "assistant":
            message.setdefault("content", "")
        require_in(message, "content", where)
        items.append(message)
        unknown += unknown_here
    return _Messages(tuple(items), tuple(unknown))


CHAT_FIELDS: dict[str, Reader] = {
    **COMMON_FIELDS,
    "add_generation_prompt": read_bool,
    "add_special_tokens": read_bool,
    "chat_template_kwargs": _read_template_kwargs,
    "continue_final_message": read_bool,
    "logprobs": read_bool,
    "max_completion_tokens": integer(1),
    "max_tokens": integer(1),
    "messages": _read_messages,
    "top_logprobs": integer(0, MAX_LOGPROBS),
}

CHAT_REFUSED: dict[str, Refused] = {
    **REFUSED,
    "audio": Refused(),
    "chat_template": Refused((), _NOT_BUILT),
    "documents": Refused(([],), _NOT_BUILT),
    "echo": Refused((False,), "is not supported for chat"),
    "function_call": Refused(("none", "auto"), _NOT_BUILT),
    "functions": Refused(([],), _NOT_BUILT),
    "include_reasoning": Refused((True,), _NOT_BUILT),
    "media_io_kwargs": Refused(({},)),
    "mm_processor_kwargs": Refused(({},)),
    "modalities": Refused((["text"],), "is not supported: this server writes only text"),
    "moderation": Refused(),
    # It says how several tool calls come: without tools both values ask for nothing.
    "parallel_tool_calls": Refused((True, False), _NOT_BUILT),
    "prediction": Refused((), _NOT_BUILT),
    "reasoning_effort": Refused(("none",), _NOT_BUILT),
    "return_prompt_text": Refused((False,), _NOT_BUILT),
    # Without tools "auto" can only choose none.
    "tool_choice": Refused(("none", "auto"), _NOT_BUILT),
    "tools": Refused(([],), _NOT_BUILT),
    "verbosity": Refused(("medium",), _NOT_BUILT),
    "web_search_options": Refused(),
}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat request whose every field is valid.

    ``messages`` hold role, content (a string or text parts), maybe name.
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


def parse_chat_request(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> ChatRequest:
    """Parse and check; ``defaults`` are the model's sampling defaults.

    Raises ``InvalidParameterError`` for the first field that is wrong or not supported.
    """
    values, unknown = read_fields(
        body, honoured=CHAT_FIELDS, refused=CHAT_REFUSED, annotations=ANNOTATIONS
    )
    messages: _Messages = require(values, "messages")
    continue_final = values.get("continue_final_message", False)
    add_prompt = values.get("add_generation_prompt", not continue_final)
    if continue_final and add_prompt:
        raise InvalidParameterError(
            "add_generation_prompt and continue_final_message cannot both be true",
            param="continue_final_message",
            code="invalid_value",
        )
    return ChatRequest(
        common=read_common(values, unknown + list(messages.unknown)),
        messages=messages.items,
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
        chat_template_kwargs=values.get("chat_template_kwargs", {}),
    )


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
