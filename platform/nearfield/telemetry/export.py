"""A gateway's metrics and traces on their way out, by OpenTelemetry's standard environment.

What may be set is what `telemetry.setup` says. Without an endpoint there is nothing to send, and
the SDK is not even imported. Prometheus needs none of this.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nearfield.telemetry import names
from nearfield.telemetry.aggregate import Family, Metrics

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import Metric
    from opentelemetry.sdk.resources import Resource

log = logging.getLogger("nearfield.telemetry")

SERVICE = "nearfield-gateway"
INTERVAL_S = 60.0
"""As OpenTelemetry has it, where OTEL_METRIC_EXPORT_INTERVAL says nothing else."""


def exports(signal: str, environ: Mapping[str, str]) -> bool:
    """Whether the environment asks to send `TRACES` or `METRICS` somewhere."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environ.get(f"OTEL_{signal}_EXPORTER", "otlp").lower() == "none":
        return False
    return bool(
        environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        or environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    )


def sample_ratio(environ: Mapping[str, str]) -> float:
    """The share of new traces that is sampled; a caller's trace keeps its caller's decision.

    OTEL_TRACES_SAMPLER's standard values, with or without `parentbased_`; any other is everything,
    as the SDK has it.
    """
    if not exports("TRACES", environ):
        return 0.0
    sampler = environ.get("OTEL_TRACES_SAMPLER", "").lower().removeprefix("parentbased_")
    if sampler == "always_off":
        return 0.0
    if sampler == "traceidratio":
        try:
            return min(1.0, max(0.0, float(environ.get("OTEL_TRACES_SAMPLER_ARG", ""))))
        except ValueError:
            log.warning("OTEL_TRACES_SAMPLER_ARG is no number: every trace is sampled")
    return 1.0


def resource(name: str, environ: Mapping[str, str]) -> Resource:
    """Who we are; what the environment says of us comes last: it is the operator's word.

    Args:
        name: the gateway's.
    """
    from opentelemetry.sdk.resources import Resource

    attributes: dict[str, str] = {names.GATEWAY: name}
    if "OTEL_SERVICE_NAME" not in environ:
        attributes["service.name"] = SERVICE
    # Several processes are one gateway: without this their counters would be taken for one.
    attributes["service.instance.id"] = f"{name}-{random.getrandbits(48):012x}"
    return Resource.create(attributes)


# ---- metrics ------------------------------------------------------------------------------------


class MetricExport:
    """Sends metrics over OTLP when it is told to, from a thread of its own."""

    def __init__(self, about: Resource, environ: Mapping[str, str]) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

        self._resource = about
        self._exporter = OTLPMetricExporter()
        self._started_ns = time.time_ns()
        self._waiting: list[Metric] | None = None
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="nearfield-metrics", daemon=True)
        self._thread.start()
        self.interval_s = _interval_s(environ)

    def send(self, metrics: Metrics) -> None:
        """Send them as they are now. Called on the thread that they belong to; does not wait: if
        the last ones could not be sent yet, these take their place."""
        made = _otlp(metrics, self._started_ns, time.time_ns())
        with self._wake:
            self._waiting = made
            self._wake.notify()

    def close(self) -> None:
        """Send what waits, and stop. Blocks for as long as the exporter's timeout allows."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._exporter.shutdown()

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._waiting is None and not self._closing:
                    self._wake.wait()
                waiting, self._waiting = self._waiting, None
            if waiting is None:
                return
            self._export(waiting)

    def _export(self, metrics: Sequence[Metric]) -> None:
        from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        scope = ScopeMetrics(InstrumentationScope(names.SCOPE), metrics, "")
        try:
            self._exporter.export(MetricsData([ResourceMetrics(self._resource, [scope], "")]))
        except Exception:
            # Its own are logged by the exporter; a mistake must not end the sending.
            log.exception("metrics could not be sent")


def _interval_s(environ: Mapping[str, str]) -> float:
    text = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "")
    return int(text) / 1000 if text.isdigit() and int(text) else INTERVAL_S


def _otlp(metrics: Metrics, started_ns: int, now_ns: int) -> list[Metric]:
    """The metrics as the exporter takes them: cumulative since `started_ns`."""
    from opentelemetry.sdk.metrics.export import (
        AggregationTemporality,
        Gauge,
        Histogram,
        HistogramDataPoint,
        Metric,
        NumberDataPoint,
        Sum,
    )

    cumulative = AggregationTemporality.CUMULATIVE

    def point(about: Mapping[str, str], value: float) -> NumberDataPoint:
        return NumberDataPoint(about, started_ns, now_ns, value)

    def metric(family: Family, data: Any) -> Metric:
        return Metric(family.name, family.text, family.unit, data)

    made: list[Metric] = []
    for histogram in metrics.histograms:
        family = histogram.family
        spread = [
            HistogramDataPoint(
                dict(zip(family.labels, labels, strict=True)),
                started_ns,
                now_ns,
                sum(series.counts),
                series.total,
                tuple(series.counts),
                histogram.bounds,
                # Extremes since the start say nothing; in the protocol they may be left out.
                min=None,  # type: ignore[arg-type]
                max=None,  # type: ignore[arg-type]
            )
            for labels, series in histogram.series.items()
        ]
        if spread:
            made.append(metric(family, Histogram(spread, cumulative)))
    for counter in metrics.counters:
        family = counter.family
        counts = [
            point(dict(zip(family.labels, labels, strict=True)), value)
            for labels, value in counter.series.items()
        ]
        if counts:
            made.append(metric(family, Sum(counts, cumulative, is_monotonic=True)))
    for gauge in metrics.gauges:
        now = [point(about, value) for about, value in gauge.read()]
        if now:
            total = Sum(now, cumulative, is_monotonic=True)
            made.append(metric(gauge.family, total if gauge.grows else Gauge(now)))
    return made


# ---- traces -------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class SpanMade:
    """A span that is over, and the spans inside it. Times are Unix seconds, ids hexadecimal.

    Attributes:
        span_id, trace_id: of the outermost; those inside get their own.
        parent_id: empty where the trace begins here.
        error: whether it failed by somebody else's fault than the caller's.
    """

    name: str
    started_s: float
    ended_s: float
    attributes: dict[str, Any]
    error: bool = False
    inside: list[SpanMade] = field(default_factory=list)
    trace_id: str = ""
    span_id: str = ""
    parent_id: str = ""


class SpanExport:
    """Sends spans over OTLP that were noted while they happened, under ids given out before.

    The SDK makes spans with ids of its own, at their begin. Ours were told to the upstream by
    then, in `traceparent`; so the SDK's source of ids is told which come next. One thread at a
    time.
    """

    def __init__(self, about: Resource) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        self._ids, id_generator = _next_ids()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # what comes here was chosen before
            resource=about,
            shutdown_on_exit=False,
            id_generator=id_generator,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(names.SCOPE)

    def send(self, span: SpanMade) -> None:
        """Hand a span and those inside it to the exporter's own queue, which is bounded."""
        from opentelemetry.context import Context
        from opentelemetry.trace import (
            NonRecordingSpan,
            SpanContext,
            SpanKind,
            TraceFlags,
            set_span_in_context,
        )

        context = Context()
        if span.parent_id:
            caller = SpanContext(
                int(span.trace_id, 16),
                int(span.parent_id, 16),
                is_remote=True,
                trace_flags=TraceFlags(TraceFlags.SAMPLED),
            )
            context = set_span_in_context(NonRecordingSpan(caller), context)
        self._ids(int(span.trace_id, 16), int(span.span_id, 16))
        self._make(span, context, SpanKind.SERVER)

    def _make(self, span: SpanMade, context: Any, kind: Any) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        made = self._tracer.start_span(
            span.name,
            context,
            kind=kind,
            attributes=span.attributes,
            start_time=int(span.started_s * 1e9),
        )
        if span.error:
            made.set_status(Status(StatusCode.ERROR))
        if span.inside:
            within = set_span_in_context(made, context)
            for inner in span.inside:
                self._make(inner, within, SpanKind.CLIENT)
        made.end(int(span.ended_s * 1e9))

    def close(self) -> None:
        """Send what is left and stop. Blocks for as long as the exporter's timeout allows."""
        self._provider.shutdown()


def _next_ids() -> tuple[Callable[[int, int], None], Any]:
    """A source of ids for the SDK, and what tells it the next trace's and span's."""
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class NextIds(RandomIdGenerator):
        trace_id = span_id = 0

        def generate_trace_id(self) -> int:
            return self.trace_id or super().generate_trace_id()

        def generate_span_id(self) -> int:
            given, self.span_id = self.span_id, 0
            return given or super().generate_span_id()

    source = NextIds()

    def tell(trace_id: int, span_id: int) -> None:
        source.trace_id, source.span_id = trace_id, span_id

    return tell, source
