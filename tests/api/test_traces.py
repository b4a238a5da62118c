"""Spans of a request, where somebody wants them."""

import pytest

from tests.api.harness import Api, chat_body

trace_sdk = pytest.importorskip("opentelemetry.sdk.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
in_memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

from streamserve.api.traces import RequestTraces  # noqa: E402  after the skip
from streamserve.core.clock import monotonic  # noqa: E402

TRACE = "0af7651916cd43dd8448eb211c80319c"


async def test_a_request_has_a_queue_a_prefill_and_a_decoding():
    exporter = in_memory.InMemorySpanExporter()
    provider = trace_sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    api = Api()
    api.app.context.request_log.traces = RequestTraces(provider, monotonic, lambda: 1e9)
    async with api.running():
        headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        body = chat_body(max_tokens=5, stream=True)
        await api.call("POST", "/v1/chat/completions", body, headers=headers)
        await api.chat(max_tokens=1)
    first, second = exporter.get_finished_spans()[:4], exporter.get_finished_spans()[4:]
    assert [span.name for span in first] == ["queue", "prefill", "decode", "request"]
    assert {span.context.trace_id for span in first} == {int(TRACE, 16)}
    assert second[0].context.trace_id != int(TRACE, 16)
    *parts, request = first
    assert request.attributes["gen_ai.usage.output_tokens"] == 5
    assert request.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert all(part.parent.span_id == request.context.span_id for part in parts)
    times = [request.start_time, *(part.end_time for part in parts)]
    assert times == sorted(times)
    assert times[-1] == request.end_time
    assert abs(request.end_time / 1e9 - 1e9) < 60
