"""OpenTelemetry traces: a span for each request, and in it its queue, its prefill and its decoding.

They are made when a request has ended, from the times that were stamped in any case: a stream pays
nothing while it runs. A request with a ``traceparent`` continues the trace of who called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from streamserve.core.clock import Clock
from streamserve.engine.stream import RequestStream
from streamserve.errors import ConfigError

if TYPE_CHECKING:
    # An extra: only a server that was told where to send traces imports it.
    from opentelemetry.sdk.trace import TracerProvider

_MAX_LIVE = 10_000  # requests whose parents are remembered
_LAST_SPANS_S = 1.5


class RequestTraces:
    """Sends spans to ``provider``. ``wall_clock`` is the time of day, ``clock`` that of stamps."""

    def __init__(
        self, provider: TracerProvider, clock: Clock, wall_clock: Callable[[], float]
    ) -> None:
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("streamserve")
        self._propagator = TraceContextTextMapPropagator()
        self._in_context = set_span_in_context
        self._provider = provider
        self._clock = clock
        self._wall_clock = wall_clock
        self._parents: dict[str, Any] = {}

    def admitted(self, request_id: str, scope: Scope) -> None:
        """Remember who called."""
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        if carrier and len(self._parents) < _MAX_LIVE:
            self._parents[request_id] = self._propagator.extract(carrier)

    def ended(self, request_id: str, reason: str, streams: Sequence[RequestStream]) -> None:
        """Make the spans of a request that is over."""
        parent = self._parents.pop(request_id, None)
        now = self._clock()
        offset = self._wall_clock() - now
        times = streams[0].timings

        def nanoseconds(at: float) -> int:
            return round((at + offset) * 1e9)

        usages = [stream.usage for stream in streams if stream.usage is not None]
        attributes: dict[str, Any] = {
            "gen_ai.request.id": request_id,
            "gen_ai.response.finish_reasons": reason.split("/"),
            "gen_ai.usage.input_tokens": streams[0].num_prompt_tokens,
            "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in usages),
        }
        end = now if times.finished is None else times.finished
        span = self._tracer.start_span(
            "request",
            context=parent,
            attributes=attributes,
            start_time=nanoseconds(times.arrival),
        )
        marks = [times.arrival, times.first_scheduled, times.first_token, end]

        inside = self._in_context(span)
        for name, begin, finish in zip(
            ("queue", "prefill", "decode"), marks[:-1], marks[1:], strict=True
        ):
            if begin is None:
                break
            part = self._tracer.start_span(name, context=inside, start_time=nanoseconds(begin))
            part.end(nanoseconds(end if finish is None else finish))
        span.end(nanoseconds(end))

    def close(self) -> None:
        """Send what is left, unless the collector takes longer than a server's end may wait."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_LAST_SPANS_S)


def traces_to(endpoint: str, clock: Clock, wall_clock: Callable[[], float]) -> RequestTraces:
    """Traces that go to an OTLP collector over HTTP, in batches and on a thread.

    Raises ``ConfigError`` if the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            "--otlp-traces-endpoint needs OpenTelemetry: pip install opentelemetry-sdk "
            "opentelemetry-exporter-otlp-proto-http"
        ) from error
    provider = TracerProvider(
        resource=Resource.create({"service.name": "streamserve"}),
        shutdown_on_exit=False,  # `close` does it, and waits no longer than it should
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return RequestTraces(provider, clock, wall_clock)
