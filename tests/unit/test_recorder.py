"""What is kept, counted, logged, traced and billed of requests, and what never is."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nearfield.api.keys import Principal
from nearfield.core.errors import Unavailable
from nearfield.edge.decisions import Admission, Routed, Tokens
from nearfield.edge.proxy.ports import Attempt, Grant, Outcome, Request, Target, Trace
from nearfield.edge.recent import Entry, Recent
from nearfield.edge.recorder import BATCH, IDEMPOTENT_S, GatewayRecorder
from nearfield.policy.endpoints import Caller
from nearfield.policy.explain import Explanation, Line
from nearfield.store.ports import Usage
from nearfield.store.sql import Store
from nearfield.telemetry import names
from nearfield.telemetry.aggregate import Distribution, Metrics
from nearfield.telemetry.export import sample_ratio
from nearfield.telemetry.lines import MOST_BYTES, LineWriter
from prometheus_client.parser import text_string_to_metric_families

from tests.support.hosting import until
from tests.support.otlp import attributes, receiver

CANARY = "the-caller-wrote-this"
PRINCIPAL = Principal("acme", "web", "k1", frozenset({"inference"}), None, None)
NOWHERE = Target("127.0.0.1", 1)


def routed(endpoint: str = "eu-west/chat@1/default", **fields: Any) -> Routed:
    region, model, rest = endpoint.replace("@", "/").split("/", 2)
    version, _, pool = rest.partition("/")
    made: dict[str, Any] = {
        "endpoint": endpoint, "region": region, "model": model, "version": version, "pool": pool,
        "why": "nearest", "reason": "nearest; 12.0 ms", "predicted_s": 0.012, "replica": "r-1",
        **fields,
    }  # fmt: skip
    leg = Routed(NOWHERE, headers=((b"x-secret", CANARY.encode()),), **made)
    leg.body = CANARY.encode()
    return leg


def attempt(
    leg: Routed | None = None, at_s: float = 0.01, took_s: float = 0.2, **fields: Any
) -> Attempt:
    """One that began `at_s` after the request and took so long."""
    made = Attempt(leg or routed(), at_s)
    made.status = fields.get("status", 200)
    made.failure = fields.get("failure")
    made.first_byte_s = at_s + took_s / 2 if made.status else None
    made.ended_s = at_s + took_s
    return made


_ANSWERED: Any = object()


def outcome(
    *attempts: Attempt,
    path: str = "/v1/chat/completions",
    took_s: float = 0.5,
    about: Any = _ANSWERED,
    status: int = 200,
    error: str | None = None,
    used: Tokens | None = None,
    stream: bool = True,
    request_id: str = "req-1",
    model: str = "chat",
    sampled: bool = False,
    **admitted: Any,
) -> Outcome:
    """A request that is over, with `attempts` (times relative to its arrival)."""
    now_s = time.monotonic()
    started_s = now_s - took_s
    body = json.dumps({"model": model, "messages": [{"content": CANARY}]}).encode()
    span_id = b"%016x" % random.getrandbits(64)
    request = Request(
        b"POST", f"{path}?q={CANARY}".encode(), f"{path}?q={CANARY}".encode(), "openai",
        {b"authorization": CANARY.encode(), b"x-mine": CANARY.encode()}, request_id.encode(),
        Trace(b"ab" * 16, span_id, b"cd" * 8, sampled), started_s, now_s + 60, model, True,
        "127.0.0.1", body, stream,
    )  # fmt: skip
    made = Outcome(request)
    for each in attempts:
        each.started_s += started_s
        if each.first_byte_s is not None:
            each.first_byte_s += started_s
        assert each.ended_s is not None
        each.ended_s += started_s
        made.attempts.append(each)
    if about is _ANSWERED:
        about = Admission(PRINCIPAL, Caller(), "generate", used=used, **admitted)
    made.grant = None if about is None else Grant(about=about)
    made.status, made.error, made.body_bytes = status, error, 77
    made.first_byte_s = attempts[-1].first_byte_s if attempts else now_s
    made.ended_s = now_s
    return made


@asynccontextmanager
async def recording(**options: Any) -> AsyncIterator[GatewayRecorder]:
    options.setdefault("log_to", None)
    environ = options.pop("environ", {})
    async with GatewayRecorder("eu-west", environ, **options) as recorder:
        yield recorder


def samples(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def total(page: bytes, name: str, **labels: str) -> float:
    """The sum of a sample over all series with these labels."""
    return sum(
        value
        for (sample, about), value in samples(page).items()
        if sample == name and set(labels.items()) <= set(about)
    )


class TestRecent:
    async def test_a_request_is_kept_with_its_decision_and_its_times(self) -> None:
        lines = (Line("eu-west/chat@1/default", "chosen", "nearest", 0.01),)
        leg = routed(explain=lambda: Explanation("eu-west: nearest", lines))
        first = attempt(routed("us-east/chat@1/spot"), took_s=0.1, status=0, failure="closed")
        used = Tokens(11, 3, 5)
        async with recording() as recorder:
            recorder.done(outcome(first, attempt(leg, at_s=0.11), used=used))
            entry = recorder.recent.find("req-1")
        assert entry is not None
        shown = entry.to_json()
        assert shown["at_s"] == pytest.approx(time.time() - 0.5, abs=0.2)
        assert shown["duration_s"] == pytest.approx(0.5)
        assert shown["first_byte_s"] == pytest.approx(0.21)
        told = {name: shown[name] for name in ("tenant", "product", "key_id", "model", "endpoint")}
        assert list(told.values()) == ["acme", "web", "k1", "chat", "eu-west/chat@1/default"]
        assert shown["tokens"] == {"input": 11, "cached": 3, "output": 5, "guessed": False}
        assert [tried["failure"] for tried in shown["attempts"]] == ["closed", None]
        assert shown["attempts"][1] == {
            "endpoint": "eu-west/chat@1/default", "region": "eu-west", "replica": "r-1",
            "why": "nearest", "reason": "nearest; 12.0 ms", "predicted_s": 0.012,
            "started_after_s": 0.11, "first_byte_after_s": 0.21, "ended_after_s": 0.31,
            "status": 200, "failure": None,
        }  # fmt: skip
        assert "decision" not in shown
        explained = entry.to_json(explained=True)["decision"]
        assert explained["outcome"] == "eu-west: nearest"
        assert explained["lines"][0]["verdict"] == "chosen"

    async def test_nothing_that_the_caller_wrote_is_kept_logged_or_shown(
        self, tmp_path: Path
    ) -> None:
        log = tmp_path / "log"
        file = os.open(log, os.O_CREAT | os.O_WRONLY)
        async with recording(log_to=file) as recorder:
            recorder.done(outcome(attempt()))
            refused = outcome(model=f"{CANARY} is a prompt", about=None, status=404, error="none")
            recorder.done(refused)
            shown = [entry.to_json() for entry in recorder.recent.latest(9)]
            page = recorder.prometheus_page().decode()
        os.close(file)
        kept = json.dumps(shown) + log.read_text() + page
        assert log.read_text().count("\n") == 2
        assert CANARY not in kept
        assert shown[0]["model"] == ""

    def test_it_is_bounded_and_failures_last_longer(self) -> None:
        recent = Recent(most=10, most_notable=3)
        for number in range(50):
            failed = number % 10 == 0
            recent.add(entry(str(number), status=500 if failed else 200))
        assert [e.request_id for e in recent.latest(99)] == [str(n) for n in range(49, 39, -1)]
        notable = [e.request_id for e in recent.latest(99, notable=True)]
        assert notable == ["40", "30", "20"]
        assert recent.find("20") is not None
        assert recent.find("0") is None
        assert recent.find("39") is None
        assert [e.request_id for e in recent.latest(2)] == ["49", "48"]

    def test_ids_may_be_alike_and_tenants_see_their_own(self) -> None:
        recent = Recent()
        for tenant in ("acme", "other"):
            recent.add(entry("same", tenant=tenant))
        assert recent.find("same", tenant="acme").tenant == "acme"  # type: ignore[union-attr]
        assert recent.find("same").tenant == "other"  # type: ignore[union-attr]
        assert recent.find("same", tenant="third") is None
        assert [e.tenant for e in recent.latest(9, tenant="acme")] == ["acme"]

    def test_a_subscriber_is_woken_once_and_takes_what_has_come(self) -> None:
        recent = Recent()
        woken: list[int] = []
        recent.add(entry("before"))
        following = recent.subscribe(lambda: woken.append(1), tenant="acme")
        for number in range(3):
            recent.add(entry(str(number)))
            recent.add(entry("x", tenant="other"))
        assert len(woken) == 1
        assert [e.request_id for e in following.take()] == ["0", "1", "2"]
        assert following.take() == []
        recent.add(entry("3"))
        assert len(woken) == 2
        following.close()
        following.close()
        recent.add(entry("4"))
        assert following.take() == []
        assert not following.dropped

    def test_one_that_falls_behind_is_dropped_and_told(self) -> None:
        recent = Recent()
        woken: list[int] = []
        slow = recent.subscribe(lambda: woken.append(1), most_behind=5)
        quick = recent.subscribe(lambda: None)
        for number in range(9):
            recent.add(entry(str(number)))
        assert slow.dropped
        assert slow.take() == []
        assert len(woken) == 2, "for the first entry, and for the end"
        assert len(quick.take()) == 9


def entry(request_id: str, *, tenant: str = "acme", status: int = 200) -> Entry:
    return Entry(
        request_id, "ab" * 16, "cd" * 8, "", False, 0.0, 0.0, 0.1, 0.2, "POST", names.CHAT, False,
        tenant, None, "k1", False, 1, "chat", "1", "eu-west", "eu-west/chat@1/default", status,
        None, 1, 1, None, (),
    )  # fmt: skip


class TestMetrics:
    def test_a_histogram_counts_each_value_where_it_belongs(self) -> None:
        chance = random.Random(5)
        bounds = names.DURATION_BUCKETS_S
        values = [chance.expovariate(2.0) for _ in range(1000)] + [*bounds, 0.0, 1e9]
        series = Distribution(bounds)
        for value in values:
            series.add(value)
        below = [sum(value <= bound for value in values) for bound in bounds]
        assert [sum(series.counts[: i + 1]) for i in range(len(bounds))] == below
        assert sum(series.counts) == len(values)
        assert series.total == pytest.approx(sum(values))

    def test_the_page_is_what_prometheus_reads(self) -> None:
        metrics = Metrics()
        histogram = metrics.histogram("a.time", "Time.", ("a.kind",), (0.1, 1.0))
        for value in (0.05, 0.1, 0.5, 7.0):
            histogram.at("x").add(value)
        counter = metrics.counter("a.count", "Count.", ("a.kind",))
        counter.add(2, 'quote"d\n')
        metrics.gauge("a.level", "Level.", lambda: [({"a.kind": "x"}, 3)], ("a.kind",))
        metrics.gauge("a.sum", "Sum.", lambda: [({}, 4)], grows=True)
        seen = samples(metrics.prometheus_page())
        buckets = {
            dict(labels)["le"]: value
            for (name, labels), value in seen.items()
            if name == "a_time_seconds_bucket"
        }
        assert buckets == {"0.1": 2, "1.0": 3, "+Inf": 4}
        assert seen["a_time_seconds_sum", (("a_kind", "x"),)] == pytest.approx(7.65)
        assert seen["a_count_total", (("a_kind", 'quote"d\n'),)] == 2
        assert seen["a_level", (("a_kind", "x"),)] == 3
        assert seen["a_sum_total", ()] == 4

    async def test_requests_are_counted_once_each_with_their_times_and_tokens(self) -> None:
        async with recording() as recorder:
            for _ in range(BATCH + 3):
                recorder.done(outcome(attempt(), used=Tokens(10, 0, 5)))
            recorder.done(outcome(attempt(), path="/v1/embeddings", stream=False))
            page = recorder.prometheus_page()
        count = BATCH + 3
        chat = {"gen_ai_operation_name": "chat", "gen_ai_request_model": "chat"}
        duration = "gen_ai_server_request_duration_seconds"
        assert total(page, f"{duration}_count", **chat, nearfield_region="eu-west") == count
        assert total(page, f"{duration}_sum", **chat) == pytest.approx(0.5 * count, rel=0.01)
        assert total(page, f"{duration}_bucket", **chat, le="0.25") == 0
        assert total(page, f"{duration}_bucket", **chat, le="1.0") == count
        assert total(page, f"{duration}_count", gen_ai_operation_name="embeddings") == 1
        first = "gen_ai_server_time_to_first_token_seconds"
        assert total(page, f"{first}_sum") == pytest.approx(0.11 * count)
        assert total(page, f"{first}_count") == count, "an embedding has no first token"
        mean_s = total(page, "gen_ai_server_time_per_output_token_seconds_sum") / count
        assert mean_s == pytest.approx(0.39 / 4, rel=0.01)
        tokens = "gen_ai_client_token_usage_sum"
        assert total(page, tokens, gen_ai_token_type="input") == 10 * count
        assert total(page, tokens, gen_ai_token_type="output") == 5 * count

    async def test_tries_are_counted_by_endpoint_and_why_they_were_not_enough(self) -> None:
        async with recording() as recorder:
            dead = attempt(routed("us-east/chat@1/spot"), took_s=0.1, status=0, failure="closed")
            busy = attempt(at_s=0.1, took_s=0.1, status=503, failure="status")
            recorder.done(outcome(dead, busy, attempt(at_s=0.2)))
            lost = attempt(took_s=0.1, status=0, failure="refused")
            recorder.done(outcome(lost, status=503, error="unavailable"))
            recorder.malformed("malformed_request")
            page = recorder.prometheus_page()
        tries = "gen_ai_client_operation_duration_seconds_count"
        assert total(page, tries) == 4
        assert total(page, tries, nearfield_endpoint="us-east/chat@1/spot") == 1
        assert total(page, tries, error_type="") == 1
        assert total(page, "nearfield_retries_total", error_type="closed") == 1
        assert total(page, "nearfield_retries_total", error_type="status") == 1
        assert total(page, "nearfield_retries_total") == 2
        assert total(page, "nearfield_errors_total", error_type="unavailable") == 1
        assert total(page, "nearfield_errors_total") == 1
        assert total(page, "nearfield_malformed_total", nearfield_code="malformed_request") == 1

    async def test_the_answer_is_the_winners_also_beside_a_hedge(self) -> None:
        async with recording() as recorder:
            slow = attempt(routed("us-east/chat@1/spot"), status=0, failure="cancelled")
            recorder.done(outcome(attempt(routed("asia/chat@2/x")), slow))
            (kept,) = recorder.recent.latest(1)
        assert (kept.region, kept.version) == ("asia", "2")

    async def test_callers_make_up_no_series(self) -> None:
        async with recording() as recorder:
            for number in range(100):
                made_up = outcome(model=f"m{number}", status=404, error="model_not_found")
                made_up.request.path = f"/v1/x{number}".encode()
                recorder.done(made_up)
            page = recorder.prometheus_page()
        assert total(page, "nearfield_errors_total") == 100
        assert len([s for s in samples(page) if s[0] == "nearfield_errors_total"]) == 1

    async def test_pages_are_counted_and_not_kept(self) -> None:
        async with recording() as recorder:
            asked = outcome(about=None)
            asked.request.page = lambda _: None  # type: ignore[assignment,return-value]
            recorder.done(asked)
            page = recorder.prometheus_page()
            assert recorder.recent.latest(1) == []
        assert total(page, "nearfield_pages_total", http_response_status_code="200") == 1

    async def test_a_lone_entry_does_not_wait_for_others(self, tmp_path: Path) -> None:
        file = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
        async with recording(log_to=file) as recorder:
            recorder.done(outcome(attempt()))
            await until(lambda: (tmp_path / "log").read_text().endswith("\n"))
        os.close(file)


class TestLines:
    async def test_one_line_a_request(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        file = os.open(log, os.O_CREAT | os.O_WRONLY)
        count = 3 * BATCH + 1
        async with recording(log_to=file) as recorder:
            for number in range(count - 1):
                recorder.done(outcome(attempt(), request_id=f"r{number}", used=Tokens(10, 1, 5)))
            recorder.done(outcome(about=None, status=401, error="invalid_api_key", stream=False))
        os.close(file)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [line["request_id"] for line in lines[:-1]] == [f"r{n}" for n in range(count - 1)]
        first, last = lines[0], lines[-1]
        assert first.items() >= {
            "level": "info", "logger": "nearfield.requests", "msg": "POST", "tenant": "acme",
            "product": "web", "key_id": "k1", "model": "chat", "endpoint": "eu-west/chat@1/default",
            "route": "/v1/chat/completions", "status": 200, "duration_s": 0.5, "stream": True,
            "input_tokens": 10, "cached_tokens": 1, "output_tokens": 5, "trace_id": "ab" * 16,
            "why": "nearest", "replica": "r-1",
        }.items()  # fmt: skip
        assert first["ts"].endswith("+00:00")
        assert (last["code"], last["attempts"], last["status"]) == ("invalid_api_key", 0, 401)
        assert "tenant" not in last

    async def test_who_does_not_read_loses_lines_and_holds_nobody_up(self) -> None:
        reading, writing = os.pipe()
        lines = LineWriter(writing)
        line = b"x" * 1023 + b"\n"
        started_s = time.monotonic()
        for _ in range(2 * MOST_BYTES // len(line) // 64):
            lines.put([line] * 64)
        assert time.monotonic() - started_s < 5
        assert lines.lost > 0
        lines.close(0.0)
        os.close(reading)  # the writer meets a broken pipe, and ends
        await until(lambda: not lines._thread.is_alive())
        os.close(writing)

    def test_lines_of_several_processes_are_not_mixed(self) -> None:
        reading, writing = os.pipe()
        writers = [LineWriter(writing) for _ in range(3)]
        for number, writer in enumerate(writers):
            writer.put([bytes([65 + number]) * (100 + 7 * n) + b"\n" for n in range(40)])
        for writer in writers:
            writer.close(10)
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            whole = file.read().splitlines()
        assert len(whole) == 120
        assert all(len(set(line)) == 1 for line in whole)


class TestUsage:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        opened = Store(f"sqlite:///{tmp_path / 'store.sqlite3'}")
        yield opened
        opened.close()

    async def test_each_request_that_reached_a_model_is_billed_once(
        self, store: Store, tmp_path: Path
    ) -> None:
        async with recording(ledger=store.ledger, spool=tmp_path / "spool") as recorder:
            for _ in range(200):  # callers may call all their requests alike
                recorder.done(outcome(attempt(), used=Tokens(10, 4, 5)))
            broken = attempt(failure="truncated")
            recorder.done(outcome(broken, error="upstream_failed", used=Tokens(10, 0, 2)))
            recorder.done(outcome(attempt(status=400), status=400))
        assert [
            (t.group, t.requests, t.input_tokens, t.cached_tokens, t.output_tokens)
            for t in store.ledger.totals(["outcome", "tenant", "product", "endpoint"])
        ] == [
            (("400", "acme", "web", "eu-west/chat@1/default"), 1, 0, 0, 0),
            (("ok", "acme", "web", "eu-west/chat@1/default"), 200, 2000, 800, 1000),
            (("upstream_failed", "acme", "web", "eu-west/chat@1/default"), 1, 10, 0, 2),
        ]
        assert list((tmp_path / "spool").iterdir()) == []

    async def test_a_broken_answer_is_billed_where_it_came_from(
        self, store: Store, tmp_path: Path
    ) -> None:
        """And not where the second try was that was cancelled when it began."""
        async with recording(ledger=store.ledger, spool=tmp_path / "spool") as recorder:
            winner = attempt(failure="truncated")
            hedge = attempt(routed("us-east/chat@1/default"), failure="cancelled", status=0)
            told = outcome(winner, hedge, error="upstream_failed", used=Tokens(10, 0, 2))
            recorder.done(told)
        (total,) = store.ledger.totals(["endpoint"])
        assert total.group == ("eu-west/chat@1/default",)

    async def test_what_others_bill_or_nobody_executed_is_not(
        self, store: Store, tmp_path: Path
    ) -> None:
        async with recording(ledger=store.ledger, spool=tmp_path / "spool") as recorder:
            recorder.done(outcome(attempt(), from_gateway=True))
            recorder.done(outcome(status=429, error="rate_limited"))
            recorder.done(outcome(about=None, status=401, error="invalid_api_key"))
            recorder.done(outcome(attempt(), path="/v1/files"))
        assert store.ledger.totals([]) == []

    async def test_an_idempotency_key_is_one_record_wherever_it_is_executed(
        self, store: Store, tmp_path: Path
    ) -> None:
        keyed: dict[str, Any] = {"idempotency_key": b"order-7", "used": Tokens(1, 0, 1)}
        for gateway in ("one", "other"):
            folder = tmp_path / gateway
            async with recording(ledger=store.ledger, spool=folder) as recorder:
                failed = attempt(status=0, failure="closed")
                recorder.done(outcome(failed, status=502, error="upstream_failed", **keyed))
                recorder.done(outcome(attempt(), request_id=gateway, **keyed))
        (found,) = store.ledger.totals(["outcome"])
        assert (found.group, found.requests) == (("ok",), 1)

    async def test_later_the_same_key_is_another_request(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = time.time
        for after_s in (0.0, IDEMPOTENT_S, IDEMPOTENT_S * 2.5):
            monkeypatch.setattr("nearfield.edge.recorder.time.time", lambda a=after_s: clock() + a)
            async with recording(ledger=store.ledger, spool=tmp_path / "spool") as recorder:
                recorder.done(outcome(attempt(), idempotency_key=b"daily"))
        assert store.ledger.totals([])[0].requests == 3

    async def test_while_the_ledger_is_gone_requests_go_on(
        self, store: Store, tmp_path: Path
    ) -> None:
        ledger = Gone()
        async with recording(ledger=ledger, spool=tmp_path / "spool") as recorder:
            for _ in range(3 * BATCH):
                recorder.done(outcome(attempt()))
            await until(lambda: ledger.asked)
            page = recorder.prometheus_page()
            assert total(page, "nearfield_usage_waiting") == 3 * BATCH
        async with recording(ledger=store.ledger, spool=tmp_path / "spool"):
            pass  # the next process sends what the first one left
        assert store.ledger.totals([])[0].requests == 3 * BATCH


class Gone:
    """A ledger that does not answer."""

    def __init__(self) -> None:
        self.asked = 0

    def append(self, records: list[Usage]) -> int:
        self.asked += 1
        raise Unavailable("gone")

    def totals(self, *_: Any, **__: Any) -> list[Any]:
        raise Unavailable("gone")


class TestTraces:
    async def test_the_gateways_span_is_the_callers_child_and_the_replicas_parent(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with receiver() as collector:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
            async with recording(environ=os.environ) as recorder:
                dead = attempt(
                    routed("us-east/chat@1/spot"), took_s=0.1, status=0, failure="closed"
                )
                over = outcome(dead, attempt(at_s=0.11), sampled=True, used=Tokens(10, 1, 5))
                recorder.done(over)
                recorder.done(outcome(attempt(), sampled=False))
        told = over.request.trace
        server = collector.span("POST /v1/chat/completions")
        assert server.trace_id.hex().encode() == told.trace_id
        assert server.span_id.hex().encode() == told.span_id, "as the replica was told"
        assert server.parent_span_id.hex().encode() == told.parent_id
        assert attributes(server.attributes).items() >= {
            ("gen_ai.operation.name", "chat"),
            ("gen_ai.request.model", "chat"),
            ("gen_ai.usage.output_tokens", "5"),
            ("http.response.status_code", "200"),
            ("nearfield.tenant", "acme"),
            ("nearfield.endpoint", "eu-west/chat@1/default"),
            ("nearfield.request.id", "req-1"),
            ("nearfield.attempts", "2"),
        }
        tries = [span for span in collector.spans if span.name == "attempt"]
        assert len(tries) == 2
        for each in tries:
            assert each.parent_span_id == server.span_id
            assert each.trace_id == server.trace_id
        first, second = (attributes(each.attributes) for each in tries)
        assert (first["nearfield.endpoint"], first["error.type"]) == (
            "us-east/chat@1/spot",
            "closed",
        )
        assert second["nearfield.route.reason"] == "nearest; 12.0 ms"
        assert "error.type" not in second
        took_s = [(s.end_time_unix_nano - s.start_time_unix_nano) / 1e9 for s in (server, *tries)]
        assert took_s == pytest.approx([0.5, 0.1, 0.2], abs=1e-3)
        assert server.end_time_unix_nano / 1e9 == pytest.approx(time.time(), abs=5)
        assert collector.resources[0]["service.name"] == "nearfield-gateway"
        assert CANARY not in str(collector.spans)

    async def test_a_trace_that_begins_here_has_no_parent(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with receiver() as collector:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
            async with recording(environ=os.environ) as recorder:
                for _ in range(3):
                    over = outcome(attempt(), sampled=True)
                    over.request.trace.parent_id = b""
                    over.request.trace.trace_id = b"%032x" % random.getrandbits(128)
                    recorder.done(over)
        roots = [span for span in collector.spans if span.name != "attempt"]
        assert len({span.trace_id for span in roots}) == 3
        assert {span.parent_span_id for span in roots} == {b""}

    async def test_metrics_reach_an_otlp_receiver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with receiver() as collector:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{collector.url}/v1/metrics")
            monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
            async with recording(environ=os.environ) as recorder:
                for _ in range(5):
                    recorder.done(outcome(attempt(), used=Tokens(10, 0, 5)))
                recorder.done(outcome(attempt(status=500), status=500))
                await until(lambda: "gen_ai.server.request.duration" in collector.metrics)
                assert recorder.sample_ratio == 0.0
        points = collector.metrics["gen_ai.server.request.duration"].histogram.data_points
        by_error = {attributes(p.attributes)["error.type"]: p for p in points}
        assert by_error[""].count == 5
        assert sum(by_error[""].bucket_counts) == 5
        assert by_error[""].sum == pytest.approx(2.5, rel=0.01)
        assert not by_error[""].HasField("min")
        assert tuple(by_error[""].explicit_bounds) == names.DURATION_BUCKETS_S
        errors = collector.metrics["nearfield.errors"].sum
        assert errors.is_monotonic
        assert errors.data_points[0].as_int == 1

    @pytest.mark.parametrize(
        ("environ", "ratio"),
        [
            ({}, 1.0),
            ({"OTEL_TRACES_SAMPLER": "always_off"}, 0.0),
            ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, 0.0),
            ({"OTEL_TRACES_SAMPLER": "always_on"}, 1.0),
            ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"}, 0.1),
            ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}, 1.0),
            ({"OTEL_TRACES_EXPORTER": "none"}, 0.0),
            ({"OTEL_SDK_DISABLED": "true"}, 0.0),
        ],
    )
    def test_sampling_follows_the_standard_variables(
        self, environ: dict[str, str], ratio: float
    ) -> None:
        assert sample_ratio({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", **environ}) == ratio
        assert sample_ratio(environ) == 0.0


async def test_a_collector_that_is_gone_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="opentelemetry")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    async with recording(environ=os.environ) as recorder:
        started_s = time.monotonic()
        for _ in range(500):
            recorder.done(outcome(attempt(), sampled=True))
        await asyncio.sleep(0)
        assert time.monotonic() - started_s < 5
    assert len(recorder.recent.latest(9999)) == 500
