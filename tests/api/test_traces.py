"""Spans of a request, where somebody wants them."""

import gzip
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.api.harness import Api, chat_body

trace_sdk = pytest.importorskip("opentelemetry.sdk.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
in_memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

from streamserve.api import traces as api_traces  # noqa: E402  after the skip
from streamserve.api.traces import RequestTraces, traces_to  # noqa: E402  after the skip
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


class Collector(HTTPServer):
    """Takes what is sent to it over OTLP."""

    def __init__(self):
        self.received = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers["content-encoding"] == "gzip":
                    body = gzip.decompress(body)
                received.append((self.path, self.headers["content-type"], body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)


def test_a_collector_that_takes_nothing_does_not_hold_the_end_up(monkeypatch):
    monkeypatch.setattr(api_traces, "_LAST_SPANS_S", 0.05)
    answered, is_over = threading.Event(), threading.Event()

    class Provider(trace_sdk.TracerProvider):
        def shutdown(self):
            answered.wait(60)
            is_over.set()

    provider = Provider(shutdown_on_exit=False)
    RequestTraces(provider, monotonic, lambda: 1e9).close()
    assert not is_over.is_set()
    answered.set()
    assert is_over.wait(60)


async def test_a_collector_receives_the_spans_over_otlp():
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        traces = traces_to(endpoint, monotonic, lambda: 1e9)
        api = Api()
        api.app.context.request_log.traces = traces
        async with api.running():
            for header in (f"00-{TRACE}-b7ad6b7169203331-01", "\xff", "00-zz-1-1"):
                answer = await api.call(
                    "POST",
                    "/v1/chat/completions",
                    chat_body(max_tokens=5),
                    headers={"traceparent": header, "tracestate": "a=b,=,\xff"},
                )
                assert answer.status == 200
        traces.close()
        collector.shutdown()
        thread.join()
    assert {request[:2] for request in collector.received} == {
        ("/v1/traces", "application/x-protobuf")
    }
    spans = []
    for _, _, body in collector.received:
        for resource in service.ExportTraceServiceRequest.FromString(body).resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert attributes["service.name"] == "streamserve"
            spans += [span for scope in resource.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == ["queue", "prefill", "decode", "request"] * 3
    assert [span.trace_id.hex() == TRACE for span in spans] == [True] * 4 + [False] * 8
    numbers = {a.key: a.value.int_value for a in spans[3].attributes}
    assert numbers["gen_ai.usage.output_tokens"] == 5
    assert 0 < spans[3].start_time_unix_nano < spans[3].end_time_unix_nano < 1.1e18
