"""One request's telemetry: ids at its start, one span tree and one set of metrics at its end."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from nearfield.api.events import Timings
from nearfield.telemetry import names
from nearfield.telemetry.setup import Telemetry
from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()
_NO_CONTEXT = Context()


@dataclass(slots=True)
class RequestRecord:
    """What is known about a request; whoever learns something writes it here.

    Times are on `time.monotonic()`. `route` is the route's pattern, never the raw path.
    """

    method: str
    route: str
    request_id: str
    span: Span
    started_s: float
    operation: str = names.OTHER
    status: int = 0
    error: str | None = None
    first_token_s: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int = 0
    timings: Timings | None = None
    attributes: dict[str, str | int | float | bool] = field(default_factory=dict)
    finish_reasons: list[str] = field(default_factory=list)

    def count(self, input_tokens: int, output_tokens: int | None = None, cached: int = 0) -> None:
        """Add a part's tokens."""
        self.input_tokens = (self.input_tokens or 0) + input_tokens
        if output_tokens is not None:
            self.output_tokens = (self.output_tokens or 0) + output_tokens
        self.cached_tokens += cached

    @property
    def context(self) -> SpanContext:
        return self.span.get_span_context()

    @property
    def traceparent(self) -> str:
        """The W3C header for whoever comes after us: the caller, or an upstream."""
        context = self.context
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


class Recorder:
    """Begins and ends the records of one replica."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def begin(
        self, method: str, route: str, request_id: str, carrier: Mapping[str, str]
    ) -> RequestRecord:
        """Start a record; `carrier` may hold the caller's `traceparent` and `tracestate`."""
        parent = _PROPAGATOR.extract(carrier, _NO_CONTEXT) if carrier else _NO_CONTEXT
        tracer = self._telemetry.tracer
        span: Span
        if tracer is None:
            span = NonRecordingSpan(_child_of(get_current_span(parent).get_span_context()))
        else:
            span = tracer.start_span(f"{method} {route}", parent, kind=SpanKind.SERVER)
        return RequestRecord(method, route, request_id, span, time.monotonic())

    def end(self, record: RequestRecord) -> None:
        """Record the metrics and send the spans."""
        ended_s = time.monotonic()
        if record.operation != names.OTHER:
            self._measure(record, ended_s)
        if record.span.is_recording():
            self._trace(record, ended_s)

    def _measure(self, record: RequestRecord, ended_s: float) -> None:
        to = self._telemetry.instruments
        labels = {
            names.OPERATION: record.operation,
            names.PROVIDER: names.PROVIDER_NAME,
            names.REQUEST_MODEL: self._telemetry.model,
        }
        if record.error is not None:
            failed = {**labels, names.ERROR_TYPE: record.error}
            to.errors(1, failed)
            to.duration.record(ended_s - record.started_s, failed)
            return
        to.duration.record(ended_s - record.started_s, labels)
        if record.input_tokens is not None:
            to.tokens(record.input_tokens, {**labels, names.TOKEN_TYPE: names.INPUT})
        if record.output_tokens is not None:
            to.tokens(record.output_tokens, {**labels, names.TOKEN_TYPE: names.OUTPUT})
        if record.first_token_s is not None:
            to.first_token.record(record.first_token_s - record.started_s, labels)
            later_tokens = (record.output_tokens or 0) - 1
            if later_tokens > 0:
                mean_s = (ended_s - record.first_token_s) / later_tokens
                to.output_token.record(mean_s, labels)
        if record.timings is not None:
            computed_s = record.timings.started_s + record.timings.queue_s
            to.queue_time.record(max(0.0, computed_s - record.started_s), labels)
            to.batch_size.record(record.timings.batch_size, labels)

    def _trace(self, record: RequestRecord, ended_s: float) -> None:
        span = record.span
        span.set_attributes(
            {
                names.HTTP_METHOD: record.method,
                names.HTTP_ROUTE: record.route,
                names.HTTP_STATUS: record.status,
                names.REQUEST_ID: record.request_id,
                names.MODEL_VERSION: self._telemetry.version,
            }
        )
        if record.operation != names.OTHER:
            span.set_attributes(
                {
                    names.OPERATION: record.operation,
                    names.PROVIDER: names.PROVIDER_NAME,
                    names.REQUEST_MODEL: self._telemetry.model,
                    names.RESPONSE_MODEL: self._telemetry.model,
                    **record.attributes,
                }
            )
        if record.input_tokens is not None:
            span.set_attribute(names.INPUT_TOKENS, record.input_tokens)
            span.set_attribute(names.CACHED_TOKENS, record.cached_tokens)
        if record.output_tokens is not None:
            span.set_attribute(names.OUTPUT_TOKENS, record.output_tokens)
        if record.finish_reasons:
            span.set_attribute(names.FINISH_REASONS, record.finish_reasons)
        if record.error is not None:
            span.set_attribute(names.ERROR_TYPE, record.error)
            if record.status >= 500:
                span.set_status(Status(StatusCode.ERROR))
        clock_ns = time.time_ns() - time.monotonic_ns()
        if record.timings is not None:
            self._trace_engine(record, record.timings, clock_ns)
        span.end(clock_ns + int(ended_s * 1e9))

    def _trace_engine(self, record: RequestRecord, timings: Timings, clock_ns: int) -> None:
        """The engine's part of the tree, told by its own clock: it runs in another process."""
        tracer = self._telemetry.tracer
        assert tracer is not None
        parent = set_span_in_context(record.span, _NO_CONTEXT)
        computed_s = timings.started_s + timings.queue_s
        first_s = computed_s + timings.prefill_s
        generates = record.operation in (names.CHAT, names.TEXT_COMPLETION)
        parts = [
            (names.SPAN_QUEUE, min(record.started_s, computed_s), computed_s),
            (names.SPAN_PREFILL if generates else names.SPAN_COMPUTE, computed_s, first_s),
        ]
        if generates:
            parts.append((names.SPAN_DECODE, first_s, first_s + timings.decode_s))
        for name, start_s, end_s in parts:
            child = tracer.start_span(name, parent, start_time=clock_ns + int(start_s * 1e9))
            if name != names.SPAN_QUEUE:
                child.set_attribute(names.BATCH_SIZE, timings.batch_size)
            if name == names.SPAN_DECODE:
                child.set_attribute(names.STEPS, timings.steps)
            child.end(clock_ns + int(end_s * 1e9))


def _child_of(parent: SpanContext) -> SpanContext:
    """Ids for a request nobody traces here: they stand in its logs and in its answer."""
    return SpanContext(
        parent.trace_id if parent.is_valid else random.getrandbits(128) or 1,
        random.getrandbits(64) or 1,
        is_remote=False,
        trace_flags=parent.trace_flags if parent.is_valid else TraceFlags(0),
    )
