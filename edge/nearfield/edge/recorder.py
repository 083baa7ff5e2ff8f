"""What became of every request: measured, traced, logged, and billed.

    done ──→ Entry ──→ Recent (at once)
               └─────→ every 64 entries, or 50 ms: metrics, log lines, usage records, spans

In a request's own way only its entry is made. The rest is done for many at a time; whatever may
wait (a pipe, a disk, a database, a collector) does so in a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Self

import msgspec
from nearfield.api.keys import Principal
from nearfield.core.errors import RateLimited
from nearfield.core.spec import NAME_PATTERN
from nearfield.edge.decisions import Admission, Routed
from nearfield.edge.proxy.ports import Attempt, Outcome, Request, Target
from nearfield.edge.recent import Entry, Recent, Tried
from nearfield.policy.endpoints import DEFAULT
from nearfield.store.ports import Ledger, Usage
from nearfield.store.usage_writer import UsageWriter
from nearfield.telemetry import names
from nearfield.telemetry.aggregate import Distribution, Metrics
from nearfield.telemetry.export import (
    MetricExport,
    SpanExport,
    SpanMade,
    exports,
    resource,
    sample_ratio,
)
from nearfield.telemetry.lines import LineWriter

log = logging.getLogger("nearfield.edge")

BATCH: Final = 64
"""Entries worked off at once: a quarter of a millisecond, which nobody notices."""
FLUSH_S: Final = 0.05
"""How long an entry waits for others. A process that is killed takes so much with it."""
CLOSE_S: Final = 5.0
"""How long the end waits for each of: the log's reader, the ledger, the collector."""
IDEMPOTENT_S: Final = 24 * 3600.0
"""How long an `Idempotency-Key` names the same request; see `_record_id`."""
STANDARD_ERROR: Final = 2

_OPERATIONS: Final[Mapping[bytes, str]] = {
    b"/v1/chat/completions": names.CHAT,
    b"/v1/completions": names.TEXT_COMPLETION,
    b"/v1/embeddings": names.EMBEDDINGS,
}
_OF_TENSORS: Final[Mapping[bytes, str]] = {
    b"infer": names.INFER,
    b"generate": names.TEXT_COMPLETION,
    b"generate_stream": names.TEXT_COMPLETION,
}
_GENERATES: Final = frozenset((names.CHAT, names.TEXT_COMPLETION))
_NAME: Final = re.compile(NAME_PATTERN)
_ROUTES: Final = {
    names.CHAT: "/v1/chat/completions",
    names.TEXT_COMPLETION: "/v1/completions",
    names.EMBEDDINGS: "/v1/embeddings",
    names.INFER: "/v2/models/{model}/infer",
    names.OTHER: "/{path}",
}


@dataclass(frozen=True, slots=True)
class _Measures:
    """The series of requests that are alike. `failing`: their labels where they are counted."""

    failing: tuple[str, ...]
    duration: Distribution
    first_token: Distribution
    output_token: Distribution
    input_tokens: Distribution
    output_tokens: Distribution


class GatewayRecorder:
    """The Recorder of one gateway process. See `ports.Recorder`.

        async with GatewayRecorder("eu-west", environ, ledger=…, spool=folder) as recorder:
            Proxy(…, recorder, sample_ratio=recorder.sample_ratio)

    Attributes:
        recent: the last requests.
        metrics: others may add what they know (`metrics.gauge`).
        sample_ratio: the share of new traces that is sampled; 0 where nobody collects them.
    """

    def __init__(
        self,
        name: str,
        environ: Mapping[str, str],
        *,
        ledger: Ledger | None = None,
        spool: Path | None = None,
        recent: Recent | None = None,
        log_to: int | None = STANDARD_ERROR,
    ) -> None:
        """
        Args:
            name: the gateway's.
            environ: where the OTEL_* variables are looked up.
            ledger: where usage is written; None: nobody is billed.
            spool: a folder for usage on its way there; needed with `ledger`.
            log_to: a file descriptor for one line a request; None: none.

        Raises:
            BadRequest: the folder cannot be used.
        """
        self.recent = recent or Recent()
        self.metrics = Metrics()
        self.sample_ratio = sample_ratio(environ)
        self._pending: list[Entry] = []
        self._to_bill: list[Usage] = []
        self._flushing: asyncio.TimerHandle | None = None
        self._exporting: asyncio.TimerHandle | None = None
        self._clock_s = time.time() - time.monotonic()
        self._measures: dict[tuple[str, ...], _Measures] = {}
        self._tries: dict[tuple[str, ...], Distribution] = {}
        self._usage: UsageWriter | None = None
        if ledger is not None:
            assert spool is not None, "usage needs a folder on its way to the ledger"
            self._usage = UsageWriter(ledger, spool)
        self._lines = None if log_to is None else LineWriter(log_to)
        self._metric_export: MetricExport | None = None
        self._span_export: SpanExport | None = None
        self._span_thread = ThreadPoolExecutor(1, "nearfield-spans")
        if exports("METRICS", environ) or exports("TRACES", environ):
            about = resource(name, environ)
            if exports("METRICS", environ):
                self._metric_export = MetricExport(about, environ)
            if exports("TRACES", environ):
                self._span_export = SpanExport(about)
        self._make_metrics()

    def _make_metrics(self) -> None:
        metrics = self.metrics
        common = (names.OPERATION, names.PROVIDER, names.REQUEST_MODEL, names.REGION)
        tried = (names.OPERATION, names.PROVIDER, names.REQUEST_MODEL, names.ENDPOINT)
        failing = (*common, names.ERROR_TYPE)
        seconds = names.DURATION_BUCKETS_S
        self._duration = metrics.histogram(
            names.REQUEST_DURATION, "From a request's arrival to its last byte.", failing, seconds
        )
        self._first_token = metrics.histogram(
            names.TIME_TO_FIRST_TOKEN,
            "From a request's arrival to the first byte of its stream.",
            common,
            seconds,
        )
        self._output_token = metrics.histogram(
            names.TIME_PER_OUTPUT_TOKEN,
            "Mean time between a stream's tokens after the first.",
            common,
            names.TOKEN_BUCKETS_S,
        )
        self._token_usage = metrics.histogram(
            names.CLIENT_TOKENS,
            "Tokens of a request.",
            (*common, names.TOKEN_TYPE),
            names.TOKEN_COUNT_BUCKETS,
            unit="{token}",
        )
        self._try_duration = metrics.histogram(
            names.CLIENT_DURATION,
            "One try at one endpoint, from its start to its last byte.",
            (*tried, names.ERROR_TYPE),
            seconds,
        )
        self._errors = metrics.counter(
            names.ERRORS, "Requests that failed, by error.type.", failing
        )
        self._retries = metrics.counter(
            names.RETRIES,
            "Tries after or beside a request's first, by why that was not enough.",
            (names.REQUEST_MODEL, names.ERROR_TYPE),
        )
        self._pages = metrics.counter(
            names.PAGES, "Requests that the gateway answers by itself.", (names.HTTP_STATUS,)
        )
        self._malformed = metrics.counter(
            names.MALFORMED, "What was refused before it was a request.", (names.CODE,)
        )
        usage, lines = self._usage, self._lines
        if usage is not None:
            metrics.gauge(
                names.USAGE_WAITING, "Usage not in the ledger yet.", lambda: [({}, usage.waiting)]
            )
            metrics.gauge(
                names.USAGE_WRITTEN,
                "Usage records that the ledger has.",
                lambda: [({}, usage.written)],
                grows=True,
            )
            metrics.gauge(
                names.USAGE_LOST,
                "Usage records that could not be kept.",
                lambda: [({}, usage.lost)],
                grows=True,
            )
        if lines is not None:
            metrics.gauge(
                names.LOG_LINES_LOST,
                "Log lines that nobody read in time.",
                lambda: [({}, lines.lost)],
                grows=True,
            )

    async def __aenter__(self) -> Self:
        if self._metric_export is not None:
            self._export(self._metric_export)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write and send what is left."""
        self._flush()
        for timer in (self._flushing, self._exporting):
            if timer is not None:
                timer.cancel()
        closing: list[Callable[[], object]] = []
        if self._usage is not None:
            usage = self._usage
            closing.append(lambda: usage.close(CLOSE_S))
        if self._lines is not None:
            lines = self._lines
            closing.append(lambda: lines.close(CLOSE_S))
        if self._metric_export is not None:
            self._metric_export.send(self.metrics)
            closing.append(self._metric_export.close)
        if self._span_export is not None:
            closing.append(self._close_spans)
        await asyncio.gather(*(asyncio.to_thread(close) for close in closing))
        self._span_thread.shutdown(wait=False)

    def _close_spans(self) -> None:
        self._span_thread.shutdown(wait=True)
        assert self._span_export is not None
        self._span_export.close()

    # ---- Recorder ---------------------------------------------------------------------------

    def done(self, outcome: Outcome) -> None:
        request = outcome.request
        if request.page is not None:
            self._pages.add(1, str(outcome.status))
            return
        entry = _entry(outcome, request, self._clock_s)
        self.recent.add(entry)
        if self._usage is not None and entry.tries and entry.operation != names.OTHER:
            self._bill(outcome, entry)
        pending = self._pending
        pending.append(entry)
        if len(pending) >= BATCH:
            self._flush()
        elif self._flushing is None:
            loop = asyncio.get_running_loop()
            self._flushing = loop.call_later(FLUSH_S, self._on_time)

    def malformed(self, code: str) -> None:
        self._malformed.add(1, code)

    def prometheus_page(self) -> bytes:
        """All metrics as Prometheus text, the last request included."""
        self._flush()
        return self.metrics.prometheus_page()

    # ---- in batches -------------------------------------------------------------------------

    def _on_time(self) -> None:
        self._flushing = None
        self._flush()

    def _flush(self) -> None:
        """Work off what is pending."""
        entries, self._pending = self._pending, []
        if not entries:
            return
        self._clock_s = time.time() - time.monotonic()
        for entry in entries:
            self._measure(entry)
        if self._lines is not None:
            self._lines.put([_line(entry) for entry in entries])
        if self._usage is not None and self._to_bill:
            used, self._to_bill = self._to_bill, []
            self._usage.put(used)
        export = self._span_export
        if export is not None:
            sampled = [entry for entry in entries if entry.sampled]
            if sampled:
                self._span_thread.submit(_send_spans, export, sampled).add_done_callback(_seen)

    def _measure(self, entry: Entry) -> None:
        model = entry.model if entry.tries else ""  # callers must not make up series
        kind = _kind(entry)
        key = (entry.operation, model, entry.region, kind)
        to = self._measures.get(key)
        if to is None:
            to = self._measures[key] = self._measures_for(*key)
        to.duration.add(entry.ended_s - entry.started_s)
        first_s, used = entry.first_byte_s, entry.used
        if kind:
            self._errors.add(1, *to.failing)
        elif entry.stream and first_s is not None and entry.operation in _GENERATES:
            to.first_token.add(first_s - entry.started_s)
            if used is not None and used.output > 1:
                to.output_token.add((entry.ended_s - first_s) / (used.output - 1))
        if used is not None:
            to.input_tokens.add(used.input)
            if entry.operation in _GENERATES:
                to.output_tokens.add(used.output)
        last: str | None = None
        for tried in entry.tries:
            if last is not None:
                self._retries.add(1, model, last)
            last = tried.failure or _relayed(tried.status)
            at = (entry.operation, model, tried.endpoint, last)
            spent = self._tries.get(at)
            if spent is None:
                labels = (entry.operation, names.PROVIDER_NAME, model, tried.endpoint, last)
                spent = self._tries[at] = self._try_duration.at(*labels)
            spent.add(tried.ended_s - tried.started_s)

    def _measures_for(self, operation: str, model: str, region: str, kind: str) -> _Measures:
        common = (operation, names.PROVIDER_NAME, model, region)
        return _Measures(
            (*common, kind),
            self._duration.at(*common, kind),
            self._first_token.at(*common),
            self._output_token.at(*common),
            self._token_usage.at(*common, names.INPUT),
            self._token_usage.at(*common, names.OUTPUT),
        )

    def _export(self, export: MetricExport) -> None:
        self._flush()
        export.send(self.metrics)
        loop = asyncio.get_running_loop()
        self._exporting = loop.call_later(export.interval_s, self._export, export)

    def _bill(self, outcome: Outcome, entry: Entry) -> None:
        """Note the request's usage, unless another gateway does."""
        admission = None if outcome.grant is None else outcome.grant.about
        if not isinstance(admission, Admission) or admission.from_gateway:
            return
        idempotent = admission.idempotency_key
        if idempotent is not None and not _executed(entry):
            return  # the next request with this key is executed, and is the one that counts
        used = entry.used
        self._to_bill.append(
            Usage(
                record_id=_record_id(entry, idempotent),
                tenant=entry.tenant,
                product=entry.product,
                key_id=entry.key_id,
                model=entry.model,
                version=entry.version,
                region=entry.region,
                endpoint=entry.endpoint,
                operation=entry.operation,
                outcome=_kind(entry) or "ok",
                input_tokens=0 if used is None else used.input,
                cached_tokens=0 if used is None else used.cached,
                output_tokens=0 if used is None else used.output,
                started_s=entry.at_s,
                duration_s=entry.ended_s - entry.started_s,
                guessed=used is not None and used.guessed,
            )
        )


# ---- one request --------------------------------------------------------------------------------


def _entry(outcome: Outcome, request: Request, clock_s: float) -> Entry:
    """What is kept of a request. It is in every request's way."""
    grant = outcome.grant
    about = request.caller if grant is None else grant.about
    admission = about if type(about) is Admission else None
    principal = about if admission is None else admission.principal
    if not isinstance(principal, Principal):
        principal = _NOBODY
    tries = outcome.attempts
    winner: Attempt | None = None
    for attempt in tries:
        if attempt.failure is None or (attempt.first_byte_s and attempt.failure != "status"):
            winner = attempt
            break
    leg = (winner or tries[-1]).leg if tries else None
    routed = leg if isinstance(leg, Routed) else _NOWHERE
    model = routed.model or request.model or ""
    if not routed.model and _NAME.fullmatch(model) is None:
        model = ""
    trace = request.trace
    started_s, ended_s = request.started_s, outcome.ended_s
    return Entry(
        request.request_id.decode("ascii"),
        trace.trace_id.decode("ascii"),
        trace.span_id.decode("ascii"),
        trace.parent_id.decode("ascii"),
        trace.sampled,
        started_s + clock_s,
        started_s,
        outcome.first_byte_s,
        ended_s,
        request.method.decode("ascii"),
        _operation(request.path),
        request.stream,
        principal.tenant,
        principal.product,
        principal.key_id,
        admission is not None and admission.from_gateway,
        DEFAULT if admission is None else admission.criticality,
        model,
        routed.version,
        routed.region,
        routed.endpoint,
        outcome.status,
        outcome.error,
        len(request.body),
        outcome.body_bytes,
        None if admission is None else admission.used,
        tuple([_tried(attempt, ended_s) for attempt in tries]),
    )


def _tried(attempt: Attempt, ended_s: float) -> Tried:
    leg = attempt.leg
    routed = leg if isinstance(leg, Routed) else _NOWHERE
    return Tried(
        routed.endpoint,
        routed.region,
        routed.replica,
        routed.why,
        routed.reason,
        routed.predicted_s,
        attempt.started_s,
        attempt.first_byte_s,
        ended_s if attempt.ended_s is None else attempt.ended_s,
        attempt.status,
        attempt.failure,
        routed.explain,
    )


_NOBODY = Principal("", None, "", frozenset(), None, None)
_NOWHERE = Routed(Target("", 0))


@lru_cache(maxsize=2048)
def _operation(path: bytes) -> str:
    """What a request asks for, in telemetry's words."""
    path = path.partition(b"?")[0]
    if path.startswith(b"/v2/models/"):
        return _OF_TENSORS.get(path.rpartition(b"/")[2], names.OTHER)
    return _OPERATIONS.get(path, names.OTHER)


def _kind(entry: Entry) -> str:
    """Of its failure (`error.type`); empty where there was none."""
    return entry.error or _relayed(entry.status)


def _relayed(status: int) -> str:
    return str(status) if status >= 400 else ""


def _our_fault(entry: Entry) -> bool:
    """Whether it failed by no doing of its caller's: also where it broke off after a good head."""
    return entry.status >= 500 or (entry.status < 400 and entry.error not in (None, "cancelled"))


def _executed(entry: Entry) -> bool:
    """Whether a request with an `Idempotency-Key` is settled by this: another one with the same
    key gets this answer, and is not executed."""
    return entry.error is None and entry.status < 500 and entry.status != RateLimited.status


def _record_id(entry: Entry, idempotent: bytes | None) -> str:
    """The name of a request's usage record.

    Ids that callers choose may be alike, so our own span's is in it. An `Idempotency-Key` names
    the request wherever it is executed, for as long as its answer is kept. Later the same key is
    another request: two of them that are that long apart have different names.
    """
    if idempotent is None:
        return f"{entry.request_id}-{entry.span_id}"
    window = int(entry.at_s // IDEMPOTENT_S)
    named = b"%b\0%d\0%b" % (entry.tenant.encode(), window, idempotent)
    return f"idempotent-{hashlib.sha256(named).hexdigest()[:40]}"


# ---- its line -----------------------------------------------------------------------------------


class _Line(msgspec.Struct, omit_defaults=True):
    """As `telemetry.logs` writes lines: the same names for the same things."""

    ts: str
    level: str
    logger: str
    msg: str
    request_id: str
    trace_id: str
    span_id: str
    route: str
    status: int
    duration_s: float
    tenant: str = ""
    product: str | None = None
    key_id: str = ""
    from_gateway: bool = False
    model: str = ""
    version: str = ""
    region: str = ""
    endpoint: str = ""
    replica: str | None = None
    why: str = ""
    code: str | None = None
    attempts: int = 1
    first_byte_s: float | None = None
    stream: bool = False
    body_bytes: int = 0
    answer_bytes: int = 0
    input_tokens: int | None = None
    cached_tokens: int = 0
    output_tokens: int | None = None


_encode = msgspec.json.Encoder().encode


def _line(entry: Entry) -> bytes:
    ended_s = entry.at_s + entry.ended_s - entry.started_s
    second = int(ended_s)
    first_s, used = entry.first_byte_s, entry.used
    last = entry.tries[-1] if entry.tries else None
    line = _Line(
        f"{_second(second)}.{int((ended_s - second) * 1000):03d}+00:00",
        "error" if _our_fault(entry) else "info",
        "nearfield.requests",
        entry.method,
        entry.request_id,
        entry.trace_id,
        entry.span_id,
        _ROUTES[entry.operation],
        entry.status,
        round(entry.ended_s - entry.started_s, 6),
        entry.tenant,
        entry.product,
        entry.key_id,
        entry.from_gateway,
        entry.model,
        entry.version,
        entry.region,
        entry.endpoint,
        None if last is None else last.replica,
        "" if last is None else last.why,
        entry.error,
        len(entry.tries),
        None if first_s is None else round(first_s - entry.started_s, 6),
        entry.stream,
        entry.body_bytes,
        entry.answer_bytes,
        None if used is None else used.input,
        0 if used is None else used.cached,
        None if used is None else used.output,
    )
    return _encode(line) + b"\n"


@lru_cache(maxsize=8)
def _second(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()[:19]


# ---- its spans ----------------------------------------------------------------------------------


def _send_spans(export: SpanExport, entries: list[Entry]) -> None:
    for entry in entries:
        export.send(_span(entry))


def _seen(sent: Future[None]) -> None:
    if not sent.cancelled() and (error := sent.exception()) is not None:
        log.error("spans could not be made", exc_info=error)


def _span(entry: Entry) -> SpanMade:
    """The gateway's span, under the id that the replica was told, and one for each try."""
    route = _ROUTES[entry.operation]
    attributes: dict[str, Any] = {
        names.HTTP_METHOD: entry.method,
        names.HTTP_ROUTE: route,
        names.HTTP_STATUS: entry.status,
        names.REQUEST_ID: entry.request_id,
        names.TENANT: entry.tenant,
        names.KEY_ID: entry.key_id,
        names.ATTEMPTS: len(entry.tries),
    }
    if entry.product is not None:
        attributes[names.PRODUCT] = entry.product
    if entry.operation != names.OTHER:
        attributes[names.OPERATION] = entry.operation
        attributes[names.PROVIDER] = names.PROVIDER_NAME
        attributes[names.REQUEST_MODEL] = entry.model
        attributes[names.REQUEST_STREAM] = entry.stream
    if entry.endpoint:
        attributes[names.ENDPOINT] = entry.endpoint
        attributes[names.REGION] = entry.region
        attributes[names.MODEL_VERSION] = entry.version
    if entry.used is not None:
        attributes[names.INPUT_TOKENS] = entry.used.input
        attributes[names.CACHED_TOKENS] = entry.used.cached
        attributes[names.OUTPUT_TOKENS] = entry.used.output
    if kind := _kind(entry):
        attributes[names.ERROR_TYPE] = kind
    clock_s = entry.at_s - entry.started_s
    return SpanMade(
        f"{entry.method} {route}",
        entry.at_s,
        clock_s + entry.ended_s,
        attributes,
        error=_our_fault(entry),
        inside=[_try_span(tried, clock_s) for tried in entry.tries],
        trace_id=entry.trace_id,
        span_id=entry.span_id,
        parent_id=entry.parent_id,
    )


def _try_span(tried: Tried, clock_s: float) -> SpanMade:
    attributes: dict[str, Any] = {
        names.ENDPOINT: tried.endpoint,
        names.REGION: tried.region,
        names.ROUTE_WHY: tried.why,
        names.ROUTE_REASON: tried.reason,
        names.ROUTE_PREDICTED: tried.predicted_s,
    }
    if tried.replica is not None:
        attributes[names.REPLICA] = tried.replica
    if tried.status:
        attributes[names.HTTP_STATUS] = tried.status
    if tried.first_byte_s is not None:
        attributes[names.FIRST_BYTE] = tried.first_byte_s - tried.started_s
    failure = tried.failure or _relayed(tried.status)
    if failure:
        attributes[names.ERROR_TYPE] = failure
    return SpanMade(
        names.SPAN_ATTEMPT,
        clock_s + tried.started_s,
        clock_s + tried.ended_s,
        attributes,
        error=bool(failure) and failure != "cancelled",
    )
