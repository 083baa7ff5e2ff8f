"""What is written down of requests that really pass: over sockets, to a real ledger."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nearfield.api.keys import Principal
from nearfield.edge.decisions import Admission, Routed, Tokens
from nearfield.edge.gate import KeyGate
from nearfield.edge.proxy.ports import Attempt, Gate, Grant, Request, Target
from nearfield.edge.recorder import GatewayRecorder
from nearfield.edge.suspects import Suspects
from nearfield.policy.endpoints import Caller
from nearfield.store.sql import Store

from tests.support.edge import STREAM, Forwarding, Heard, Upstream, answer, chunk, forwarding, post
from tests.support.hosting import until
from tests.support.otlp import attributes, receiver

ACME = Principal("acme", None, "k1", frozenset({"inference"}), None, None)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Reads:
    """A Tap that knows what the answer took."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def on_head(self, *_: Any) -> None: ...
    def on_data(self, *_: Any) -> None: ...
    def on_end(self, *_: Any) -> None:
        self._admission.used = Tokens(7, 2, 3)


class Lets:
    """Lets everybody pass as acme."""

    def enter(self, request: Request) -> None:
        return None

    def admit(self, request: Request) -> Grant:
        key = request.headers.get(b"idempotency-key")
        admission = Admission(ACME, Caller(), "generate", idempotency_key=key)
        return Grant(replayable=True, tap=Reads(admission), about=admission)


class Leads:
    """The first target, then the next; counts nothing."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets

    def pick(self, request: Request, grant: Grant, attempts: Sequence[Attempt]) -> Routed:
        number = min(len(attempts), len(self._targets) - 1)
        return Routed(
            self._targets[number], endpoint=f"r{number}/chat@1/x", region=f"r{number}",
            model="chat", version="1", why="nearest", reason="nearest; 1 ms",
        )  # fmt: skip

    def began(self, attempt: Attempt) -> None: ...
    def ended(self, attempt: Attempt) -> None: ...


@asynccontextmanager
async def recorded(
    recorder: GatewayRecorder, *upstreams: Upstream, gate: Gate | None = None
) -> AsyncIterator[Forwarding]:
    targets = [upstream.target for upstream in upstreams]
    async with forwarding(targets, gate=gate or Lets(), router=Leads(targets)) as running:
        running.proxy.recorder = recorder
        yield running


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


async def test_a_retried_request_is_one_record_one_line_one_trace(
    local: Store, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def drops(heard: Heard, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    bad, good = Upstream(drops), Upstream()
    await bad.start()
    await good.start()
    file = os.open(log, os.O_CREAT | os.O_WRONLY)
    with receiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        async with (
            GatewayRecorder(
                "here", os.environ, ledger=local.ledger, spool=tmp_path / "spool", log_to=file
            ) as recorder,
            recorded(recorder, bad, good) as running,
        ):
            asked = post(traceparent=f"00-{TRACE}-{PARENT}-01", x_request_id="req-7")
            assert (await running.ask(asked)).status == 200
    os.close(file)
    (line,) = lines_of(log)
    assert (line["request_id"], line["attempts"], line["endpoint"]) == ("req-7", 2, "r1/chat@1/x")
    assert (line["trace_id"], line["status"], line["output_tokens"]) == (TRACE, 200, 3)
    (total,) = local.ledger.totals(["region", "outcome"])
    assert (total.group, total.requests, total.input_tokens) == (("r1", "ok"), 1, 7)
    server = collector.span("POST /v1/chat/completions")
    told = [upstream.heard[0].headers["traceparent"].split("-") for upstream in (bad, good)]
    assert [(each[1], each[2]) for each in told] == [(TRACE, server.span_id.hex())] * 2
    assert server.parent_span_id.hex() == PARENT
    tries = sorted(
        (span for span in collector.spans if span.name == "attempt"),
        key=lambda span: span.start_time_unix_nano,
    )
    assert [span.parent_span_id for span in tries] == [server.span_id] * 2
    assert tries[0].end_time_unix_nano <= tries[1].end_time_unix_nano <= server.end_time_unix_nano
    entry = recorder.recent.find("req-7")
    assert entry is not None
    assert [tried.failure for tried in entry.tries] == ["closed", None]
    for upstream in (bad, good):
        await upstream.close()


async def test_a_stream_that_breaks_or_is_left_is_billed_with_how_it_ended(
    local: Store, tmp_path: Path
) -> None:
    async def breaks(heard: Heard, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(b"data: {}\n\n"))
        await writer.drain()
        if heard.headers["x-do"] == "break":
            writer.close()
        else:
            await upstream.gone(_)

    upstream = Upstream(breaks)
    await upstream.start()
    async with (
        GatewayRecorder(
            "here", {}, ledger=local.ledger, spool=tmp_path / "spool", log_to=None
        ) as recorder,
        recorded(recorder, upstream) as running,
    ):
        stream = {"model": "chat", "stream": True}
        await running.ask(post(stream, x_do="break"))
        leaving = await running.client()
        leaving.send(post(stream, x_do="wait"))
        await leaving.until(b"data: {}\n\n")
        leaving.reset()
        await until(lambda: len(recorder.recent.latest(9)) == 2)
    totals = local.ledger.totals(["outcome"])
    assert [(total.group[0], total.requests) for total in totals] == [
        ("cancelled", 1), ("upstream_failed", 1)
    ]  # fmt: skip
    await upstream.close()


async def test_a_stream_that_ends_with_an_error_event_is_no_success(
    local: Store, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head said 200: record, metric, line and span tell what became of it."""
    text = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
    error = b'{"message":"It died.","type":"server_error","param":null,"code":"engine_crashed"}'
    last = b'data: {"error":%b}\n\n' % error

    async def breaks(heard: Heard, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(text) * 12 + chunk(last) + b"0\r\n\r\n")

    upstream = Upstream(breaks)
    await upstream.start()
    file = os.open(log, os.O_CREAT | os.O_WRONLY)
    with receiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        async with (
            GatewayRecorder(
                "here", os.environ, ledger=local.ledger, spool=tmp_path / "spool", log_to=file
            ) as recorder,
            recorded(recorder, upstream, gate=KeyGate(Suspects())) as running,
        ):
            asked = post({"model": "chat", "stream": True}, traceparent=f"00-{TRACE}-{PARENT}-01")
            answered = await running.ask(asked)
            assert (answered.status, answered.body) == (200, text * 12 + last)
            page = recorder.prometheus_page().decode()
    os.close(file)
    (total,) = local.ledger.totals(["outcome"])
    assert (total.group, total.output_tokens) == (("engine_crashed",), 11)
    (counted,) = [each for each in page.splitlines() if each.startswith("nearfield_errors_total{")]
    assert 'error_type="engine_crashed"' in counted
    (line,) = lines_of(log)
    assert (line["level"], line["code"], line["status"]) == ("error", "engine_crashed", 200)
    span = collector.span("POST /v1/chat/completions")
    assert attributes(span.attributes)["error.type"] == "engine_crashed"
    assert span.status.code == span.status.STATUS_CODE_ERROR
    await upstream.close()


async def test_many_at_once_are_all_there(local: Store, tmp_path: Path, log: Path) -> None:
    async def answers(heard: Heard, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"{}", content_type="application/json"))

    upstream = Upstream(answers)
    await upstream.start()
    file = os.open(log, os.O_CREAT | os.O_WRONLY)
    async with (
        GatewayRecorder(
            "here", {}, ledger=local.ledger, spool=tmp_path / "spool", log_to=file
        ) as recorder,
        recorded(recorder, upstream) as running,
    ):

        async def client() -> None:
            one = await running.client()
            for _ in range(20):
                one.send(post(x_request_id="the-same"))
                assert (await one.answer()).status == 200
            one.close()

        await asyncio.gather(*(client() for _ in range(10)))
    os.close(file)
    assert local.ledger.totals([])[0].requests == 200
    assert len(lines_of(log)) == 200
    await upstream.close()
