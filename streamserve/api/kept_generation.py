"""Requests whose answers outlive their connection: begun, joined by a retry, or gone on with."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import Receive, Scope, Send

from streamserve.api.admitted import Admitted, Call, Maker
from streamserve.api.body import ignored_fields_headers
from streamserve.api.context import ApiContext
from streamserve.api.disconnect import ClientGoneError, DisconnectGuard
from streamserve.api.errors import HttpError
from streamserve.api.kept import KeptAnswer, KeptAnswers, KeptOrigin, WholeAnswer
from streamserve.api.openai_wire import OpenAIWire
from streamserve.api.prompts import Endpoint, Prepared
from streamserve.api.resumable import ReplayStream, ResumableAnswer
from streamserve.api.resumption import Resumption, read_resumption, resumption_of
from streamserve.api.tenants import tenant_of

_FROM_THE_START = -1


async def answer_kept(endpoint: Maker, raw: bytes, call: Call, wish: Resumption) -> None:
    """Send the answer that the request's headers name, or one that is made now and kept."""
    kept = endpoint.context.kept
    origin = wish.origin(call.scope, endpoint.endpoint, raw)
    answer: KeptAnswer | None
    if wish.at is not None:
        answer = kept.of_id(wish.at[0], origin.owner)
        answer.origin.check_same(origin)
    else:
        answer = kept.of_key(origin)
    is_first = False
    unknown_fields: Sequence[str] = ()
    if answer is None:
        endpoint.context.gate.check_open()  # it was there when the request came
        prepared = await endpoint.prepare(raw, tenant_of(call.scope))
        wish.check(prepared, endpoint.endpoint)
        unknown_fields = prepared.common.unknown_fields
        answer = kept.of_key(origin)  # another may have come meanwhile
        if answer is None:
            is_first = True
            answer = _begin(endpoint, prepared, call, origin)
    if isinstance(answer, ResumableAnswer):
        headers = ignored_fields_headers(unknown_fields)
        stream = _reader_of(
            answer, wish, endpoint.context, call.scope, call.guard, headers, is_first=is_first
        )
        await stream(call.scope, call.receive, call.send)
    elif isinstance(answer, WholeAnswer):
        if not is_first:
            endpoint.context.metrics.num_joined += 1
        with answer.read():
            content = await answer.content()
        await call.send_json(content, unknown_fields)
        answer.delivered()


def _begin(endpoint: Maker, prepared: Prepared, call: Call, origin: KeptOrigin) -> KeptAnswer:
    """Have an answer made that is kept."""
    context = endpoint.context
    limits = context.config.streams
    if not prepared.common.stream:
        admitted = endpoint.admit(prepared, call)
        whole = WholeAnswer(admitted.wire.id, origin, limits.resume_timeout_s, context.kept)
        context.kept.add(whole)
        whole.start(whole.run(lambda: _make_whole(endpoint, admitted, call)))
        return whole
    wire = endpoint.wire(prepared, origin.owner)
    assert isinstance(wire, OpenAIWire)
    admitted = endpoint.admit(prepared, call, wire)
    [stream], [delivery], [parser] = admitted.streams, admitted.deliveries, admitted.parsers
    stream.max_unread_bytes = limits.max_unread_bytes
    answer = ResumableAnswer(
        wire,
        origin,
        limits.resume_timeout_s,
        context.kept,
        frames=wire.frames(0, prepared.prompts[0], None),
        stream=stream,
        parser=parser,
        delivery=delivery,
        max_bytes=limits.max_replay_bytes,
    )
    context.kept.add(answer)
    answer.start(_make_stream(endpoint, answer, admitted, call))
    return answer


async def _make_stream(
    endpoint: Maker, answer: ResumableAnswer, admitted: Admitted, call: Call
) -> None:
    with endpoint.making(admitted, call):
        await answer.run()


async def _make_whole(endpoint: Maker, admitted: Admitted, call: Call) -> bytes:
    with endpoint.making(admitted, call):
        content, choices = await endpoint.collect(admitted)
        for choice, delivery in zip(choices, admitted.deliveries, strict=True):
            delivery.end(choice.finish_reason)
        return content


def _reader_of(
    answer: ResumableAnswer,
    wish: Resumption,
    context: ApiContext,
    scope: Scope,
    guard: DisconnectGuard,
    headers: dict[str, str],
    *,
    is_first: bool = False,
) -> ReplayStream:
    metrics = context.metrics
    stream = ReplayStream(
        answer,
        _FROM_THE_START if wish.at is None else wish.at[1],
        has_ids=wish.wants_ids or wish.at is not None,
        is_first=is_first,
        **context.sse_options(scope, headers, guard),
    )
    if wish.at is None and wish.idempotency_key is not None:
        metrics.num_joined += not is_first
    else:
        metrics.num_resumed += not is_first
    return stream


def comes_back(scope: Scope, endpoint: Endpoint, kept: KeptAnswers) -> bool:
    """Whether a request goes on with an answer that is kept: nothing new is made for it."""
    wish = resumption_of(scope, endpoint)
    if wish is None:
        return False
    return kept.has(wish.at and wish.at[0], wish.idempotency_key, tenant_of(scope).name)


class StreamEndpoint:
    """``GET /v1/streams/{id}``: a stream that can be resumed, from ``Last-Event-ID`` or whole."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream_id: str = scope["path_params"]["id"]
        wish = read_resumption(scope) or Resumption()
        if wish.at is not None and wish.at[0] != stream_id:
            raise HttpError(
                400,
                f"Last-Event-ID must be one of the stream {stream_id[:128]!r}",
                param="Last-Event-ID",
                code="invalid_value",
            )
        answer = self._context.kept.of_id(stream_id, tenant_of(scope).name)
        if not isinstance(answer, ResumableAnswer):
            raise HttpError(404, "That answer is not streamed", code="stream_not_found")
        wish = Resumption(wants_ids=True, at=wish.at)
        try:
            with self._context.gate.enter(goes_on=True):
                async with DisconnectGuard(receive) as guard:
                    stream = _reader_of(answer, wish, self._context, scope, guard, {})
                    await stream(scope, receive, send)
        except ClientGoneError:
            return
