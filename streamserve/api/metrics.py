"""Prometheus metrics, named as vLLM names them where the meaning is the same.

Latencies are stamped after the send to the socket has returned: they are what was delivered, not
what was generated. Recording one costs a bisection into a list of integers; Prometheus's own
objects are built when somebody scrapes. Event-loop thread only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from streamserve.api.tenant_metrics import FAMILIES, TenantMetrics
from streamserve.core.clock import Clock
from streamserve.core.histogram import Counts
from streamserve.core.pacing_stats import PacingStats
from streamserve.core.request import FinishReason
from streamserve.core.speculation import SpeculationStats
from streamserve.engine.async_engine import AsyncEngine

PREFIX = "streamserve:"

# fmt: off
TTFT_BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)
INTER_TOKEN_BOUNDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2,
    0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)
E2E_BOUNDS = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0,
)
# fmt: on
FINISHED_REASONS = ("stop", "length", "abort", "error")


def histogram_family(counts: Counts, name: str, documentation: str) -> HistogramMetricFamily:
    """The counts in Prometheus's form: cumulative."""
    buckets: list[tuple[str, float]] = []
    cumulative = 0
    for bound, count in zip((*map(str, counts.bounds), "+Inf"), counts.counts, strict=True):
        cumulative += count
        buckets.append((bound, float(cumulative)))
    return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=counts.total)


class Metrics:
    """What the API observes itself; the engine's own counters join at the scrape."""

    def __init__(self) -> None:
        self.time_to_first_token = Counts(TTFT_BOUNDS)
        self.inter_token_latency = Counts(INTER_TOKEN_BOUNDS)
        self.e2e_latency = Counts(E2E_BOUNDS)
        self.num_finished = dict.fromkeys(FINISHED_REASONS, 0)
        self.num_refused: dict[tuple[int, str], int] = {}
        self.num_connections_refused: dict[str, int] = {}
        self.num_stalled = 0  # readers that were given up
        self.num_resumed = 0  # readers that came back to a stream
        self.num_joined = 0  # retries that found the answer of the first
        self.tenants = TenantMetrics()

    def refused(self, status: int, code: str | None = None, tenant: str = "") -> None:
        """Count a request that was refused before it reached the engine's queue.

        ``code`` is one of our error codes, ``tenant`` one of the operator's names: never anything
        that a client has sent.
        """
        self.tenants.refused(tenant)
        reason = status, code or "none"
        self.num_refused[reason] = self.num_refused.get(reason, 0) + 1

    def reader_stalled(self) -> None:
        """Count a reader that was given up, as it took nothing for too long."""
        self.num_stalled += 1

    def refused_connection(self, code: str) -> None:
        """Count what was refused before it was a request, by a code of ours."""
        self.num_connections_refused[code] = self.num_connections_refused.get(code, 0) + 1


class Delivery:
    """Stamps one choice's frames as they leave, and its end, once.

    ``text_sent`` is called for every frame of every stream: it is kept to a clock read and a count.
    """

    __slots__ = ("_arrival", "_bounds", "_clock", "_counts", "_gaps", "_last", "_metrics")

    def __init__(self, metrics: Metrics, clock: Clock, arrival: float) -> None:
        self._metrics: Metrics | None = metrics
        self._gaps = metrics.inter_token_latency
        self._bounds = self._gaps.bounds
        self._counts = self._gaps.counts
        self._clock = clock
        self._arrival = arrival
        self._last: float | None = None

    def text_sent(self) -> None:
        """A frame with text is on the socket."""
        now = self._clock()
        last = self._last
        self._last = now
        if last is not None:
            gap = now - last  # ``Counts.observe``, without the call
            self._counts[bisect_left(self._bounds, gap)] += 1
            self._gaps.total += gap
        elif self._metrics is not None:
            self._metrics.time_to_first_token.observe(now - self._arrival)

    def end(self, reason: FinishReason) -> None:
        """The choice has ended; only the first call counts."""
        metrics = self._metrics
        if metrics is None:
            return
        self._metrics = None
        metrics.num_finished[reason.value] += 1
        metrics.e2e_latency.observe(self._clock() - self._arrival)


class MetricsCollector(Collector):
    """Turns ``Metrics`` and the engine's statistics into Prometheus's families at each scrape."""

    def __init__(
        self, metrics: Metrics, engine: AsyncEngine, model_name: str, *, shows_tenants: bool
    ) -> None:
        self._metrics = metrics
        self._engine = engine
        self._model = {"model_name": model_name}
        self._shows_tenants = shows_tenants

    def collect(self) -> Iterator[Metric]:
        if self._shows_tenants:
            yield from self._tenant_families()
        yield from self._engine_families()
        yield from self._api_families()
        yield from self._pacing_families(self._engine.stats().pacing)

    def _pacing_families(self, stats: PacingStats) -> Iterator[Metric]:
        yield self._histogram(
            "step_time_seconds", "What a step took on the device.", stats.step_time
        )
        yield self._histogram(
            "step_time_ratio",
            "What a step took, as a share of what was predicted.",
            stats.step_time_ratio,
        )
        yield self._histogram(
            "prefill_chunk_tokens", "Prompt tokens of a step that had any.", stats.chunk_tokens
        )
        yield self._gauge(
            "inter_token_target_seconds",
            "The inter-token target of the last step with prompts beside answers.",
            stats.itl_target_s,
        )
        yield self._gauge(
            "step_time_error_p95", "The share of it that is kept for errors.", stats.error
        )

    def _engine_families(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges: tuple[tuple[str, str, float], ...] = (
            ("num_requests_running", "Requests in the running batch.", stats.num_running),
            ("num_requests_waiting", "Requests that wait to be scheduled.", stats.num_waiting),
            (
                "num_tokens_waiting",
                "Tokens of these that are to be computed.",
                stats.num_waiting_tokens,
            ),
            ("num_requests_paused", "Requests whose readers take nothing.", stats.num_paused),
            ("kv_cache_usage_perc", "Share of KV blocks in use; 1 is all.", stats.kv_usage),
            (
                "kv_host_usage_perc",
                "Share of the host's KV blocks that hold something; 1 is all.",
                stats.kv_host_usage,
            ),
            (
                "kept_states",
                "States of layers that are no attention, kept for whoever has their prefix.",
                stats.num_kept_states,
            ),
        )
        for name, documentation, value in gauges:
            yield self._gauge(name, documentation, value)
        counters: tuple[tuple[str, str, float], ...] = (
            ("prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_query_tokens,
            ),
            (
                "prefix_cache_hits",
                "Prompt tokens found in the prefix cache.",
                stats.prefix_hit_tokens,
            ),
            (
                "prefix_cache_host_hits",
                "Tokens whose KV was copied back from host memory to be found in the prefix cache.",
                stats.prefix_host_hit_tokens,
            ),
            (
                "kv_stored_tokens",
                "Tokens whose KV was copied to host memory.",
                stats.kv_stored_tokens,
            ),
            (
                "state_evictions",
                "Kept states whose memory was taken for others.",
                stats.num_state_evictions,
            ),
            (
                "cascade_kv_tokens_saved",
                "KV tokens that members of a step's prefix groups share and need not read again.",
                stats.kv_tokens_saved,
            ),
            *_speculation_counters(stats.speculation),
            ("num_preemptions", "Requests that gave their seat up.", stats.num_preemptions),
            (
                "request_pauses",
                "Times that a request left its seat as its reader took nothing.",
                stats.num_pauses,
            ),
            ("engine_steps", "Steps of the engine.", stats.num_steps),
            ("failed_steps", "Steps that raised and were rolled back.", stats.num_failed_steps),
            (
                "rolled_back_requests",
                "Times that a request was in a failed step and was computed again.",
                stats.num_rolled_back,
            ),
            (
                "kernel_compilations",
                "Kernels compiled by this process; none once the server is ready.",
                stats.num_compilations,
            ),
        )
        for name, documentation, value in counters:
            yield self._counter(name, documentation, [(self._model, value)])

    def _api_families(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield self._counter(
            "request_success",
            "Requests that ended, by reason.",
            [
                ({**self._model, "finished_reason": reason}, count)
                for reason, count in metrics.num_finished.items()
            ],
        )
        yield self._counter(
            "request_refused",
            "Requests refused before they were queued, by HTTP status and error code.",
            [
                ({**self._model, "status": str(status), "code": code}, count)
                for (status, code), count in sorted(metrics.num_refused.items())
            ],
        )
        yield self._counter(
            "connection_refused",
            "Connections that were refused before they were a request, by error code.",
            [
                ({**self._model, "code": code}, count)
                for code, count in sorted(metrics.num_connections_refused.items())
            ],
        )
        of_readers = (
            ("readers_stalled", "Readers that took nothing for too long.", metrics.num_stalled),
            ("streams_resumed", "Readers that came back to a stream.", metrics.num_resumed),
            (
                "retries_joined",
                "Requests that found the answer of an earlier one with the same key.",
                metrics.num_joined,
            ),
        )
        for name, documentation, value in of_readers:
            yield self._counter(name, documentation, [(self._model, value)])
        yield self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token's frame on the socket.",
            metrics.time_to_first_token,
        )
        yield self._histogram(
            "inter_token_latency_seconds",
            "Between two neighbouring token frames of a stream on the socket.",
            metrics.inter_token_latency,
        )
        yield self._histogram(
            "e2e_request_latency_seconds",
            "From a request's arrival to its last byte on the socket.",
            metrics.e2e_latency,
        )

    def _tenant_families(self) -> Iterator[Metric]:
        samples = self._metrics.tenants.samples()
        for index, (name, documentation) in enumerate(FAMILIES):
            values = [
                ({**self._model, "tenant": tenant}, numbers[index]) for tenant, numbers in samples
            ]
            yield self._counter(name, documentation, values)

    def _gauge(self, name: str, documentation: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(PREFIX + name, documentation, labels=list(self._model))
        family.add_metric(list(self._model.values()), value)
        return family

    def _counter(
        self,
        name: str,
        documentation: str,
        values: Sequence[tuple[Mapping[str, str], float]],
    ) -> CounterMetricFamily:
        labels = list(values[0][0]) if values else list(self._model)
        family = CounterMetricFamily(PREFIX + name, documentation, labels=labels)
        for label_values, value in values:
            family.add_metric(list(label_values.values()), value)
        return family

    def _histogram(self, name: str, documentation: str, counts: Counts) -> Metric:
        family = histogram_family(counts, PREFIX + name, documentation)
        for i, sample in enumerate(family.samples):
            family.samples[i] = sample._replace(labels={**self._model, **sample.labels})
        return family


def _speculation_counters(stats: SpeculationStats) -> tuple[tuple[str, str, float], ...]:
    return (
        ("spec_decode_num_drafts", "Drafts of a request in a step.", stats.num_drafts),
        ("spec_decode_num_draft_tokens", "Tokens that were drafted.", stats.num_draft_tokens),
        (
            "spec_decode_num_accepted_tokens",
            "Drafted tokens that were what the model would have sampled.",
            stats.num_accepted_tokens,
        ),
        (
            "forced_tokens",
            "Accepted drafts that a grammar left no choice about.",
            stats.num_forced_tokens,
        ),
    )


class MetricsRegistry:
    """A registry of our own: importing or embedding the server touches no global state."""

    def __init__(
        self, metrics: Metrics, engine: AsyncEngine, model_name: str, *, shows_tenants: bool
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        collector = MetricsCollector(metrics, engine, model_name, shows_tenants=shows_tenants)
        self._registry.register(collector)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        text: bytes = generate_latest(self._registry)
        return text
