"""``POST /v1/responses``."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from streamserve.api.admitted import Call
from streamserve.api.body import ignored_fields_headers
from streamserve.api.context import ApiContext
from streamserve.api.disconnect import DisconnectGuard
from streamserve.api.generation import ChatEndpoint
from streamserve.api.metrics import Delivery
from streamserve.api.prompts import LONG_BODY, Work, next_attempt, pack_response, unpack_response
from streamserve.api.rate_limits import allowance_of
from streamserve.api.responses.archive import Archive
from streamserve.api.responses.background import BackgroundRun, LogResponse
from streamserve.api.responses.frames import Finished
from streamserve.api.responses.prompt import attempts
from streamserve.api.responses.request import Settings
from streamserve.api.responses.store import Stored, Turn
from streamserve.api.responses.wire import ResponseWire
from streamserve.api.resumption import resumption_of
from streamserve.api.tenants import Tenant, tenant_of
from streamserve.core.request import FinishReason
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.errors import InvalidParameterError


def settings_of(work: Work) -> Settings:
    """What the request says about its response."""
    assert work.settings is not None
    return work.settings


class ResponsesEndpoint(ChatEndpoint):
    """Create a response: streamed, whole, or in the background."""

    prompt_param = "input"
    endpoint = "response"

    def __init__(self, context: ApiContext, archive: Archive) -> None:
        super().__init__(context)
        self._archive = archive

    async def _serve(self, scope: Scope, receive: Receive, send: Send, arrival_time: float) -> None:
        raw = await self._context.read_body(scope, receive)
        resumption_of(scope, self.endpoint)  # raises for whatever it finds
        async with DisconnectGuard(receive) as guard:
            tenant = tenant_of(scope)
            work = await self._read(raw, tenant)
            del raw
            settings = settings_of(work)
            self._check_storage(settings)
            work = await self.compiled(await self._settled(work), tenant.salt)
            call = Call(scope, receive, send, arrival_time, guard)
            if settings.is_background:
                await self._in_background(work, call)
            else:
                await self._answer(work, call)

    async def _read(self, raw: bytes, tenant: Tenant) -> Work:
        """Parse, look up what is referred to, render and tokenise."""
        try:
            return await self._read_payload(
                pack_response(raw, await self._archive.context_of(raw, tenant.name)), tenant.salt
            )
        except InvalidParameterError as exc:
            if exc.param == "messages":  # as a chat calls it
                exc.param = "input"
            raise

    async def _read_payload(self, payload: bytes, salt: str) -> Work:
        context = self._context
        workers = context.prompt_workers
        if workers is not None and len(payload) > LONG_BODY:
            return await self._prepare_elsewhere(workers, payload, salt)
        request = unpack_response(payload, context.sampling_defaults)
        if workers is not None and self._is_wild(request.chat):
            return await self._prepare_elsewhere(workers, payload, salt)
        self.check_common(request.chat.common)
        search = attempts(request, context.max_model_len)
        work = await self._rendered(next(search), salt)
        while (chat := next_attempt(search, work)) is not None:
            work = await self._rendered(chat, salt)
        return replace(work, settings=request.settings)

    def _check_storage(self, settings: Settings) -> None:
        if (settings.is_background or settings.is_stored) and not self._archive.store.keeps_any:
            name = "background" if settings.is_background else "store"
            raise InvalidParameterError(
                f"{name}: true is not supported: the server was started with"
                " --max-stored-responses 0",
                param=name,
                code="unsupported_parameter",
            )

    def _parsers(self, work: Work) -> list[AnswerParser | None]:
        return [None] * len(work.prompts)  # the wire has its own

    def wire(self, work: Work, owner: str) -> ResponseWire:
        """The response, which is kept when it has ended, unless that is not wanted."""
        archive = self._archive
        settings = settings_of(work)
        turn = self._turn(settings, owner)

        def finished(response: bytes, output: bytes) -> None:
            if settings.is_stored is not False:
                turn.output = output
                archive.store.put(f"resp_{turn.key}", Stored(owner, response, turn))

        return self._wire(work, turn.key, finished)

    def _turn(self, settings: Settings, owner: str) -> Turn:
        key = secrets.token_hex(16)
        return self._archive.turn(key, settings.previous, settings.input, owner)

    def _wire(self, work: Work, key: str, finished: Finished) -> ResponseWire:
        context = self._context
        settings = settings_of(work)
        keeps = settings.is_stored is not False and self._archive.store.keeps_any
        fields: dict[str, Any] = {
            "id": f"resp_{key}",
            "object": "response",
            "created_at": int(context.wall_clock()),
            "model": work.common.model or context.config.served_model_names[0],
            "store": keeps,
            **settings.repeated,
        }
        return ResponseWire(
            key,
            fields,
            work,
            tokenizer=context.tokenizer,
            clock=context.wall_clock,
            finished=finished,
        )

    async def _in_background(self, work: Work, call: Call) -> None:
        """Begin a response that goes on when its reader leaves, and answer with what there is."""
        run = self._start(work, call)
        headers = ignored_fields_headers(work.common.unknown_fields)
        answer: Response = (
            LogResponse(
                run.id,
                run.log,
                0,
                **self._context.sse_options(call.scope, headers, call.guard),
            )
            if work.common.stream
            else Response(run.response, headers=headers, media_type="application/json")
        )
        if not work.common.stream:
            call.guard.release()
        await answer(call.scope, call.receive, call.send)

    def _start(self, work: Work, call: Call) -> BackgroundRun:
        context, archive = self._context, self._archive
        tenant = tenant_of(call.scope)
        turn = self._turn(settings_of(work), tenant.name)

        def finished(_response: bytes, output: bytes) -> None:
            turn.output = output

        wire = self._wire(work, turn.key, finished)
        with ExitStack() as cleanup:
            cleanup.enter_context(context.gate.enter())
            allowance = allowance_of(call.scope)
            streams = self._submit(work, tenant, wire.id, call.arrival_time, allowance)
            place = cleanup.pop_all()
        [stream] = streams
        delivery = Delivery(context.metrics, context.clock, call.arrival_time)
        context.request_log.admitted(
            wire.id, call.scope, [work.prompts[0].token_ids], work.params, is_streamed=False
        )

        def ended(run: BackgroundRun) -> None:
            reason = stream.finish_reason or FinishReason.ERROR
            delivery.end(reason if stream.has_ended else FinishReason.ABORT)
            context.request_log.ended(wire.id, streams, 1)
            context.metrics.tenants.ended(tenant.name, streams, 1)
            if allowance is not None:
                allowance.close()
            del archive.running[wire.id]
            stored = Stored(tenant.name, run.response, turn, tuple(run.log.events))
            archive.store.put(wire.id, stored)
            place.close()

        run = BackgroundRun(stream, wire, tenant.name, turn, ended)
        archive.running[wire.id] = run
        return run


class InputTokensEndpoint(ResponsesEndpoint):
    """``POST /v1/responses/input_tokens``: how long the prompt of a response would be."""

    async def _serve(self, scope: Scope, receive: Receive, send: Send, arrival_time: float) -> None:
        raw = await self._context.read_body(scope, receive)
        async with DisconnectGuard(receive) as guard:
            work = await self._read(raw, tenant_of(scope))
            guard.release()
            [prompt] = work.prompts
            content = {"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)}
            response = Response(
                orjson.dumps(content),
                headers=ignored_fields_headers(work.common.unknown_fields),
                media_type="application/json",
            )
            await response(scope, receive, send)
