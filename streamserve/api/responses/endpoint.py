"""``POST /v1/responses``."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from streamserve.api.admitted import Call
from streamserve.api.body import ignored_fields_headers
from streamserve.api.context import ApiContext
from streamserve.api.disconnect import DisconnectGuard
from streamserve.api.generation import GenerationEndpoint
from streamserve.api.metrics import Delivery
from streamserve.api.prompts import Prepared
from streamserve.api.rate_limits import allowance_of
from streamserve.api.responses.archive import Archive
from streamserve.api.responses.background import BackgroundRun, LogResponse
from streamserve.api.responses.frames import Finished
from streamserve.api.responses.request import Settings
from streamserve.api.responses.store import Stored, Turn
from streamserve.api.responses.wire import ResponseWire
from streamserve.api.tenants import Tenant, tenant_of
from streamserve.core.request import FinishReason
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.errors import InvalidParameterError


def settings_of(prepared: Prepared) -> Settings:
    """What the request says about its response."""
    assert prepared.settings is not None
    return prepared.settings


class ResponsesEndpoint(GenerationEndpoint):
    """Create a response: streamed, whole, or in the background."""

    endpoint = "response"

    def __init__(self, context: ApiContext, archive: Archive) -> None:
        super().__init__(context)
        self._archive = archive

    async def _read(self, raw: bytes, tenant: Tenant, references: bytes = b"") -> Prepared:
        try:
            references = await self._archive.references_of(raw, tenant.name)
            return await super()._read(raw, tenant, references)
        except InvalidParameterError as exc:
            if exc.param == "messages":  # as a chat calls it
                exc.param = "input"
            raise

    async def _settled(self, prepared: Prepared) -> Prepared:
        settings = settings_of(prepared)
        if (settings.is_background or settings.is_stored) and not self._archive.store.keeps_any:
            name = "background" if settings.is_background else "store"
            raise InvalidParameterError(
                f"{name}: true is not supported: the server was started with"
                " --max-stored-responses 0",
                param=name,
                code="unsupported_parameter",
            )
        return await super()._settled(prepared)

    async def _answer(self, prepared: Prepared, call: Call) -> None:
        if settings_of(prepared).is_background:
            await self._in_background(prepared, call)
        else:
            await super()._answer(prepared, call)

    def _parsers(self, prepared: Prepared) -> list[AnswerParser | None]:
        return [None] * len(prepared.prompts)  # the wire has its own

    def wire(self, prepared: Prepared, owner: str) -> ResponseWire:
        """The response, which is kept when it has ended, unless that is not wanted."""
        archive = self._archive
        settings = settings_of(prepared)
        turn = self._turn(settings, owner)

        def finished(response: bytes, output: bytes) -> None:
            if settings.is_stored is not False:
                turn.output = output
                archive.store.put(f"resp_{turn.key}", Stored(owner, response, turn))

        return self._wire(prepared, turn.key, finished)

    def _turn(self, settings: Settings, owner: str) -> Turn:
        key = secrets.token_hex(16)
        return self._archive.turn(key, settings.previous, settings.input, owner)

    def _wire(self, prepared: Prepared, key: str, finished: Finished) -> ResponseWire:
        context = self._context
        settings = settings_of(prepared)
        keeps = settings.is_stored is not False and self._archive.store.keeps_any
        fields: dict[str, Any] = {
            "id": f"resp_{key}",
            "object": "response",
            "created_at": int(context.wall_clock()),
            "model": prepared.common.model or context.config.served_model_names[0],
            "store": keeps,
            **settings.repeated,
        }
        return ResponseWire(
            key,
            fields,
            prepared,
            tokenizer=context.tokenizer,
            clock=context.wall_clock,
            finished=finished,
        )

    async def _in_background(self, prepared: Prepared, call: Call) -> None:
        """Begin a response that goes on when its reader leaves, and answer with what there is."""
        run = self._start(prepared, call)
        if not prepared.common.stream:
            await call.send_json(run.response, prepared.common.unknown_fields)
            return
        headers = ignored_fields_headers(prepared.common.unknown_fields)
        options = self._context.sse_options(call.scope, headers, call.guard)
        await LogResponse(run.id, run.log, 0, **options)(call.scope, call.receive, call.send)

    def _start(self, prepared: Prepared, call: Call) -> BackgroundRun:
        context, archive = self._context, self._archive
        tenant = tenant_of(call.scope)
        turn = self._turn(settings_of(prepared), tenant.name)

        def finished(_response: bytes, output: bytes) -> None:
            turn.output = output

        wire = self._wire(prepared, turn.key, finished)
        with ExitStack() as cleanup:
            cleanup.enter_context(context.gate.enter())
            streams = self._submit(prepared, call, wire.id)
            place = cleanup.pop_all()
        [stream], allowance = streams, allowance_of(call.scope)
        delivery = Delivery(context.metrics, context.clock, call.arrival_time)
        context.request_log.admitted(
            wire.id, call.scope, [prepared.prompts[0].token_ids], prepared.params, is_streamed=False
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
            prepared = await self._read(raw, tenant_of(scope))
            [prompt] = prepared.prompts
            content = {"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)}
            call = Call(scope, receive, send, arrival_time, guard)
            await call.send_json(orjson.dumps(content), prepared.common.unknown_fields)
