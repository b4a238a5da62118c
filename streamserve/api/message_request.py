"""The bodies of ``POST /v1/messages`` and of ``count_tokens``: read, and said as a chat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from streamserve.api.chat_messages import set_thoughts, text_content, tool_call
from streamserve.api.chat_request import MAX_MESSAGES, ChatRequest, ReasoningOptions
from streamserve.api.choices import Choices
from streamserve.api.extras import read_extras
from streamserve.api.fields import (
    FieldTable,
    Reader,
    Refused,
    integer,
    list_of,
    nested,
    one_of,
    out_of_range,
    read_bool,
    read_str,
    require,
    typed,
    wrong_type,
)
from streamserve.api.message_fields import (
    BLOCKS,
    ThinkingConfig,
    blocks_schema,
    message_tool_use,
    read_blocks,
    read_format,
    read_message_tool_choice,
    read_message_tools,
    read_metadata,
    read_output_config,
    read_texts,
    read_thinking,
)
from streamserve.api.sampling import COMMON_FIELDS, SAMPLING_FIELDS, read_common, sampling_params
from streamserve.core.sampling_params import MAX_STOP_STRINGS, SamplingParams
from streamserve.core.structured_output import StructuredOutput
from streamserve.errors import InvalidParameterError

# Who may say what.
_KINDS = {
    "assistant": ("text", "thinking", "tool_use"),
    "system": ("text",),
    "user": ("text", "tool_result"),
}
_BLOCKS = {role: {kind: BLOCKS[kind] for kind in kinds} for role, kinds in _KINDS.items()}


@typed(blocks_schema(*BLOCKS.values()))
def _read_content(_name: str, value: Any) -> Any:
    """As it is: what it may hold depends on the role."""
    return value


TURN_TABLE = FieldTable(
    {"content": _read_content, "role": one_of(*_KINDS)}, required=("role", "content")
)


@nested({"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": TURN_TABLE.schema()})
def _read_messages(name: str, value: Any, unknown: list[str]) -> list[dict[str, Any]]:
    """The turns as chat messages; turns of one role that follow each other are one."""
    if not isinstance(value, list):
        raise wrong_type(name, "an array of messages", value)
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise out_of_range(name, f"an array of 1 to {MAX_MESSAGES} messages", value)
    turns: list[tuple[str, list[dict[str, Any]]]] = []
    for i, raw in enumerate(value):
        role, blocks = _read_turn(f"{name}[{i}]", raw, unknown)
        if turns and turns[-1][0] == role:
            turns[-1][1].extend(blocks)
        else:
            turns.append((role, blocks))
    role, blocks = turns[-1]
    if role == "assistant" and any(block["type"] == "tool_use" for block in blocks):
        raise InvalidParameterError(
            f"{name} must not end with a tool_use block: its tool_result comes next",
            param=name,
            code="invalid_value",
        )
    return [message for role, blocks in turns for message in _as_chat(role, blocks)]


def _read_turn(where: str, raw: Any, unknown: list[str]) -> tuple[str, list[dict[str, Any]]]:
    values = TURN_TABLE.read_inner(where, raw, unknown)
    role: str = values["role"]
    content = values["content"]
    blocks = read_blocks(f"{where}.content", content, _BLOCKS[role], unknown)
    if not blocks and role != "assistant":
        raise out_of_range(f"{where}.content", "a string or at least one block", content)
    return role, blocks


def _as_chat(role: str, blocks: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A turn as chat messages: each result of a tool is one of its own."""
    if role == "assistant":
        yield _assistant(blocks)
        return
    texts: list[str] = []
    for block in blocks:
        if block["type"] == "text":
            texts.append(block["text"])
            continue
        if texts:
            yield {"role": role, "content": text_content(texts)}
            texts = []
        yield _tool_result(block)
    if texts:
        yield {"role": role, "content": text_content(texts)}


def _assistant(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    # Its text was one before calls cut it.
    message["content"] = "".join(b["text"] for b in blocks if b["type"] == "text")
    thoughts = "\n".join(b["thinking"] for b in blocks if b["type"] == "thinking")
    if thoughts:
        set_thoughts(message, thoughts)
    calls = [
        tool_call(block["id"], block["name"], block["input"])
        for block in blocks
        if block["type"] == "tool_use"
    ]
    if calls:
        message["tool_calls"] = calls
    return message


def _tool_result(block: dict[str, Any]) -> dict[str, Any]:
    texts = [part["text"] for part in block.get("content", ())]
    if block.get("is_error", False):
        # Chat templates have no word for it.
        texts = ["Error: " + texts[0], *texts[1:]] if texts else ["Error"]
    content = text_content(texts)
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}


@typed(
    {
        "type": "array",
        "items": {"type": "string", "minLength": 1},
        "maxItems": MAX_STOP_STRINGS,
    }
)
def _read_stops(name: str, value: Any) -> tuple[str, ...]:
    stops: tuple[str, ...] = list_of(read_str, "strings", MAX_STOP_STRINGS)(name, value)
    if "" in stops:
        raise out_of_range(name, "an array of non-empty strings", value)
    return stops


_CLEAR_NOTHING = {"type": "clear_thinking_20251015", "keep": "all"}
"""Claude Code says it in each of its requests."""

_BILLING = "x-anthropic-billing-header:"
"""Claude Code's system prompt begins with a line of this, another one in each request: it says
nothing to the model, and with it no prefix would be found in the cache."""

_ANNOTATIONS = frozenset({"cache_control", "service_tier", "user_profile_id", "workspace_id"})
_REFUSED: dict[str, Refused] = {
    "container": Refused(),
    "context_management": Refused(({}, {"edits": []}, {"edits": [_CLEAR_NOTHING]})),
    "diagnostics": Refused(),
    "inference_geo": Refused(),
    "mcp_servers": Refused(([],)),
    "speed": Refused(("standard",)),
}
_COUNT_FIELDS: dict[str, Reader] = {
    "messages": _read_messages,
    "model": read_str,
    "output_config": read_output_config,
    "output_format": read_format,
    "system": read_texts,
    "thinking": read_thinking,
    "tool_choice": read_message_tool_choice,
    "tools": read_message_tools,
}
MESSAGES_FIELDS: dict[str, Reader] = {
    **_COUNT_FIELDS,
    # What chat knows beyond Anthropic's fields, for clients that send it here.
    **{name: reader for name, reader in SAMPLING_FIELDS.items() if name != "stop"},
    "cache_salt": COMMON_FIELDS["cache_salt"],
    "max_tokens": integer(1),
    "metadata": read_metadata,
    "priority": COMMON_FIELDS["priority"],
    "stop_sequences": _read_stops,
    "stream": read_bool,
}
MESSAGES_TABLE = FieldTable(MESSAGES_FIELDS, _REFUSED, _ANNOTATIONS, ("max_tokens", "messages"))
COUNT_TABLE = FieldTable(_COUNT_FIELDS, _REFUSED, _ANNOTATIONS, ("messages",))


def parse_messages_request(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> ChatRequest:
    """Parse, check and translate; ``defaults`` are the model's sampling defaults.

    Raises ``InvalidParameterError`` for the first field that is wrong or not supported.
    """
    values, unknown = MESSAGES_TABLE.read(body)
    max_tokens: int = require(values, "max_tokens")
    thinking: ThinkingConfig = values.get("thinking", ThinkingConfig())
    if thinking.budget is not None and thinking.budget >= max_tokens:
        raise InvalidParameterError(
            f"thinking.budget_tokens must be less than max_tokens ({max_tokens}), got"
            f" {thinking.budget}",
            param="thinking.budget_tokens",
            code="invalid_value",
        )
    if "stop_sequences" in values:
        values["stop"] = values["stop_sequences"]
    params = sampling_params(
        values, defaults, max_tokens=max_tokens, logprobs=None, prompt_logprobs=None
    )
    return _chat_request(values, unknown, replace(params, structured_output=_format(values)))


def parse_count_request(body: Mapping[str, Any]) -> ChatRequest:
    """As ``parse_messages_request``, for a prompt that is only counted."""
    values, unknown = COUNT_TABLE.read(body)
    return _chat_request(values, unknown, SamplingParams(max_tokens=1))


def _chat_request(
    values: Mapping[str, Any], unknown: list[str], params: SamplingParams
) -> ChatRequest:
    messages: list[dict[str, Any]] = require(values, "messages")
    if texts := list(_system_texts(values.get("system", ()))):
        messages.insert(0, {"role": "system", "content": text_content(texts)})
    continues = messages[-1]["role"] == "assistant"
    return ChatRequest(
        common=read_common({**values, "user": values.get("metadata", "")}, unknown),
        messages=tuple(messages),
        params=params,
        extras=read_extras(values),
        choices=Choices(),
        add_generation_prompt=not continues,
        continue_final_message=continues,
        add_special_tokens=False,
        chat_template_kwargs={},
        tools=message_tool_use(values.get("tools", ()), values.get("tool_choice")),
        reasoning=_reasoning(values),
    )


def _system_texts(blocks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for block in blocks:
        text: str = block["text"]
        if text.startswith(_BILLING):
            text = text.partition("\n")[2]
            if not text:
                continue
        yield text


def _reasoning(values: Mapping[str, Any]) -> ReasoningOptions:
    thinking: ThinkingConfig = values.get("thinking", ThinkingConfig())
    return ReasoningOptions(
        is_included=thinking.is_enabled and thinking.is_shown,
        effort=values.get("output_config", {}).get("effort"),
        budget=thinking.budget,
        is_enabled=thinking.is_enabled,
        budget_param="thinking.budget_tokens",
        effort_param="output_config.effort",
    )


def _format(values: Mapping[str, Any]) -> StructuredOutput | None:
    new: StructuredOutput | None = values.get("output_config", {}).get("format")
    old: StructuredOutput | None = values.get("output_format")
    if new is not None and old is not None:
        raise InvalidParameterError(
            "output_config.format and output_format both say what the answer looks like: give one",
            param="output_format",
            code="invalid_value",
        )
    return new or old
