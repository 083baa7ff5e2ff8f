"""OpenTelemetry for one replica: providers of its own, exporters by the standard environment.

    OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_{TRACES,METRICS}_ENDPOINT   where to send
    OTEL_{TRACES,METRICS}_EXPORTER=none, OTEL_SDK_DISABLED=true                 what not to send
    OTEL_TRACES_SAMPLER, OTEL_TRACES_SAMPLER_ARG                                how many traces
    OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES                                 who we are

Prometheus text is always there to be scraped. The global providers are left alone: Ray has its
own telemetry in the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from nearfield.telemetry import names
from nearfield.telemetry.export import exports
from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class Moment:
    """A replica as it is now. Waiting is in front of the engine or inside it; `kv` is 0..1."""

    running: int = 0
    waiting: int = 0
    queue_age_s: float = 0.0
    batch_size: int = 0
    kv_usage: float = 0.0
    steps: int = 0
    tokens: int = 0
    crashes: int = 0


@dataclass(frozen=True, slots=True)
class Instruments:
    """What is recorded once a request, when it ends."""

    duration: Histogram
    first_token: Histogram
    output_token: Histogram
    queue_time: Histogram
    batch_size: Histogram
    tokens: Callable[[int, Mapping[str, str]], None]
    errors: Callable[[int, Mapping[str, str]], None]


class Telemetry:
    """One replica's tracer, instruments and Prometheus page. `close` sends what is left."""

    def __init__(
        self,
        *,
        model: str,
        version: str,
        moment: Callable[[], Moment],
        environ: Mapping[str, str],
        instance: str | None = None,
    ) -> None:
        """
        Args:
            moment: reads the replica's state; called from whichever thread collects.
            environ: where the OTEL_* variables are looked up. The SDK's own (sampler, batch
                sizes, headers) it reads from the process's environment itself.
            instance: `service.instance.id`, to tell replicas apart.
        """
        self.model = model
        self.version = version
        attributes: dict[str, str] = {names.MODEL: model, names.MODEL_VERSION: version}
        if "OTEL_SERVICE_NAME" not in environ:
            attributes["service.name"] = "nearfield"
        if instance is not None:
            attributes["service.instance.id"] = instance
        # What the environment says of us comes last: it is the operator's word.
        resource = Resource.create(attributes)
        self._registry = CollectorRegistry()
        self._registry.register(_GatewayNames(model, moment))
        readers: list[MetricReader] = [_prometheus_reader(self._registry)]
        if exports("METRICS", environ):
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

            readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
        self._meters = MeterProvider(readers, resource=resource, shutdown_on_exit=False)
        meter = self._meters.get_meter(names.SCOPE)
        self.instruments = _instruments(meter)
        _observe(meter, moment, {names.REQUEST_MODEL: model})
        self._traces: TracerProvider | None = None
        self.tracer: Tracer | None = None
        if exports("TRACES", environ):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            self._traces = TracerProvider(resource=resource, shutdown_on_exit=False)
            self._traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
            self.tracer = self._traces.get_tracer(names.SCOPE)

    def prometheus_page(self) -> bytes:
        """All metrics as Prometheus text."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Send what is left and stop. Blocks for as long as the exporters' timeouts allow."""
        if self._traces is not None:
            self._traces.shutdown()
        self._meters.shutdown()


def _prometheus_reader(registry: CollectorRegistry) -> MetricReader:
    from opentelemetry.exporter.prometheus import PrometheusMetricReader

    return PrometheusMetricReader(registry=registry, scope_info_enabled=False)


def _instruments(meter: Meter) -> Instruments:
    def seconds(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return meter.create_histogram(
            name, unit="s", description=text, explicit_bucket_boundaries_advisory=buckets
        )

    tokens = meter.create_counter(names.TOKENS, description="Tokens in prompts and in answers.")
    errors = meter.create_counter(names.ERRORS, description="Requests that failed, by error.type.")
    return Instruments(
        duration=seconds(
            names.REQUEST_DURATION,
            "From a request's arrival to its last byte.",
            names.DURATION_BUCKETS_S,
        ),
        first_token=seconds(
            names.TIME_TO_FIRST_TOKEN,
            "From a request's arrival to its first token.",
            names.DURATION_BUCKETS_S,
        ),
        output_token=seconds(
            names.TIME_PER_OUTPUT_TOKEN,
            "Mean time between a request's tokens after the first.",
            names.TOKEN_BUCKETS_S,
        ),
        queue_time=seconds(
            names.QUEUE_TIME,
            "From a request's arrival to its first computation.",
            names.DURATION_BUCKETS_S,
        ),
        batch_size=meter.create_histogram(
            names.BATCH_SIZES,
            description="The most requests a request shared a step with.",
            explicit_bucket_boundaries_advisory=names.BATCH_BUCKETS,
        ),
        tokens=tokens.add,
        errors=errors.add,
    )


def _observe(meter: Meter, moment: Callable[[], Moment], labels: Mapping[str, str]) -> None:
    def reading(
        field: Callable[[Moment], float],
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda _: [Observation(field(moment()), labels)]

    gauges: list[tuple[str, str, str, Callable[[Moment], float]]] = [
        (names.RUNNING, "", "Requests inside the engine.", lambda m: m.running),
        (names.WAITING, "", "Requests waiting for the engine.", lambda m: m.waiting),
        (names.QUEUE_AGE, "s", "Age of the oldest waiting request.", lambda m: m.queue_age_s),
        (names.ENGINE_BATCH, "", "Sequences in the engine's last step.", lambda m: m.batch_size),
        (names.KV_USAGE, "1", "Share of the KV cache in use.", lambda m: m.kv_usage),
    ]
    for name, unit, text, field in gauges:
        meter.create_observable_gauge(name, [reading(field)], unit=unit, description=text)
    counters: list[tuple[str, str, Callable[[Moment], float]]] = [
        (names.ENGINE_STEPS, "Steps of the running engine.", lambda m: m.steps),
        (names.ENGINE_TOKENS, "Tokens made by the running engine.", lambda m: m.tokens),
        (names.ENGINE_CRASHES, "Ends of the engine's process.", lambda m: m.crashes),
    ]
    for name, text, field in counters:
        meter.create_observable_counter(name, [reading(field)], description=text)


class _GatewayNames(Collector):
    """The three gauges inference gateways look for, under the names they look for."""

    def __init__(self, model: str, moment: Callable[[], Moment]) -> None:
        self._model = model
        self._moment = moment

    def collect(self) -> Iterator[GaugeMetricFamily]:
        now = self._moment()
        for name, text, value in (
            (names.VLLM_RUNNING, "Requests inside the engine.", now.running),
            (names.VLLM_WAITING, "Requests waiting for the engine.", now.waiting),
            (names.VLLM_KV_USAGE, "Share of the KV cache in use, 0..1.", now.kv_usage),
        ):
            family = GaugeMetricFamily(name, text, labels=[names.VLLM_MODEL_LABEL])
            family.add_metric([self._model], value)
            yield family
