"""``POST /tokenize`` and ``/detokenize``, with vLLM's bodies."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from streamserve.api.answer_plan import with_family_ids
from streamserve.api.body import ignored_fields_headers, parse_json_object, read_body
from streamserve.api.chat_request import CHAT_FIELDS, CHAT_REFUSED, check_final_message
from streamserve.api.completion_request import read_token_ids
from streamserve.api.context import ApiContext
from streamserve.api.fields import (
    FieldTable,
    Reader,
    read_bool,
    read_fields,
    read_str,
    require,
    schema_of,
    typed,
    wrong_type,
)
from streamserve.api.generation import check_model
from streamserve.api.sampling import token_id
from streamserve.api.tool_fields import NO_TOOLS, Tools
from streamserve.errors import InvalidParameterError

_OF_CHAT = (
    "add_generation_prompt",
    "chat_template_kwargs",
    "continue_final_message",
    "messages",
    "tools",
)
_ONLY_OF_CHAT = ("chat_template_kwargs", "continue_final_message", "tools")
_REFUSED_OF_CHAT = ("chat_template", "mm_processor_kwargs")

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


class TokenEndpoints:
    """What the tokenizer makes of a text or a chat, and the way back."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def tokenize(self, request: Request) -> Response:
        """Text, or messages as the chat template renders them, to token ids."""
        with self._context.gate.enter():
            values, unknown = await self._read(request, TOKENIZE_TABLE)
            token_ids = await self._encode(values)
            token_strs = None
            if values.get("return_token_strs", False):
                token_strs = await self._context.preprocessor.id_to_token(token_ids)
        content = {
            "count": len(token_ids),
            "max_model_len": self._context.max_model_len,
            "tokens": token_ids,
            "token_strs": token_strs,
        }
        return _json(content, unknown)

    async def detokenize(self, request: Request) -> Response:
        """Token ids to text. Ids that the vocabulary lacks add nothing to it."""
        with self._context.gate.enter():
            values, unknown = await self._read(request, DETOKENIZE_TABLE)
            text = await self._context.preprocessor.decode(require(values, "tokens"))
        return _json({"prompt": text}, unknown)

    async def _read(self, request: Request, table: FieldTable) -> tuple[dict[str, Any], list[str]]:
        context = self._context
        max_bytes = context.config.max_body_bytes
        body = parse_json_object(
            await read_body(request.scope, request.receive, max_bytes=max_bytes)
        )
        values, unknown = read_fields(
            body,
            honoured=table.honoured,
            refused=table.refused,
            annotations=table.annotations,
        )
        for name in {"messages", "tools"} & values.keys():
            unknown += values[name].unknown
        check_model(values.get("model"), context.config.served_model_names)
        context.check_unknown(unknown)
        return values, unknown

    async def _encode(self, values: dict[str, Any]) -> list[int]:
        preprocessor = self._context.preprocessor
        if ("prompt" in values) == ("messages" in values):
            raise InvalidParameterError(
                "either prompt or messages must be given, and not both",
                param="prompt",
                code="missing_required_parameter" if "prompt" not in values else "invalid_value",
            )
        if "prompt" in values:
            _check_asks_no_rendering(values)
            return await preprocessor.encode(
                values["prompt"], add_special_tokens=values.get("add_special_tokens", True)
            )
        add_prompt, continue_final = check_final_message(values)
        tools: Tools = values.get("tools", NO_TOOLS)
        prompt = await preprocessor.chat(
            with_family_ids(values["messages"].items, self._context.answer_format),
            add_generation_prompt=add_prompt,
            continue_final_message=continue_final,
            add_special_tokens=values.get("add_special_tokens", False),
            tools=tools.definitions,
            **values.get("chat_template_kwargs", {}),
        )
        return prompt.token_ids


def _check_asks_no_rendering(values: dict[str, Any]) -> None:
    asked = {**values, "tools": values.get("tools", NO_TOOLS).items}
    for name in _ONLY_OF_CHAT:
        if asked.get(name):
            raise InvalidParameterError(
                f"{name} may be given only with messages", param=name, code="invalid_value"
            )


def _json(content: dict[str, Any], unknown: list[str]) -> Response:
    return Response(
        orjson.dumps(content),
        headers=ignored_fields_headers(unknown),
        media_type="application/json",
    )
