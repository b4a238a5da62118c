"""``POST /v1/chat/completions`` and ``/v1/completions``: one request, from its bytes to its answer.

Each endpoint is an ASGI application, so that one function sees the whole of a request's life: what
it takes (a place, the engine's streams) it gives back there, whatever happens.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from starlette.types import Receive, Scope, Send

from streamserve.api.admitted import Admitted, Call
from streamserve.api.body import ignored_fields_headers
from streamserve.api.context import ApiContext
from streamserve.api.disconnect import ClientGoneError, DisconnectGuard
from streamserve.api.extras import Prompt
from streamserve.api.fields import unsupported
from streamserve.api.frames import CHAT, COMPLETION, PING, Envelope, Kind
from streamserve.api.kept_generation import answer_kept, comes_back
from streamserve.api.metrics import Delivery
from streamserve.api.openai_wire import OpenAIWire
from streamserve.api.prompt_workers import LONG_BODY
from streamserve.api.prompts import PROMPT_FIELDS, Endpoint, Prepared
from streamserve.api.rate_limits import allowance_of
from streamserve.api.resumption import resumption_of
from streamserve.api.running import RunningAnswer
from streamserve.api.sampling import Common, name_length
from streamserve.api.sse import AnswerStream, StreamedChoice
from streamserve.api.tenants import Tenant, tenant_of
from streamserve.api.timing import TimedDelivery
from streamserve.api.whole import Choice, best_choices, collect_all
from streamserve.api.wire import Wire
from streamserve.core.request import FinishReason
from streamserve.engine.intake import Origin
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.stream import RequestStream
from streamserve.errors import (
    ContextLengthError,
    EngineError,
    RequestCancelledError,
    RequestError,
)


class GenerationEndpoint:
    """What all endpoints share that hand prompts to the engine, in the order of a request's life:
    read the body, prepare, admit, stream or collect.
    """

    endpoint: Endpoint
    kind: Kind
    ping = PING  # keeps a silent stream open

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    @property
    def context(self) -> ApiContext:
        """What all endpoints share."""
        return self._context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = self._context
        arrival_time = context.clock()
        gate, kept = context.gate, context.kept
        try:
            goes_on = not gate.is_open and comes_back(scope, self.endpoint, kept)
            with gate.enter(goes_on=goes_on):
                allowance = allowance_of(scope)
                if allowance is not None:
                    allowance.take_request()
                await self._serve(scope, receive, send, arrival_time)
        except ClientGoneError:
            return
        except RequestError as exc:
            context.metrics.refused(exc.status, exc.code, tenant_of(scope).name)
            raise

    async def _serve(self, scope: Scope, receive: Receive, send: Send, arrival_time: float) -> None:
        raw = await self._context.read_body(scope, receive)
        wish = resumption_of(scope, self.endpoint)
        async with DisconnectGuard(receive) as guard:
            call = Call(scope, receive, send, arrival_time, guard)
            if wish is not None:
                await answer_kept(self, raw, call, wish)
                return
            prepared = await self.prepare(raw, tenant_of(scope))
            del raw
            await self._answer(prepared, call)

    async def prepare(self, raw: bytes, tenant: Tenant) -> Prepared:
        """Parse, render, tokenise, and compile what the engine needs.

        Raises ``RequestError``, ``EngineError``.
        """
        prepared = await self._settled(await self._read(raw, tenant))
        grammar = prepared.params.structured_output
        if grammar is None:
            return prepared
        own = replace(grammar, salt=tenant.salt)  # compiled for its tenant only
        prepared = replace(prepared, params=replace(prepared.params, structured_output=own))
        await self._context.engine.prepare(prepared.params)
        return prepared

    async def _read(self, raw: bytes, tenant: Tenant, references: bytes = b"") -> Prepared:
        """Parse, render and tokenise, apart from what other tenants send.

        ``references`` as in ``PromptReader``.
        """
        prompts, workers = self._context.prompts, self._context.prompt_workers
        if workers is None or len(raw) + len(references) <= LONG_BODY:
            request = prompts.parse(self.endpoint, raw, references)
            if workers is None or not prompts.may_run_away(request):
                self._check_common(request.common)
                return await prompts.prepare(request, tenant.salt)
        prepared = await workers.read(self.endpoint, raw, tenant.salt, references)
        self._check_common(prepared.common)
        return prepared

    def _check_common(self, common: Common) -> None:
        """Check what only the server's config can say."""
        config = self._context.config
        self._context.models.adapter_of(common.model)
        if common.priority and not config.honours_priority:
            raise unsupported(
                "priority", f"must be 0 unless requests are scheduled by it, got {common.priority}"
            )
        self._context.check_unknown(common.unknown_fields)

    async def _settled(self, prepared: Prepared) -> Prepared:
        """With prompts as long as they are to be, and bad words as token ids."""
        truncation = prepared.fields.truncation
        if truncation.num_tokens is None and not prepared.params.bad_words:
            return prepared
        context, params = self._context, prepared.params
        prompts: list[Prompt] = []
        num_answer_tokens = 0 if params.ends_with_prompt else params.max_tokens or 1
        for prompt in prepared.prompts:
            ids = truncation.cut(prompt.token_ids, context.max_model_len, num_answer_tokens)
            is_cut = len(ids) < len(prompt.token_ids)
            echo = context.tokenizer.decode(ids) if is_cut and prompt.echo else prompt.echo
            prompts.append(replace(prompt, token_ids=ids, echo=echo))
        params = await context.preprocessor.bad_words(params)
        return replace(prepared, params=params, prompts=prompts)

    async def _answer(self, prepared: Prepared, call: Call) -> None:
        """Have the answer made and send it."""
        admitted = self.admit(prepared, call)
        with self.making(admitted, call):
            if prepared.common.stream:
                stream = self._answer_stream(admitted, call)
                await stream(call.scope, call.receive, call.send)
            else:
                await self._send_whole(admitted, call)

    def admit(self, prepared: Prepared, call: Call, wire: Wire | None = None) -> Admitted:
        """Hand the request to the engine; ``making`` must follow at once."""
        context = self._context
        wire = wire or self.wire(prepared, tenant_of(call.scope).name)
        delivery_type = TimedDelivery if prepared.common.include_timing else Delivery
        deliveries = [
            delivery_type(context.metrics, context.clock, call.arrival_time)
            for _ in prepared.prompts_of_streams
        ]
        streams = self._submit(prepared, call, wire.id)
        context.request_log.admitted(
            wire.id,
            call.scope,
            [prompt.token_ids for prompt in prepared.prompts],
            prepared.params,
            is_streamed=prepared.common.stream,
        )
        return Admitted(prepared, wire, streams, deliveries, self._parsers(prepared))

    def _submit(self, prepared: Prepared, call: Call, request_id: str) -> list[RequestStream]:
        """Hand all prompts to the engine, or none."""
        streams: list[RequestStream] = []
        prepared.choices.check_size(len(prepared.prompts))
        allowance = allowance_of(call.scope)
        if allowance is not None:
            allowance.take_tokens([len(prompt.token_ids) for prompt in prepared.prompts])
        try:
            for index, prompt in enumerate(prepared.prompts):
                of_prompt = prepared.choices.submit(
                    self._context.engine,
                    prompt.token_ids,
                    prepared.params,
                    **self._origin(prepared, index, call, request_id),
                )
                streams += of_prompt
                if allowance is not None:  # the first computes the prompt
                    of_prompt[0].on_scheduled = partial(allowance.settle, index)
        except BaseException as exc:
            for stream in streams:
                stream.close()
            if allowance is not None:
                allowance.close()
            if isinstance(exc, EngineError):
                self._context.metrics.refused(exc.status, exc.code)
            if isinstance(exc, ContextLengthError) and exc.param == "messages":
                exc.param = PROMPT_FIELDS[self.endpoint]
            if isinstance(exc, RequestError):
                name_length(exc, prepared.common.length_field)
            raise
        return streams

    def _origin(self, prepared: Prepared, index: int, call: Call, request_id: str) -> Origin:
        """Who asks for what is made of a request's prompt."""
        common, tenant = prepared.common, tenant_of(call.scope)
        adapter = self._context.models.adapter_of(common.model)
        has_priority = self._context.config.honours_priority
        return {
            "request_id": f"{request_id}-{index}" if index else request_id,
            "priority": tenant.priority_of(common.priority) if has_priority else 0,
            "cache_salt": (adapter.salt if adapter else "") + tenant.salt + common.cache_salt,
            "shares_public_prefixes": bool(tenant.salt)
            and not common.cache_salt
            and adapter is None,
            "adapter": None if adapter is None else adapter.slot,
            "tenant": tenant.name or common.user,
            "weight": tenant.weight,
            "time_limits": common.time_limits,
            "arrival_time": call.arrival_time,
            "is_tokenized": prepared.prompts[index].is_tokenized,
        }

    def _parsers(self, prepared: Prepared) -> list[AnswerParser | None]:
        """One for each stream of the engine's, or none."""
        parsing, token_bytes = prepared.parsing, self._context.tokenizer.token_bytes
        prompts = prepared.prompts_of_streams
        return [None if parsing is None else parsing.new(token_bytes) for _ in prompts]

    @contextmanager
    def making(self, admitted: Admitted, call: Call) -> Iterator[None]:
        """An admitted request's life: it is found while it lasts, and all is given back."""
        context, prepared, wire = self._context, admitted.prepared, admitted.wire
        streams, deliveries = admitted.streams, admitted.deliveries
        owner, allowance = tenant_of(call.scope).name, allowance_of(call.scope)
        n = prepared.choices.n
        running = RunningAnswer(wire.id, self.endpoint, owner, call.name, streams, n)
        try:
            with context.running.entry(running):
                yield
        except (ClientGoneError, RequestCancelledError):
            raise
        except Exception:
            for delivery in deliveries:
                delivery.end(FinishReason.ERROR)
            raise
        finally:
            for stream, delivery in zip(streams, deliveries, strict=True):
                stream.close()
                delivery.end(FinishReason.ABORT)  # unless it has ended already
            if allowance is not None:
                allowance.close()
            context.request_log.ended(wire.id, streams, len(prepared.prompts))
            context.metrics.tenants.ended(owner, streams, len(prepared.prompts))

    def wire(self, prepared: Prepared, owner: str) -> Wire:
        """How the answer looks. ``owner`` is the tenant that asked for it."""
        context = self._context
        envelope = Envelope(
            kind=self.kind,
            id=self.kind.id_prefix + secrets.token_hex(16),
            created=int(context.wall_clock()),
            model=prepared.common.model or context.config.served_model_names[0],
        )
        extras = prepared.fields.extras(prepared.params, context.tokenizer)
        return OpenAIWire(envelope, prepared.common.stream_options, extras, prepared.choices.n)

    def _answer_stream(self, admitted: Admitted, call: Call) -> AnswerStream:
        prepared, wire, streams = admitted.prepared, admitted.wire, admitted.streams
        choices = [
            StreamedChoice(stream, wire.frames(index, prompt, parser), delivery, parser)
            for index, (stream, delivery, prompt, parser) in enumerate(
                zip(
                    streams,
                    admitted.deliveries,
                    prepared.prompts_of_streams,
                    admitted.parsers,
                    strict=True,
                )
            )
        ]
        limits = self._context.config.streams
        for stream in streams:
            stream.max_unread_bytes = limits.max_unread_bytes // len(streams)
        has_progress = prepared.common.stream_options.include_progress
        return AnswerStream(
            wire,
            choices,
            progress_of=self._context.engine.progress if has_progress else None,
            ping=self.ping,
            **self._context.sse_options(
                call.scope, ignored_fields_headers(prepared.common.unknown_fields), call.guard
            ),
        )

    async def _send_whole(self, admitted: Admitted, call: Call) -> None:
        content, candidates = await self.collect(admitted)
        await call.send_json(content, admitted.prepared.common.unknown_fields)
        for choice, delivery in zip(candidates, admitted.deliveries, strict=True):
            delivery.end(choice.finish_reason)

    async def collect(self, admitted: Admitted) -> tuple[bytes, list[Choice]]:
        """Wait for an answer in one piece: its content, and all candidates."""
        prepared = admitted.prepared
        candidates = await collect_all(
            admitted.streams, prepared.prompts_of_streams, admitted.deliveries, admitted.parsers
        )
        choices = candidates
        if prepared.choices.are_compared:
            count, n = prepared.choices.num_candidates, prepared.choices.n
            choices = best_choices(candidates, count, n)
        return admitted.wire.whole(choices), candidates


class ChatEndpoint(GenerationEndpoint):
    """``POST /v1/chat/completions``."""

    endpoint = "chat"

    def __init__(self, context: ApiContext) -> None:
        super().__init__(context)
        self.kind = replace(CHAT, role=context.config.response_role)


class CompletionEndpoint(GenerationEndpoint):
    """``POST /v1/completions``."""

    endpoint = "completion"
    kind = COMPLETION
