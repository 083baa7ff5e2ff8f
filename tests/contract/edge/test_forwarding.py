"""What passes through the forwarding path, and how: bytes, headers, connections, streams."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import uvloop
from nearfield.core.errors import RateLimited, Unauthenticated
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.plain import OpenGate, Spread
from nearfield.edge.proxy.ports import (
    Answer,
    Feed,
    Grant,
    Leg,
    Line,
    Outcome,
    Page,
    Request,
    Target,
)

from tests.support.edge import (
    CHAT,
    STREAM,
    Forwarding,
    Heard,
    Upstream,
    answer,
    chunk,
    forwarding,
    get,
    post,
)
from tests.support.hosting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRACE = "0af7651916cd43dd8448eb211c80319c"
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def upstream() -> AsyncIterator[Upstream]:
    running = Upstream()
    await running.start()
    yield running
    await running.close()


@pytest_asyncio.fixture(loop_scope="module")
async def proxy(upstream: Upstream) -> AsyncIterator[Forwarding]:
    upstream.handler = upstream.echo
    async with forwarding([upstream.target], limits=Limits(max_body_bytes=10**6)) as running:
        yield running


async def test_the_loop_is_the_one_in_production() -> None:
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)


# ---- requests ---------------------------------------------------------------------------------


async def test_a_request(proxy: Forwarding) -> None:
    found = await proxy.ask(post({"model": "chat", "stream": False}))
    told = found.json()
    assert (told["method"], told["target"]) == ("POST", CHAT)
    assert json.loads(told["body"]) == {"model": "chat", "stream": False}
    assert told["headers"]["content-type"] == "application/json"
    assert told["headers"]["host"].startswith("127.0.0.1:")
    assert found.headers["content-type"] == "a/b"
    outcome = proxy.outcome
    assert (outcome.status, outcome.error, outcome.request.model) == (200, None, "chat")
    assert outcome.body_bytes == len(found.body)
    assert outcome.first_byte_s is not None
    (attempt,) = outcome.attempts
    assert (attempt.status, attempt.failure, attempt.reused) == (200, None, False)


@pytest.mark.parametrize(
    ("target", "path", "model", "dialect"),
    [
        ("/v1/chat/completions?a=b", "/v1/chat/completions?a=b", None, "openai"),
        ("/chat/v1/models", "/v1/models", "chat", "openai"),
        ("/chat/v1?x=/v2/", "/v1?x=/v2/", "chat", "openai"),
        ("/chat-2.1_b/v2/models/chat/infer", "/v2/models/chat/infer", "chat-2.1_b", "oip"),
        ("/v2/models/a-1/versions/3/infer", "/v2/models/a-1/versions/3/infer", "a-1", "oip"),
        ("/v2", "/v2", None, "oip"),
        ("/v2/health/ready", "/v2/health/ready", None, "oip"),
        ("/v20/x", "/v20/x", None, "openai"),
        ("/a/b/v1/models", "/a/b/v1/models", None, "openai"),
        ("/", "/", None, "openai"),
    ],
)  # fmt: skip
async def test_the_model_in_a_path(
    proxy: Forwarding, target: str, path: str, model: str | None, dialect: str
) -> None:
    found = await proxy.ask(get(target), "GET")
    assert found.json()["target"] == path
    request = proxy.outcome.request
    assert (request.model, request.dialect) == (model, dialect)


async def test_the_path_names_the_model_and_not_the_body(proxy: Forwarding) -> None:
    await proxy.ask(post({"model": "other", "stream": True, "max_tokens": 7}, "/chat" + CHAT))
    request = proxy.outcome.request
    assert (request.model, request.stream, request.max_tokens) == ("chat", True, 7)


async def test_the_last_of_two_models_in_a_body_counts(proxy: Forwarding) -> None:
    """As in the replica's parser: what is admitted is what is run."""
    await proxy.ask(post(b'{"model": "a", "messages": [{"model": "b"}], "model": "c"}'))
    assert proxy.outcome.request.model == "c"


async def test_a_file_is_no_json(proxy: Forwarding) -> None:
    raw = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
    found = await proxy.ask(raw + b"Content-Length: 3\r\n\r\n{{{")
    assert found.json()["body"] == "{{{"


async def test_headers_that_belong_to_one_hop_are_not_passed_on(proxy: Forwarding) -> None:
    found = await proxy.ask(
        post(
            connection="close, x-mine",
            x_mine="1",
            keep_alive="timeout=5",
            te="trailers",
            proxy_authorization="Basic x",
            upgrade_insecure_requests="1",
        )
    )
    passed = found.json()["headers"]
    assert passed.keys() == {
        "host", "content-type", "content-length", "upgrade-insecure-requests", "x-request-id",
        "traceparent", "x-request-timeout-ms",
    }  # fmt: skip


async def test_what_only_gateways_may_say_is_taken_from_clients(proxy: Forwarding) -> None:
    found = await proxy.ask(
        post(
            authorization="Bearer nf_secret",
            cookie="session=1",
            x_api_key="secret",
            x_nearfield_passport="forged",
            X_Nearfield_Tenant="forged",
            x_forwarded_for="6.6.6.6",
            forwarded="for=6.6.6.6",
            accept="a/b",
        )
    )
    passed = found.json()["headers"]
    assert "accept" in passed
    assert not [name for name in passed if "forward" in name or "nearfield" in name]
    assert not {"authorization", "cookie", "x-api-key"} & passed.keys()


async def test_repeated_fields_are_joined(proxy: Forwarding) -> None:
    raw = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAccept: a\r\nAccept: b \r\nX:\t c\t\r\n\r\n"
    passed = (await proxy.ask(raw, "GET")).json()["headers"]
    assert (passed["accept"], passed["x"]) == ("a, b", "c")


async def test_a_new_id_and_a_new_trace(proxy: Forwarding) -> None:
    found = await proxy.ask(post())
    passed = found.json()["headers"]
    assert re.fullmatch("req-[0-9a-f]{24}", passed["x-request-id"])
    assert found.headers["x-request-id"] == passed["x-request-id"]
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-00", passed["traceparent"])


async def test_the_callers_id_and_trace(proxy: Forwarding) -> None:
    parent = f"00-{TRACE}-b7ad6b7169203331-01"
    found = await proxy.ask(post(x_request_id="mine-1", traceparent=parent, tracestate="a=b"))
    passed = found.json()["headers"]
    assert found.headers["x-request-id"] == passed["x-request-id"] == "mine-1"
    version, trace, span, flags = passed["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span != "b7ad6b7169203331"
    assert passed["tracestate"] == "a=b"
    told = proxy.outcome.request.trace
    assert (told.trace_id, told.parent_id) == (TRACE.encode(), b"b7ad6b7169203331")
    assert (told.span_id, told.sampled) == (span.encode(), True)


@pytest.mark.parametrize(
    "headers",
    [
        {"x_request_id": "a b", "traceparent": f"00-{'0' * 32}-b7ad6b7169203331-01"},
        {"x_request_id": "a" * 129, "traceparent": f"ff-{TRACE}-b7ad6b7169203331-01"},
        {"x_request_id": "ä", "traceparent": f"00-{TRACE.upper()}-b7ad6b7169203331-01"},
        {"x_request_id": "", "traceparent": "00-1-2-3"},
    ],
)
async def test_ids_that_cannot_be_believed(proxy: Forwarding, headers: dict[str, str]) -> None:
    passed = (await proxy.ask(post(**headers))).json()["headers"]
    assert passed["x-request-id"].startswith("req-")
    assert TRACE not in passed["traceparent"].lower()
    assert "0" * 32 not in passed["traceparent"]


async def test_the_time_that_is_left_is_passed_on(proxy: Forwarding) -> None:
    found = await proxy.ask(post(x_request_timeout_ms="5000"))
    assert 4000 < int(found.json()["headers"]["x-request-timeout-ms"]) <= 5000
    found = await proxy.ask(post())
    assert 590_000 < int(found.json()["headers"]["x-request-timeout-ms"]) <= 600_000


async def test_a_chunked_body_with_trailers(proxy: Forwarding) -> None:
    body = b'{"model": "chat", "x": "%b"}' % (b"a" * 5000)
    raw = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw += chunk(body[:1000]) + b"%x;ext=1\r\n%b\r\n" % (len(body) - 1000, body[1000:])
    raw += b"0\r\nAuthorization: forged\r\nX-Trailer: 1\r\n\r\n"
    for cut in (len(raw), 100, 1200, len(raw) - 5):
        client = await proxy.client()
        client.send(raw[:cut])
        await client.writer.drain()
        await asyncio.sleep(0.005)
        client.send(raw[cut:])
        told = (await client.answer()).json()
        assert told["body"].encode() == body
        assert told["headers"]["content-length"] == str(len(body))
        assert not {"x-trailer", "authorization", "transfer-encoding"} & told["headers"].keys()


async def test_a_body_of_a_megabyte_in_pieces(proxy: Forwarding) -> None:
    body = b'{"model":"chat","x":"%b"}' % (b"a" * 900_000)
    client = await proxy.client()
    raw = post(body)
    for at in range(0, len(raw), 50_000):
        client.send(raw[at : at + 50_000])
        await client.writer.drain()
    assert (await client.answer()).json()["body"].encode() == body
    assert proxy.proxy.held_bytes == 0


async def test_every_cut_of_a_request_is_the_same_request(proxy: Forwarding) -> None:
    raw = post({"model": "chat", "n": 1})
    bodies = set()
    for cut in range(1, len(raw), 3):
        client = await proxy.client()
        client.send(raw[:cut])
        await client.writer.drain()
        await asyncio.sleep(0.001)
        client.send(raw[cut:])
        bodies.add((await client.answer()).json()["body"])
        client.close()
    assert len(bodies) == 1


async def test_expect_continue(proxy: Forwarding) -> None:
    head, _, body = post(expect="100-continue").partition(b"\r\n\r\n")
    client = await proxy.client()
    client.send(head + b"\r\n\r\n")
    assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(body)
    found = await client.answer()
    assert found.json()["body"].encode() == body
    assert "expect" not in found.json()["headers"]


async def test_no_continue_for_a_body_that_is_here_already(proxy: Forwarding) -> None:
    client = await proxy.client()
    client.send(post(expect="100-continue"))
    assert (await client.until(b"\r\n")).startswith(b"HTTP/1.1 200")


async def test_no_continue_for_a_body_that_is_too_large(proxy: Forwarding) -> None:
    client = await proxy.client()
    client.send(
        b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9999999\r\n\r\n"
    )
    assert (await client.answer()).status == 413


async def test_an_upgrade_is_not_made(proxy: Forwarding) -> None:
    """curl and Java ask for HTTP/2 like this, with their first request's body."""
    client = await proxy.client()
    for _ in range(2):
        client.send(
            post(connection="Upgrade, HTTP2-Settings", upgrade="h2c", http2_settings="AAMAAABkAAQ")
        )
        found = await client.answer()
        assert found.status == 200
        assert not {"upgrade", "http2-settings"} & found.json()["headers"].keys()


# ---- connections ------------------------------------------------------------------------------


async def test_connections_are_kept_on_both_sides(proxy: Forwarding) -> None:
    client = await proxy.client()
    numbers = set()
    for _ in range(20):
        client.send(post())
        numbers.add((await client.answer()).json()["connection"])
    assert len(numbers) == 1
    assert proxy.outcome.attempts[0].reused


async def test_pipelined_requests_are_answered_in_order(proxy: Forwarding) -> None:
    client = await proxy.client()
    client.send(b"".join(post({"model": "chat", "n": n}) for n in range(30)))
    for n in range(30):
        assert json.loads((await client.answer()).json()["body"])["n"] == n


async def test_pipelined_after_chunks_is_asked_again(proxy: Forwarding) -> None:
    """Where a chunked body ends is llhttp's word alone: nothing after it is believed."""
    client = await proxy.client()
    raw = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    client.send(raw + chunk(b'{"model": "chat"}') + b"0\r\n\r\n" + get("/v1/second"))
    found = await client.answer()
    assert (found.status, found.headers["connection"]) == (200, "close")
    assert await client.rest() == b""


@pytest.mark.parametrize(
    ("line", "connection", "kept"),
    [
        ("HTTP/1.1", "", True),
        ("HTTP/1.1", "Keep-Alive", True),
        ("HTTP/1.1", "close", False),
        ("HTTP/1.1", "keep-alive, Close", False),
        ("HTTP/1.0", "", False),
        ("HTTP/1.0", "keep-alive", True),
    ],
)
async def test_which_connections_are_kept(
    proxy: Forwarding, line: str, connection: str, kept: bool
) -> None:
    client = await proxy.client()
    field = f"Connection: {connection}\r\n" if connection else ""
    client.send(f"GET /v1/models {line}\r\nHost: x\r\n{field}\r\n".encode())
    found = await client.answer("GET")
    assert found.status == 200
    assert (found.headers.get("connection") == "close") == (not kept)
    if kept:
        client.send(get())
        assert (await client.answer("GET")).status == 200
    else:
        assert await client.rest() == b""


async def test_idle_upstream_connections_are_closed_in_time(upstream: Upstream) -> None:
    async with forwarding([upstream.target], limits=Limits(upstream_idle_s=0.1)) as running:
        await running.ask(post())
        assert running.proxy.pools.idle == 1
        await until(lambda: running.proxy.pools.open == 0)
        await until(lambda: upstream.open == 0)


async def test_the_connection_used_last_is_used_first(upstream: Upstream) -> None:
    async def late(heard: Heard, reader: Reader, writer: Writer) -> None:
        await asyncio.sleep(0.02)
        await upstream.echo(heard, reader, writer)

    upstream.handler = late
    async with forwarding([upstream.target]) as running:
        await asyncio.gather(*(running.ask(post()) for _ in range(4)))
        assert running.proxy.pools.idle == 4
        numbers = {(await running.ask(post())).json()["connection"] for _ in range(4)}
        assert len(numbers) == 1


async def test_no_more_idle_connections_than_allowed(upstream: Upstream) -> None:
    async with forwarding([upstream.target], limits=Limits(max_upstream_idle=2)) as running:
        await asyncio.gather(*(running.ask(post()) for _ in range(6)))
        assert running.proxy.pools.idle <= 2
        await until(lambda: running.proxy.pools.open == running.proxy.pools.idle)


# ---- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 400, 404, 422, 500])
async def test_statuses_pass(upstream: Upstream, proxy: Forwarding, status: int) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(answer(b"{}", status, x_mine="1", connection="x-mine, keep-alive"))

    upstream.handler = handler
    found = await proxy.ask(post())
    assert (found.status, found.body) == (status, b"{}")
    assert "x-mine" not in found.headers
    assert proxy.outcome.status == status


@pytest.mark.parametrize(
    ("method", "raw", "length"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n", "500"),
        ("HEAD", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", None),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", None),
        ("GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 500\r\n\r\n", "500"),
        ("GET", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "0"),
    ],
)
async def test_answers_without_a_body(
    upstream: Upstream, proxy: Forwarding, method: str, raw: bytes, length: str | None
) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(raw)

    upstream.handler = handler
    client = await proxy.client()
    for _ in range(3):  # and the connections can be used again
        client.send(get(method=method))
        found = await client.answer(method)
        assert (found.body, found.complete) == (b"", True)
        assert found.headers.get("content-length") == length
    assert proxy.outcome.attempts[0].reused


async def test_an_answer_that_ends_with_its_connection(
    upstream: Upstream, proxy: Forwarding
) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\ncontent-type: a/b\r\n\r\nfirst ")
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(b"last")
        writer.close()

    upstream.handler = handler
    client = await proxy.client()
    client.send(get())
    found = await client.answer("GET")
    assert (found.body, found.headers["transfer-encoding"]) == (b"first last", "chunked")
    client.send(b"GET / HTTP/1.0\r\n\r\n")  # no chunks for this one
    found = await client.answer("GET")
    assert (found.body, found.headers.get("transfer-encoding")) == (b"first last", None)


async def test_interim_answers_are_not_passed_on(upstream: Upstream, proxy: Forwarding) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        await upstream.echo(heard, reader, writer)

    upstream.handler = handler
    found = await proxy.ask(post())
    assert found.status == 200
    assert "link" not in found.headers


async def test_fields_that_may_repeat_do(upstream: Upstream, proxy: Forwarding) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n")
        writer.write(b"x-request-id: theirs\r\ncontent-length: 0\r\n\r\n")

    upstream.handler = handler
    client = await proxy.client()
    client.send(post(x_request_id="mine"))
    head = await client.until(b"\r\n\r\n")
    assert head.count(b"set-cookie: ") == 2
    assert head.count(b"x-request-id: ") == head.count(b"x-request-id: mine") == 1


# ---- streams ----------------------------------------------------------------------------------


async def test_events_pass_as_they_come(upstream: Upstream, proxy: Forwarding) -> None:
    go_on = asyncio.Event()

    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(STREAM + chunk(b"data: 1\n\n"))
        await go_on.wait()
        writer.write(chunk(b"data: 2\n\n") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    upstream.handler = handler
    client = await proxy.client()
    client.send(post())
    assert (await client.until(b"data: 1\n\n")).startswith(b"HTTP/1.1 200")
    go_on.set()
    assert await client.until(b"0\r\n\r\n") == (
        b"\r\n9\r\ndata: 2\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    )
    await until(lambda: bool(proxy.recorder.outcomes))
    assert proxy.outcome.body_bytes == 9 + 9 + 14


async def test_an_event_in_pieces_waits_for_its_end(upstream: Upstream, proxy: Forwarding) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(STREAM)
        for piece in (b"data: 1\n\ndata", b": 2", b"\n", b"\ndata: 3\r\n\r\nda", b"ta: 4\n\n"):
            writer.write(chunk(piece))
            await asyncio.sleep(0.005)
        writer.write(chunk(b"data: rest") + b"0\r\n\r\n")

    upstream.handler = handler
    found = await proxy.ask(post())
    assert found.body == b"data: 1\n\ndata: 2\n\ndata: 3\r\n\r\ndata: 4\n\ndata: rest"


async def test_a_client_that_does_not_read_stops_the_upstream(upstream: Upstream) -> None:
    """And is cut off when it has not read for long; its memory is bounded meanwhile."""
    sent = 0

    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        nonlocal sent
        writer.write(STREAM)
        event = b"data: " + b"x" * 10_000 + b"\n\n"
        writer.transport.set_write_buffer_limits(high=10_000)
        while True:
            writer.write(chunk(event))
            await writer.drain()
            sent += len(event)

    upstream.handler = handler
    async with forwarding([upstream.target], limits=Limits(stall_s=1.2)) as running:
        client = await running.client(limit=1000)
        client.send(post())
        await client.until(b"\r\n")
        client.writer.transport.pause_reading()
        await asyncio.sleep(0.3)
        first = sent
        await asyncio.sleep(0.3)
        assert sent == first > 0
        client.writer.transport.resume_reading()
        while sent <= first:
            await client.reader.read(100_000)
        client.writer.transport.pause_reading()
        await until(lambda: upstream.open == 0)
        assert running.outcome.error == "cancelled"
        client.reset()


async def test_a_connection_is_read_again_after_a_slow_client(upstream: Upstream) -> None:
    """Its answer was complete before the client took it: the next request gets it as new."""

    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(answer(b"x" * 200_000))

    upstream.handler = handler
    async with forwarding([upstream.target], limits=Limits(client_buffer_bytes=1000)) as running:
        numbers = upstream.connections
        for _ in range(5):
            slow = await running.client(limit=100)
            slow.writer.transport.pause_reading()
            slow.send(post())
            await until(lambda: running.proxy.pools.idle == 1)
            slow.writer.transport.resume_reading()
            assert len((await slow.answer()).body) == 200_000
        assert upstream.connections <= numbers + 2


async def test_a_slow_client_does_not_hold_up_others(upstream: Upstream) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(STREAM)
        for _ in range(2000):
            writer.write(chunk(b"data: " + b"x" * 1000 + b"\n\n"))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    upstream.handler = handler
    async with forwarding([upstream.target]) as running:
        frozen = await running.client(limit=1000)
        frozen.send(post())
        await frozen.until(b"\r\n")
        frozen.writer.transport.pause_reading()
        found = await running.ask(post())
        assert found.complete
        assert len(found.body) == 2000 * 1008
        frozen.writer.transport.resume_reading()
        size = 0
        while not (data := await frozen.reader.read(100_000)).endswith(b"\r\n0\r\n\r\n"):
            size += len(data)
        assert size + len(data) > 2000 * 1008


# ---- ports ------------------------------------------------------------------------------------


class Guard(OpenGate):
    """Knows one key, adds a passport and limits, and may take its time."""

    def __init__(self, *, later: bool = False) -> None:
        self.later = later
        self.asked: list[str] = []

    def enter(self, request: Request) -> Unauthenticated | None:
        self.asked.append("enter")
        if request.headers.get(b"authorization") != b"Bearer good":
            return Unauthenticated("The key is not known.")
        request.caller = "tenant"
        return None

    def admit(self, request: Request) -> object:  # type: ignore[override]
        self.asked.append("admit")
        assert request.caller == "tenant"
        grant = Grant(
            headers=[(b"x-nearfield-passport", b"signed")],
            shown=[(b"x-ratelimit-remaining-requests", b"9")],
        )
        if request.model == "full":
            return RateLimited("Too many requests.", retry_after_s=2.2, code="rate_limit")
        if not self.later:
            return grant
        future = asyncio.get_running_loop().create_future()
        if request.model != "never":
            asyncio.get_running_loop().call_later(0.02, future.set_result, grant)
        return future


@pytest.mark.parametrize("later", [False, True])
async def test_a_gate(upstream: Upstream, later: bool) -> None:
    upstream.handler = upstream.echo
    guard = Guard(later=later)
    async with forwarding([upstream.target], gate=guard) as running:  # type: ignore[arg-type]
        found = await running.ask(post(authorization="Bearer good"))
        assert found.json()["headers"]["x-nearfield-passport"] == "signed"
        assert found.headers["x-ratelimit-remaining-requests"] == "9"
        found = await running.ask(post({"model": "full"}, authorization="Bearer good"))
        assert (found.status, found.headers["retry-after"]) == (429, "3")
        assert found.error["code"] == running.outcome.error == "rate_limit"
        assert found.headers["x-request-id"] == running.outcome.request.request_id.decode()
        found = await running.ask(post(authorization="Bearer bad"))
        assert (found.status, found.headers["www-authenticate"]) == (401, "Bearer")
        assert found.headers.get("connection") is None  # nothing of it is left to be read
        assert guard.asked == ["enter", "admit", "enter", "admit", "enter"]
        assert len(running.recorder.outcomes) == 3


async def test_a_stranger_s_body_is_not_read(upstream: Upstream) -> None:
    async with forwarding([upstream.target], gate=Guard()) as running:  # type: ignore[arg-type]
        client = await running.client()
        client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n")
        found = await client.answer()
        assert (found.status, found.headers["connection"]) == (401, "close")
        assert running.proxy.held_bytes == 0


async def test_a_gate_that_takes_too_long(upstream: Upstream) -> None:
    guard = Guard(later=True)
    async with forwarding([upstream.target], gate=guard) as running:  # type: ignore[arg-type]
        request = post({"model": "never"}, authorization="Bearer good", x_request_timeout_ms="80")
        assert (await running.ask(request)).status == 504
        client = await running.client()
        client.send(post({"model": "never"}, authorization="Bearer good"))
        await until(lambda: len(running.proxy.live) == 1)
        client.close()
        await until(lambda: len(running.recorder.outcomes) == 2)
        assert running.outcome.error == "cancelled"


class Broken(OpenGate):
    def admit(self, request: Request) -> Grant:
        raise KeyError("secret detail")


class Worse(OpenGate):
    def enter(self, request: Request) -> None:
        raise KeyError("secret detail")


async def test_a_bug_at_the_door_is_one_500(upstream: Upstream) -> None:
    async with forwarding([upstream.target], gate=Worse()) as running:
        found = await running.ask(post())
        assert (found.status, found.error["code"]) == (500, "internal_error")
        assert b"secret" not in found.body


async def test_a_bug_in_a_port_is_one_500(
    upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    async with forwarding([upstream.target], gate=Broken()) as running:
        found = await running.ask(post())
        assert (found.status, found.error["code"]) == (500, "internal_error")
        assert found.headers["x-request-id"] in found.error["message"]
        assert b"secret" not in found.body
        assert "secret detail" in caplog.text
        assert len(running.recorder.outcomes) == 1


class Elsewhere(Spread):
    """Sends to a prefix, with other headers, another path and another body."""

    def pick(self, request: Request, grant: Grant, attempts: object) -> Leg:  # type: ignore[override]
        return Leg(
            self._legs[0].target,
            headers=[(b"x-nearfield-reason", b"nearest")],
            shown=[(b"x-nearfield-endpoint", b"eu/small/cpu")],
            path=b"/v1/other",
            body=b'{"model": "small"}',
        )


async def test_a_router_may_rewrite(upstream: Upstream) -> None:
    upstream.handler = upstream.echo
    target = Target("127.0.0.1", upstream.target.port, prefix=b"/small")
    router = Elsewhere([target])
    async with forwarding([target], router=router) as running:
        found = await running.ask(post())
        told = found.json()
        assert (told["target"], told["body"]) == ("/small/v1/other", '{"model": "small"}')
        assert told["headers"]["x-nearfield-reason"] == "nearest"
        assert found.headers["x-nearfield-endpoint"] == "eu/small/cpu"
    assert set(router.running.values()) == {0}


class Ticks:
    """A feed that the test writes to."""

    def __init__(self) -> None:
        self.line: Line | None = None
        self.closes = 0

    def open(self, line: Line) -> None:
        self.line = line
        line.send(b"data: open\n\n")

    def closed(self) -> None:
        self.closes += 1


class Own(OpenGate):
    """Pages, for which the gate is not asked: one at once, one later, one that goes on."""

    def __init__(self) -> None:
        self.ticks = Ticks()

    def enter(self, request: Request) -> Unauthenticated | None:
        return Unauthenticated("Nobody may.")

    def find(self, request: Request) -> Page | None:
        pages: dict[bytes, Page] = {b"/healthz": self.health, b"/later": self.later}
        pages |= {b"/feed": lambda _: self.ticks, b"/echo": self.echo}
        return pages.get(request.path)

    def health(self, request: Request) -> Answer:
        return Answer(200, b"ok", b"text/plain", [(b"cache-control", b"no-store")])

    def echo(self, request: Request) -> Answer:
        return Answer(200, request.body)

    def later(self, request: Request) -> asyncio.Future[Answer | Feed]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer | Feed] = loop.create_future()
        loop.call_later(0.01, future.set_result, Answer(204))
        return future


@pytest_asyncio.fixture(loop_scope="module")
async def own() -> AsyncIterator[tuple[Forwarding, Own]]:
    pages = Own()
    async with forwarding([], gate=pages, pages=pages) as running:
        yield running, pages


async def test_pages(own: tuple[Forwarding, Own]) -> None:
    proxy, _ = own
    client = await proxy.client()
    for method in ("GET", "HEAD", "GET"):
        client.send(get("/healthz", method))
        found = await client.answer(method)
        assert (found.status, found.headers["content-length"]) == (200, "2")
        assert found.headers["cache-control"] == "no-store"
        assert "date" in found.headers
        assert found.body == (b"" if method == "HEAD" else b"ok")
    client.send(get("/later"))
    assert (await client.answer("GET")).status == 204
    client.send(post(b"not json", "/echo"))
    assert (await client.answer()).body == b"not json"
    client.send(get("/other"))
    assert (await client.answer("GET")).status == 401


async def test_a_feed(own: tuple[Forwarding, Own]) -> None:
    proxy, pages = own
    ticks = pages.ticks
    client = await proxy.client()
    client.send(get("/feed"))
    assert b"text/event-stream" in await client.until(b"data: open\n\n")
    line = ticks.line
    assert line is not None
    assert line.send(b"data: 1\n\n")
    line.end()
    line.end()
    assert not line.send(b"data: 2\n\n")
    assert await client.until(b"0\r\n\r\n") == b"\r\n9\r\ndata: 1\n\n\r\n0\r\n\r\n"
    client.send(get("/healthz"))
    assert (await client.answer("GET")).body == b"ok"
    assert ticks.closes == 1


async def test_a_feed_whose_client_leaves(own: tuple[Forwarding, Own]) -> None:
    proxy, pages = own
    client = await proxy.client()
    client.send(get("/feed"))
    await client.until(b"data: open\n\n")
    client.reset()
    await until(lambda: pages.ticks.closes == 1)
    assert proxy.outcome.error == "cancelled"


async def test_a_feed_whose_client_does_not_keep_up(own: tuple[Forwarding, Own]) -> None:
    proxy, pages = own
    client = await proxy.client(limit=1000)
    client.send(get("/feed"))
    await client.until(b"\r\n")
    client.writer.transport.pause_reading()
    line = pages.ticks.line
    assert line is not None
    sent = 0
    while line.send(b"data: " + b"x" * 10_000 + b"\n\n"):
        sent += 1
        await asyncio.sleep(0)
    assert sent < 2000
    client.reset()


async def test_a_feed_ends_at_its_deadline(own: tuple[Forwarding, Own]) -> None:
    proxy, pages = own
    found = await proxy.ask(get("/feed", x_request_timeout_ms="50"), "GET")
    assert (found.body, found.complete) == (b"data: open\n\n", True)
    assert pages.ticks.closes == 1


class Meter:
    """A tap that notes what it sees."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def on_head(self, status: int, fields: object) -> None:
        self.seen.append(status)

    def on_data(self, data: bytes) -> None:
        self.seen.append(data)

    def on_end(self, outcome: Outcome, complete: bool) -> None:
        self.seen.append(complete)


class Metered(OpenGate):
    def __init__(self) -> None:
        self.meter = Meter()

    def admit(self, request: Request) -> Grant:
        return Grant(tap=self.meter)


async def test_a_tap(upstream: Upstream) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(STREAM + chunk(b"data: 1\n\n"))
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(chunk(b"data: 2\n\n") + b"0\r\n\r\n")

    upstream.handler = handler
    gate = Metered()
    async with forwarding([upstream.target], gate=gate) as running:
        await running.ask(post())
    assert gate.meter.seen == [200, b"data: 1\n\n", b"data: 2\n\n", True]
