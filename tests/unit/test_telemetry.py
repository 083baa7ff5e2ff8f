from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from nearfield.api.events import Timings
from nearfield.telemetry import logs, names
from nearfield.telemetry.requests import Recorder, RequestRecord
from nearfield.telemetry.setup import Moment, Telemetry
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from prometheus_client.parser import text_string_to_metric_families

from tests.support.otlp import attributes, receiver

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def telemetry(
    environ: Mapping[str, str] | None = None, moment: Moment | None = None
) -> Iterator[Telemetry]:
    now = moment or Moment()
    made = Telemetry(model="chat", version="7", moment=lambda: now, environ=environ or {})
    try:
        yield made
    finally:
        made.close()


def finished(record: RequestRecord) -> RequestRecord:
    """A chat request that queued 0.1 s, computed its prompt 0.2 s and decoded 0.4 s."""
    record.started_s = time.monotonic() - 1.0
    record.operation = names.CHAT
    record.status = 200
    record.count(11, 5)
    record.finish_reasons.append("stop")
    record.first_token_s = record.started_s + 0.3
    record.timings = Timings(record.started_s + 0.05, 0.05, 0.2, 0.4, batch_size=4, steps=5)
    return record


def page(made: Telemetry) -> dict[tuple[str, str], float]:
    """The Prometheus page as {(sample, gen_ai_token_type): value}."""
    samples: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(made.prometheus_page().decode()):
        for sample in family.samples:
            samples[sample.name, sample.labels.get("gen_ai_token_type", "")] = sample.value
    return samples


def test_a_request_is_counted_once() -> None:
    with telemetry() as made:
        recorder = Recorder(made)
        recorder.end(finished(recorder.begin("POST", "/v1/chat/completions", "r", {})))
        seen = page(made)
    assert seen["gen_ai_server_request_duration_seconds_count", ""] == 1
    assert seen["gen_ai_server_time_to_first_token_seconds_sum", ""] == pytest.approx(0.3)
    assert seen["gen_ai_server_time_per_output_token_seconds_sum", ""] == pytest.approx(
        0.7 / 4, rel=0.1
    )
    assert seen["nearfield_tokens_total", "input"] == 11
    assert seen["nearfield_tokens_total", "output"] == 5
    assert seen["nearfield_queue_time_seconds_sum", ""] == pytest.approx(0.1)
    assert seen["nearfield_batch_sizes_sum", ""] == 4


def test_errors_are_counted_by_type() -> None:
    with telemetry() as made:
        recorder = Recorder(made)
        record = recorder.begin("POST", "/v1/embeddings", "r", {})
        record.operation, record.status, record.error = names.EMBEDDINGS, 429, "queue_full"
        recorder.end(record)
        text = made.prometheus_page().decode()
    (line,) = [x for x in text.splitlines() if x.startswith("nearfield_errors_total")]
    assert 'error_type="queue_full"' in line
    assert line.endswith(" 1.0")


def test_requests_to_health_and_metrics_are_not_measured() -> None:
    with telemetry() as made:
        recorder = Recorder(made)
        recorder.end(recorder.begin("GET", "/metrics", "r", {}))
        assert "request_duration" not in made.prometheus_page().decode()


def test_the_moment_shows_under_both_names() -> None:
    moment = Moment(running=3, waiting=2, queue_age_s=1.5, batch_size=3, kv_usage=0.25, crashes=1)
    with telemetry(moment=moment) as made:
        seen = page(made)
        text = made.prometheus_page().decode()
    assert seen["nearfield_requests_running", ""] == seen["vllm:num_requests_running", ""] == 3
    assert seen["nearfield_requests_waiting", ""] == seen["vllm:num_requests_waiting", ""] == 2
    assert seen["vllm:kv_cache_usage_perc", ""] == 0.25
    assert seen["nearfield_queue_age_seconds", ""] == 1.5
    assert seen["nearfield_engine_crashes_total", ""] == 1
    assert 'vllm:num_requests_running{model_name="chat"} 3.0' in text


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        (PARENT, "0af7651916cd43dd8448eb211c80319c"),
        (PARENT.replace("00-", "ff-"), None),
        ("nonsense", None),
        (None, None),
    ],
)
def test_the_trace_is_the_callers_if_it_sent_one(header: str | None, trace: str | None) -> None:
    with telemetry() as made:
        carrier = {} if header is None else {"traceparent": header}
        record = Recorder(made).begin("POST", "/v1/completions", "r", carrier)
    version, trace_id, span_id, flags = record.traceparent.split("-")
    assert (version, flags) == ("00", "01" if trace else "00")
    assert trace_id == trace if trace else trace_id not in PARENT
    assert span_id not in PARENT
    assert int(span_id, 16) > 0


def test_spans_and_metrics_reach_an_otlp_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    with receiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        with telemetry(os.environ) as made:
            recorder = Recorder(made)
            record = recorder.begin("POST", "/v1/chat/completions", "r-1", {"traceparent": PARENT})
            before_ns = time.time_ns()
            recorder.end(finished(record))
    assert collector.resources[0].items() >= {
        ("service.name", "nearfield"),
        ("nearfield.model", "chat"),
        ("deployment.environment", "test"),
    }
    server = collector.span("POST /v1/chat/completions")
    assert server.trace_id.hex() == PARENT.split("-")[1]
    assert server.parent_span_id.hex() == PARENT.split("-")[2]
    assert record.traceparent.split("-")[2] == server.span_id.hex()
    assert attributes(server.attributes).items() >= {
        ("gen_ai.operation.name", "chat"),
        ("gen_ai.provider.name", "nearfield"),
        ("gen_ai.request.model", "chat"),
        ("gen_ai.usage.input_tokens", "11"),
        ("gen_ai.usage.output_tokens", "5"),
        ("gen_ai.response.finish_reasons", "stop"),
        ("http.response.status_code", "200"),
        ("nearfield.request.id", "r-1"),
    }
    lengths_s = {"queue": 0.1, "prefill": 0.2, "decode": 0.4}
    for name, length_s in lengths_s.items():
        child = collector.span(name)
        assert child.parent_span_id == server.span_id
        took_s = (child.end_time_unix_nano - child.start_time_unix_nano) / 1e9
        assert took_s == pytest.approx(length_s, abs=1e-3)
    # The engine's clock was translated: decoding ended 0.3 s ago, as told above.
    ended_ns = collector.span("decode").end_time_unix_nano
    assert (before_ns - ended_ns) / 1e9 == pytest.approx(0.3, abs=0.1)
    assert "gen_ai.server.request.duration" in collector.metrics
    assert "nearfield.requests.running" in collector.metrics


def test_a_request_nobody_samples_sends_no_span(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with receiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.url}/v1/traces")
        with telemetry(os.environ) as made:
            recorder = Recorder(made)
            recorder.end(finished(recorder.begin("POST", "/v1/chat/completions", "r", {})))
    assert not collector.spans


@pytest.mark.parametrize(
    "off", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}, {}]
)
def test_no_exporter_unless_asked_for(off: dict[str, str]) -> None:
    environ = off and {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", **off}
    environ |= {"OTEL_METRICS_EXPORTER": "none"}
    with telemetry(environ) as made:
        assert made.tracer is None


def test_logs_are_json_with_the_ids(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure(model="chat")
    logs.configure(model="chat")
    log = logging.getLogger("nearfield.test")
    try:
        log.info("before")
        logs.bind("r-1", "trace", "span")
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("it failed")
    finally:
        logging.getLogger(logs.LOGGER).handlers.clear()
        logging.getLogger(logs.LOGGER).propagate = True
        logs._ids.set(None)
    first, second = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert (first["msg"], first["level"], first["model"]) == ("before", "info", "chat")
    assert "request_id" not in first
    assert first["ts"].endswith("+00:00")
    assert (second["request_id"], second["trace_id"], second["span_id"]) == (
        "r-1",
        "trace",
        "span",
    )
    assert "ValueError: why" in second["exception"]


def test_genai_names_are_the_conventions() -> None:
    modules = (gen_ai_attributes, gen_ai_metrics)
    known = {v for module in modules for v in vars(module).values() if isinstance(v, str)}
    ours = {v for v in vars(names).values() if isinstance(v, str) and v.startswith("gen_ai.")}
    assert ours
    assert ours <= known
