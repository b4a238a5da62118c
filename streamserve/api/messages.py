"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's API, served as chat is."""

from __future__ import annotations

import secrets
from dataclasses import replace

import orjson
from starlette.responses import Response

from streamserve.api.admitted import Call
from streamserve.api.body import ignored_fields_headers
from streamserve.api.generation import ChatEndpoint
from streamserve.api.message_request import parse_count_request, parse_messages_request
from streamserve.api.message_wire import MESSAGE_PING, MessageEnvelope, MessagesWire
from streamserve.api.prompts import Work


class MessagesEndpoint(ChatEndpoint):
    """``POST /v1/messages``."""

    endpoint = "messages"
    parse = staticmethod(parse_messages_request)
    ping = MESSAGE_PING

    async def prepare(self, raw: bytes, salt: str) -> Work:
        """As for a chat, but ``max_tokens`` is at most what the context has left.

        It must be given, so that clients say more than a small model has.
        """
        work = await super().prepare(raw, salt)
        params, [prompt] = work.params, work.prompts
        num_left = self._context.max_model_len - len(prompt.token_ids)
        if params.max_tokens is None or not 1 <= num_left < params.max_tokens:
            return work
        return replace(work, params=replace(params, max_tokens=num_left))

    def wire(self, work: Work, owner: str) -> MessagesWire:
        context = self._context
        envelope = MessageEnvelope(
            id=f"msg_{secrets.token_hex(16)}",
            model=work.common.model or context.config.served_model_names[0],
            max_model_len=context.max_model_len,
        )
        return MessagesWire(envelope)


class CountTokensEndpoint(ChatEndpoint):
    """``POST /v1/messages/count_tokens``: the prompt is made and not answered."""

    endpoint = "count_tokens"
    parse = staticmethod(parse_count_request)

    async def _answer(self, work: Work, call: Call) -> None:
        count = sum(len(prompt.token_ids) for prompt in work.prompts)
        response = Response(
            orjson.dumps({"input_tokens": count}),
            headers=ignored_fields_headers(work.common.unknown_fields),
            media_type="application/json",
        )
        call.guard.release()
        await response(call.scope, call.receive, call.send)
