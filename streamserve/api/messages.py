"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's API, served as chat is."""

from __future__ import annotations

import secrets
from dataclasses import replace

import orjson

from streamserve.api.admitted import Call
from streamserve.api.generation import GenerationEndpoint
from streamserve.api.message_wire import MESSAGE_PING, MessageEnvelope, MessagesWire
from streamserve.api.prompts import Prepared


class MessagesEndpoint(GenerationEndpoint):
    """``POST /v1/messages``."""

    endpoint = "messages"
    ping = MESSAGE_PING

    async def _settled(self, prepared: Prepared) -> Prepared:
        """As for a chat, but ``max_tokens`` is at most what the context has left.

        It must be given, so that clients say more than a small model has.
        """
        prepared = await super()._settled(prepared)
        params, [prompt] = prepared.params, prepared.prompts
        num_left = self._context.max_model_len - len(prompt.token_ids)
        if params.max_tokens is None or not 1 <= num_left < params.max_tokens:
            return prepared
        return replace(prepared, params=replace(params, max_tokens=num_left))

    def wire(self, prepared: Prepared, owner: str) -> MessagesWire:
        context = self._context
        envelope = MessageEnvelope(
            id=f"msg_{secrets.token_hex(16)}",
            model=prepared.common.model or context.config.served_model_names[0],
            max_model_len=context.max_model_len,
        )
        return MessagesWire(envelope)


class CountTokensEndpoint(GenerationEndpoint):
    """``POST /v1/messages/count_tokens``: the prompt is made and not answered."""

    endpoint = "count_tokens"

    async def _answer(self, prepared: Prepared, call: Call) -> None:
        [prompt] = prepared.prompts
        content = orjson.dumps({"input_tokens": len(prompt.token_ids)})
        await call.send_json(content, prepared.common.unknown_fields)
