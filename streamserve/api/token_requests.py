"""The bodies of ``/tokenize`` and ``/detokenize``, and what a tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from streamserve.api.chat_request import (
    CHAT_FIELDS,
    CHAT_REFUSED,
    check_final_message,
    template_kwargs,
)
from streamserve.api.completion_request import read_token_ids
from streamserve.api.family_messages import family_messages
from streamserve.api.fields import (
    FieldTable,
    Reader,
    read_bool,
    read_str,
    reported,
    require,
    schema_of,
    typed,
    wrong_type,
)
from streamserve.api.sampling import token_id
from streamserve.engine.parsers.answer_format import AnswerFormat
from streamserve.engine.preprocess import Preprocessor
from streamserve.errors import InvalidParameterError

_OF_CHAT = (
    "add_generation_prompt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "messages",
    "tools",
)
_ONLY_OF_CHAT = ("chat_template", "chat_template_kwargs", "continue_final_message", "tools")
_REFUSED_OF_CHAT = ("mm_processor_kwargs",)

_FIELDS: dict[str, Reader] = {
    **{name: CHAT_FIELDS[name] for name in _OF_CHAT},
    "add_special_tokens": read_bool,
    "model": read_str,
    "prompt": read_str,
    "return_token_strs": read_bool,
}
TOKENIZE_TABLE = FieldTable(_FIELDS, {name: CHAT_REFUSED[name] for name in _REFUSED_OF_CHAT})


@typed({"type": "array", "items": schema_of(token_id)})
def _read_tokens(name: str, value: Any) -> list[int]:
    if not isinstance(value, list):
        raise wrong_type(name, "an array of token ids", value)
    return read_token_ids(name, value) if value else []


DETOKENIZE_TABLE = FieldTable({"model": read_str, "tokens": _read_tokens}, required=("tokens",))


class TokenAnswer(NamedTuple):
    """What was asked for as JSON, and what only the server can judge."""

    content: bytes
    model: str | None
    unknown: Sequence[str]


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A text, or a chat and how it is rendered, whose tokens are asked for.

    ``has_template_kwargs``: the template gets something of the client's own.
    """

    model: str | None
    unknown: Sequence[str]
    prompt: str | None
    add_special_tokens: bool
    return_token_strs: bool
    messages: tuple[dict[str, Any], ...] = ()
    rendering: dict[str, Any] = field(default_factory=dict)
    has_template_kwargs: bool = False


def parse_tokenize_request(body: Mapping[str, Any], answer_format: AnswerFormat) -> TokenizeRequest:
    """Parse and check. Raises ``InvalidParameterError``."""
    values, unknown = TOKENIZE_TABLE.read(body)
    if ("prompt" in values) == ("messages" in values):
        raise InvalidParameterError(
            "either prompt or messages must be given, and not both",
            param="prompt",
            code="missing_required_parameter" if "prompt" not in values else "invalid_value",
        )
    model, strs = values.get("model"), values.get("return_token_strs", False)
    if "prompt" in values:
        _check_asks_no_rendering(values)
        special = values.get("add_special_tokens", True)
        return TokenizeRequest(model, reported(unknown), values["prompt"], special, strs)
    add_prompt, continue_final = check_final_message(values)
    tools = [tool.definition for tool in values.get("tools", ())] or None
    own = template_kwargs(values)
    rendering = {
        "add_generation_prompt": add_prompt,
        "continue_final_message": continue_final,
        "tools": tools,
        **answer_format.template_defaults,
        **own,
    }
    messages = family_messages(values["messages"], answer_format, tools)
    special = values.get("add_special_tokens", False)
    return TokenizeRequest(
        *(model, reported(unknown), None, special, strs, messages, rendering),
        has_template_kwargs=bool(own),
    )


async def tokenize(
    request: TokenizeRequest, preprocessor: Preprocessor, salt: str, max_model_len: int
) -> TokenAnswer:
    """What ``/tokenize`` answers. Raises ``InvalidParameterError``."""
    special = request.add_special_tokens
    if request.prompt is not None:
        ids = await preprocessor.encode(request.prompt, add_special_tokens=special, salt=salt)
    else:
        prompt = await preprocessor.chat(
            request.messages, salt, add_special_tokens=special, **request.rendering
        )
        ids = prompt.token_ids
    strs = await preprocessor.id_to_token(ids) if request.return_token_strs else None
    content = {"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": strs}
    return TokenAnswer(orjson.dumps(content), request.model, request.unknown)


class DetokenizeRequest(NamedTuple):
    """Ids whose text is asked for."""

    model: str | None
    unknown: Sequence[str]
    tokens: list[int]


def parse_detokenize_request(body: Mapping[str, Any]) -> DetokenizeRequest:
    """Parse and check. Raises ``InvalidParameterError``."""
    values, unknown = DETOKENIZE_TABLE.read(body)
    return DetokenizeRequest(values.get("model"), reported(unknown), require(values, "tokens"))


async def detokenize(request: DetokenizeRequest, preprocessor: Preprocessor) -> TokenAnswer:
    """What ``/detokenize`` answers. Raises ``InvalidParameterError``."""
    text = await preprocessor.decode(request.tokens)
    return TokenAnswer(orjson.dumps({"prompt": text}), request.model, request.unknown)


def _check_asks_no_rendering(values: dict[str, Any]) -> None:
    for name in _ONLY_OF_CHAT:
        if values.get(name):
            raise InvalidParameterError(
                f"{name} may be given only with messages", param=name, code="invalid_value"
            )
