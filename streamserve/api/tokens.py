"""``POST /tokenize`` and ``/detokenize``, with vLLM's bodies.

Long bodies go to a worker process as they came, and come back as the bytes of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.responses import Response

from streamserve.api.body import ignored_fields_headers, parse_json_object
from streamserve.api.context import ApiContext
from streamserve.api.prompt_workers import LONG_BODY
from streamserve.api.rate_limits import allowance_of
from streamserve.api.tenants import tenant_of
from streamserve.api.token_requests import (
    TokenAnswer,
    detokenize,
    parse_detokenize_request,
    parse_tokenize_request,
    tokenize,
)
from streamserve.errors import RequestError


class TokenEndpoints:
    """What the tokenizer makes of a text or a chat, and the way back."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def tokenize(self, request: Request) -> Response:
        """Text, or messages as the chat template renders them, to token ids."""
        with self._entered(request):
            return self._checked(
                await self._tokenize(await self._body(request), tenant_of(request.scope).salt)
            )

    async def detokenize(self, request: Request) -> Response:
        """Token ids to text."""
        with self._entered(request):
            return self._checked(
                await self._detokenize(await self._body(request), tenant_of(request.scope).salt)
            )

    @contextmanager
    def _entered(self, request: Request) -> Iterator[None]:
        """A place, the request counted, and a refusal, too."""
        context = self._context
        allowance = allowance_of(request.scope)
        try:
            with context.gate.enter():
                if allowance is not None:
                    allowance.take_request()
                yield
        except RequestError as exc:
            context.metrics.refused(exc.status, exc.code, tenant_of(request.scope).name)
            raise

    async def _body(self, request: Request) -> bytes:
        return await self._context.read_body(request.scope, request.receive)

    async def _tokenize(self, raw: bytes, salt: str) -> TokenAnswer:
        context = self._context
        workers = context.prompt_workers
        if workers is not None and len(raw) > LONG_BODY:
            return await workers.tokenize(raw, salt)
        asked = parse_tokenize_request(parse_json_object(raw), context.answer_format)
        is_rendered = asked.prompt is None
        has_run_away = is_rendered and context.preprocessor.has_run_away
        if workers is not None and (asked.has_template_kwargs or has_run_away):
            # A template may run away with what a client gives it: a process can be killed.
            return await workers.tokenize(raw, salt)
        context.models.adapter_of(asked.model)
        context.check_unknown(asked.unknown)
        return await tokenize(asked, context.preprocessor, salt, context.max_model_len)

    async def _detokenize(self, raw: bytes, salt: str) -> TokenAnswer:
        context = self._context
        workers = context.prompt_workers
        if workers is not None and len(raw) > LONG_BODY:
            return await workers.detokenize(raw, salt)
        asked = parse_detokenize_request(parse_json_object(raw))
        context.models.adapter_of(asked.model)
        context.check_unknown(asked.unknown)
        return await detokenize(asked, context.preprocessor)

    def _checked(self, answer: TokenAnswer) -> Response:
        context = self._context
        context.models.adapter_of(answer.model)
        context.check_unknown(answer.unknown)
        return Response(
            answer.content,
            headers=ignored_fields_headers(answer.unknown),
            media_type="application/json",
        )
