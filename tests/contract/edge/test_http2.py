"""HTTP/2 at the gateway: what HTTP/1.1 does, many at once, bounded both ways."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.tls import Certificates

from tests.contract.edge.test_forwarding import Guard, Own
from tests.support.certificates import trusting_nobody, write_certificate
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
from tests.support.http2 import JSON, PREFACE, peer, request

pytestmark = pytest.mark.asyncio(loop_scope="module")

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
BODY = b'{"model": "chat"}'


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


# ---- requests and answers -----------------------------------------------------------------------


async def test_a_request(proxy: Forwarding) -> None:
    client = await peer(proxy)
    found = await client.ask(request(b"POST", CHAT.encode(), JSON, (b"x-mine", b"1")), BODY)
    told = found.json()
    assert (found.status, told["method"], told["target"]) == (200, "POST", CHAT)
    assert told["body"].encode() == BODY
    assert told["headers"]["content-type"] == "application/json"
    assert told["headers"]["x-mine"] == "1"
    assert found.headers["content-type"] == "a/b"
    assert found.headers["content-length"] == str(len(found.body))
    outcome = proxy.outcome
    assert (outcome.status, outcome.request.model, outcome.request.peer) == (
        200,
        "chat",
        "127.0.0.1",
    )
    assert outcome.request.headers[b"host"] == b"x"


async def test_ids_traces_and_secrets_are_as_in_http1(proxy: Forwarding) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    client = await peer(proxy)
    found = await client.ask(
        request(
            b"POST",
            CHAT.encode(),
            JSON,
            (b"x-request-id", b"mine-1"),
            (b"traceparent", parent.encode()),
            (b"authorization", b"Bearer nf_secret"),
            (b"x-nearfield-passport", b"forged"),
            (b"cookie", b"a=1"),
            (b"cookie", b"b=2"),
            (b"te", b"trailers"),
            (b"accept", b"a"),
            (b"accept", b"b"),
            (b"x-request-timeout-ms", b"5000"),
        ),
        BODY,
    )
    passed = found.json()["headers"]
    assert found.headers["x-request-id"] == passed["x-request-id"] == "mine-1"
    assert passed["traceparent"].startswith(parent[:36])
    assert passed["accept"] == "a, b"
    assert not {"authorization", "x-nearfield-passport", "cookie", "te"} & passed.keys()
    assert 4000 < int(passed["x-request-timeout-ms"]) <= 5000
    assert proxy.outcome.request.headers[b"cookie"] == b"a=1; b=2"


async def test_errors_in_each_dialect(proxy: Forwarding) -> None:
    client = await peer(proxy)
    found = await client.ask(request(b"POST", CHAT.encode(), JSON), b"[]")
    assert (found.status, found.json()["error"]["code"]) == (400, "invalid_json")
    found = await client.ask(
        request(b"POST", b"/v2/models/m/infer", (b"x-request-timeout-ms", b"soon")), b""
    )
    assert (found.status, list(found.json())) == (400, ["error"])
    assert isinstance(found.json()["error"], str)


@pytest.mark.parametrize("method", [b"HEAD", b"GET"])
async def test_answers_without_a_body(upstream: Upstream, proxy: Forwarding, method: bytes) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        length = 5 if heard.method == "HEAD" else 0
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % length)

    upstream.handler = handler
    client = await peer(proxy)
    for _ in range(3):
        found = await client.ask(request(method, b"/v1/models"))
        assert (found.status, found.body, found.ended) == (200, b"", True)
    assert proxy.outcome.attempts[0].reused


async def test_many_at_once_on_one_connection(upstream: Upstream, proxy: Forwarding) -> None:
    go_on = asyncio.Event()

    async def slow(heard: Heard, reader: Reader, writer: Writer) -> None:
        if json.loads(heard.body)["n"] == 0:
            await go_on.wait()
        await upstream.echo(heard, reader, writer)

    upstream.handler = slow
    client = await peer(proxy)
    numbers = [
        client.send(
            request(b"POST", CHAT.encode(), JSON), json.dumps({"model": "chat", "n": n}).encode()
        )
        for n in range(50)
    ]
    for n, number in list(enumerate(numbers))[1:]:
        found = await client.reply(number)
        assert json.loads(found.json()["body"])["n"] == n
    assert not client.replies[numbers[0]].ended
    go_on.set()
    assert (await client.reply(numbers[0])).status == 200
    assert len(proxy.proxy.clients) == 1


async def test_events_pass_as_they_come(upstream: Upstream, proxy: Forwarding) -> None:
    go_on = asyncio.Event()

    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(STREAM + chunk(b"data: 1\n\n"))
        await go_on.wait()
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    upstream.handler = handler
    client = await peer(proxy)
    number = client.send(request(b"POST", CHAT.encode(), JSON), BODY)
    await client.until(number, b"data: 1\n\n")
    go_on.set()
    found = await client.reply(number)
    assert found.body == b"data: 1\n\ndata: [DONE]\n\n"
    assert found.headers["content-type"] == "text/event-stream"
    assert "content-length" not in found.headers
    assert "transfer-encoding" not in found.headers


async def test_a_stream_that_breaks_off_says_so(upstream: Upstream, proxy: Forwarding) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        if heard.target == "/v1/stream":
            writer.write(STREAM + chunk(b"data: 1\n\n"))
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        await writer.drain()
        writer.transport.abort()

    upstream.handler = handler
    client = await peer(proxy)
    found = await client.ask(request(b"POST", b"/v1/stream", JSON), BODY)
    assert found.body.startswith(b'data: 1\n\ndata: {"error":')
    found = await client.ask(request(b"POST", CHAT.encode(), JSON), BODY)
    assert (found.status, found.reset) == (200, ErrorCodes.INTERNAL_ERROR)
    assert not client.closed


async def test_a_client_that_cancels_stops_the_upstream(upstream: Upstream) -> None:
    async def endless(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(STREAM + chunk(b"data: 1\n\n"))
        await upstream.gone(reader)

    upstream.handler = endless
    upstream.left.clear()
    async with forwarding([upstream.target]) as proxy:
        client = await peer(proxy)
        number = client.send(request(b"POST", CHAT.encode(), JSON), BODY)
        await client.until(number, b"data: 1\n\n")
        client.cancel(number)
        async with asyncio.timeout(5):
            await upstream.left.wait()
        assert proxy.outcome.error == "cancelled"
        upstream.handler = upstream.echo
        assert (await client.ask(request(b"POST", CHAT.encode(), JSON), BODY)).status == 200


async def test_a_client_that_leaves(upstream: Upstream) -> None:
    async def never(heard: Heard, reader: Reader, writer: Writer) -> None:
        await upstream.gone(reader)

    upstream.handler = never
    async with forwarding([upstream.target]) as proxy:
        client = await peer(proxy)
        for _ in range(3):
            client.send(request(b"POST", CHAT.encode(), JSON), BODY)
        await until(lambda: len(proxy.proxy.live) == 3)
        client.writer.transport.abort()
        await until(lambda: len(proxy.recorder.outcomes) == 3)
        assert {outcome.error for outcome in proxy.recorder.outcomes} == {"cancelled"}


async def test_a_deadline(upstream: Upstream, proxy: Forwarding) -> None:
    async def never(heard: Heard, reader: Reader, writer: Writer) -> None:
        await upstream.gone(reader)

    upstream.handler = never
    client = await peer(proxy)
    found = await client.ask(
        request(b"POST", CHAT.encode(), JSON, (b"x-request-timeout-ms", b"50")), BODY
    )
    assert found.status == 504


async def test_a_gate(upstream: Upstream) -> None:
    upstream.handler = upstream.echo
    async with forwarding([upstream.target], gate=Guard()) as proxy:  # type: ignore[arg-type]
        client = await peer(proxy)
        head = request(b"POST", CHAT.encode(), JSON)
        found = await client.reply(client.open([*head, (b"content-length", b"5000")]))
        assert (found.status, found.headers["www-authenticate"]) == (401, "Bearer")
        # The body was not waited for, and its sender is told; the connection goes on.
        found = await client.ask([*head, (b"authorization", b"Bearer good")], BODY)
        assert found.json()["headers"]["x-nearfield-passport"] == "signed"
        assert found.headers["x-ratelimit-remaining-requests"] == "9"


async def test_a_stranger_s_body_is_not_read(upstream: Upstream) -> None:
    async with forwarding([upstream.target], gate=Guard()) as proxy:  # type: ignore[arg-type]
        client = await peer(proxy)
        number = client.open(request(b"POST", CHAT.encode(), JSON))
        found = await client.reply(number)
        assert found.status == 401
        assert proxy.proxy.held_bytes == 0
        while found.reset is None:
            assert await client.read()
        assert found.reset == ErrorCodes.NO_ERROR


async def test_pages_and_feeds(upstream: Upstream) -> None:
    pages = Own()
    async with forwarding([], gate=pages, pages=pages) as proxy:
        client = await peer(proxy)
        found = await client.ask(request(b"GET", b"/healthz"))
        assert (found.status, found.body, found.headers["content-length"]) == (200, b"ok", "2")
        assert (await client.ask(request(b"HEAD", b"/healthz"))).body == b""
        assert (await client.ask(request(b"GET", b"/later"))).status == 204
        number = client.send(request(b"GET", b"/feed"))
        await client.until(number, b"data: open\n\n")
        assert pages.ticks.line is not None
        pages.ticks.line.send(b"data: 1\n\n")
        pages.ticks.line.end()
        assert (await client.reply(number)).body == b"data: open\n\ndata: 1\n\n"
        assert pages.ticks.closes == 1


async def test_expect_continue(proxy: Forwarding) -> None:
    client = await peer(proxy)
    number = client.open(request(b"POST", CHAT.encode(), JSON, (b"expect", b"100-continue")))
    while not client.replies[number].informed:
        assert await client.read()
    client.send_data(number, BODY, end=True)
    assert (await client.reply(number)).status == 200


async def test_trailers_of_a_request_are_not_passed_on(proxy: Forwarding) -> None:
    client = await peer(proxy)
    number = client.open(request(b"POST", CHAT.encode(), JSON))
    client.wire.send_data(number, BODY)
    client.wire.send_headers(number, [(b"authorization", b"forged")], end_stream=True)
    client.flush()
    told = (await client.reply(number)).json()
    assert told["body"].encode() == BODY
    assert "authorization" not in told["headers"]


# ---- windows and bounds -------------------------------------------------------------------------


async def test_a_large_body_both_ways(upstream: Upstream) -> None:
    upstream.handler = upstream.echo
    async with forwarding([upstream.target], limits=Limits(max_body_bytes=10**7)) as proxy:
        client = await peer(proxy)
        body = b'{"model":"chat","x":"%b"}' % (b"a" * 3_000_000)
        number = client.open(request(b"POST", CHAT.encode(), JSON))
        at = 0
        while at < len(body):
            room = min(client.wire.local_flow_control_window(number), 16384, len(body) - at)
            if room == 0:
                client.flush()
                assert await client.read()
                continue
            client.wire.send_data(number, body[at : at + room])
            at += room
        client.wire.end_stream(number)
        client.flush()
        assert (await client.reply(number)).json()["body"].encode() == body
        assert proxy.proxy.held_bytes == 0


async def test_a_body_that_is_too_large(proxy: Forwarding) -> None:
    client = await peer(proxy)
    found = await client.ask(request(b"POST", CHAT.encode(), JSON, (b"content-length", b"1000001")))
    assert found.status == 413


async def test_a_body_that_turns_out_too_large(upstream: Upstream) -> None:
    limits = Limits(max_body_bytes=1000)
    async with forwarding([upstream.target], limits=limits) as proxy:
        client = await peer(proxy)
        found = await client.ask(request(b"POST", CHAT.encode(), JSON), b"x" * 2000)
        assert found.status == 413
        assert proxy.recorder.refused == {"payload_too_large": 1}
        assert proxy.proxy.held_bytes == 0


async def test_memory_of_all_bodies(upstream: Upstream) -> None:
    upstream.handler = upstream.echo
    limits = Limits(max_body_bytes=1000, max_held_bytes=1500)
    async with forwarding([upstream.target], limits=limits) as proxy:
        client = await peer(proxy)
        first, second = (client.open(request(b"POST", CHAT.encode(), JSON)) for _ in range(2))
        for number in (first, second):
            client.send_data(number, b" " * 800)
        found = await client.reply(second)
        assert (found.status, found.headers["retry-after"]) == (503, "1")
        client.send_data(first, BODY, end=True)
        assert (await client.reply(first)).status == 200
        assert proxy.proxy.held_bytes == 0


async def test_a_client_that_opens_no_window_stops_the_upstream(upstream: Upstream) -> None:
    """And is cut off from that stream when it has not for long; others go on meanwhile."""
    sent = 0

    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        nonlocal sent
        if heard.target != "/v1/stream":
            await upstream.echo(heard, reader, writer)
            return
        writer.write(STREAM)
        writer.transport.set_write_buffer_limits(high=10_000)
        while True:
            writer.write(chunk(b"data: " + b"x" * 10_000 + b"\n\n"))
            await writer.drain()
            sent += 10_000

    upstream.handler = handler
    async with forwarding([upstream.target], limits=Limits(stall_s=0.6)) as proxy:
        client = await peer(proxy)
        client.acknowledge = False
        number = client.send(request(b"POST", b"/v1/stream", JSON), BODY)
        other = None
        while client.replies[number].reset is None:
            assert await client.read()
            if other is None and len(client.replies[number].body) >= 65_535:
                client.wire.increment_flow_control_window(100_000)  # the connection's alone
                other = client.send(request(b"POST", CHAT.encode(), JSON), BODY)
        assert client.replies[number].reset == ErrorCodes.CANCEL
        assert other is not None
        assert (await client.reply(other)).status == 200
        assert sent < 10_000_000
        assert "cancelled" in {outcome.error for outcome in proxy.recorder.outcomes}


async def test_windows_that_open_one_by_one(upstream: Upstream, proxy: Forwarding) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(answer(b"0123456789" * 20))

    upstream.handler = handler
    client = await peer(proxy)
    client.wire.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 7})
    client.flush()
    found = await client.ask(request(b"GET", b"/v1/models"))
    assert found.body == b"0123456789" * 20


async def test_a_frozen_reader_is_cut_off(upstream: Upstream) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(STREAM)
        while True:
            writer.write(chunk(b"data: " + b"x" * 100_000 + b"\n\n"))
            await writer.drain()

    upstream.handler = handler
    async with forwarding([upstream.target], limits=Limits(stall_s=0.4)) as proxy:
        client = await peer(proxy, limit=1000)
        client.wire.increment_flow_control_window(2**30)
        client.wire.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**30})
        client.flush()
        client.send(request(b"GET", b"/v1/models"))
        client.writer.transport.pause_reading()
        await until(lambda: not proxy.proxy.clients)
        assert proxy.outcome.error == "cancelled"


async def test_more_streams_than_may_be(upstream: Upstream) -> None:
    async def never(heard: Heard, reader: Reader, writer: Writer) -> None:
        await upstream.gone(reader)

    upstream.handler = never
    async with forwarding([upstream.target], limits=Limits(max_streams=3)) as proxy:
        client = await peer(proxy)
        for _ in range(4):
            client.send(request(b"POST", CHAT.encode(), JSON), BODY)  # before it is told
        await client.rest()
        assert client.goodbyes == [(5, ErrorCodes.PROTOCOL_ERROR)]
        await until(lambda: not proxy.proxy.live)


# ---- the connection -----------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 3, 10, 18, 20, 30])
async def test_prior_knowledge_however_it_arrives(proxy: Forwarding, cut: int) -> None:
    client = await peer(proxy, greet=False)
    client.wire.initiate_connection()
    raw = client.wire.data_to_send()
    client.writer.write(raw[:cut])
    await client.writer.drain()
    await asyncio.sleep(0.005)
    client.writer.write(raw[cut:])
    assert (await client.ask(request(b"GET", b"/v1/models"))).status == 200


async def test_a_preface_after_a_request_is_refused(proxy: Forwarding) -> None:
    client = await proxy.client()
    client.send(post())
    assert (await client.answer()).status == 200
    client.send(PREFACE)
    found = await client.answer("GET")
    assert (found.status, found.headers["connection"]) == (505, "close")


async def test_http1_is_spoken_on_the_same_port(proxy: Forwarding) -> None:
    assert (await (await peer(proxy)).ask(request(b"GET", b"/v1/models"))).status == 200
    assert (await proxy.ask(get(), "GET")).status == 200


async def test_alpn(upstream: Upstream, tmp_path: Path) -> None:
    upstream.handler = upstream.echo
    certificates = Certificates(write_certificate(tmp_path, "localhost"))
    async with forwarding([upstream.target], tls=certificates.context) as proxy:
        for offered, chosen in ((["h2", "http/1.1"], "h2"), (["http/1.1"], "http/1.1")):
            context = trusting_nobody()
            context.set_alpn_protocols(offered)
            client = await peer(proxy, greet=False, ssl=context, server_hostname="localhost")
            tls: ssl.SSLObject = client.writer.get_extra_info("ssl_object")
            assert tls.selected_alpn_protocol() == chosen
            if chosen == "h2":
                client.greet()
                found = await client.ask(request(b"POST", CHAT.encode(), JSON), BODY)
                assert found.json()["body"].encode() == BODY
        # Who has not agreed on HTTP/2 in the handshake does not get it behind the handshake.
        client = await peer(proxy, greet=False, ssl=trusting_nobody())
        client.writer.write(PREFACE)
        assert (await client.reader.read(100)).startswith(b"HTTP/1.1 505")


async def test_a_real_client(upstream: Upstream, tmp_path: Path) -> None:
    upstream.handler = upstream.echo
    files = write_certificate(tmp_path, "localhost")
    async with forwarding([upstream.target], tls=Certificates(files).context) as proxy:
        trusted = ssl.create_default_context(cafile=str(files.chain))
        url = f"https://localhost:{proxy.address[1]}"
        async with httpx.AsyncClient(http2=True, verify=trusted, base_url=url) as client:
            asked = [client.post(CHAT, json={"model": "chat", "n": n}) for n in range(20)]
            for n, found in enumerate(await asyncio.gather(*asked)):
                assert (found.status_code, found.http_version) == (200, "HTTP/2")
                assert json.loads(found.json()["body"])["n"] == n
        assert len({id(o.request.peer) for o in proxy.recorder.outcomes})


async def test_a_client_that_says_goodbye_gets_its_answers(upstream: Upstream) -> None:
    go_on = asyncio.Event()

    async def slow(heard: Heard, reader: Reader, writer: Writer) -> None:
        await go_on.wait()
        await upstream.echo(heard, reader, writer)

    upstream.handler = slow
    async with forwarding([upstream.target]) as proxy:
        client = await peer(proxy)
        number = client.send(request(b"POST", CHAT.encode(), JSON), BODY)
        await until(lambda: len(proxy.proxy.live) == 1)
        client.raw(GoAwayFrame(0, last_stream_id=0))
        await client.writer.drain()
        await asyncio.sleep(0.02)
        assert len(proxy.proxy.live) == 1
        go_on.set()
        assert (await client.reply(number)).status == 200
        await client.rest()


async def test_between_requests(upstream: Upstream) -> None:
    upstream.handler = upstream.echo
    async with forwarding([upstream.target], limits=Limits(idle_s=0.1)) as proxy:
        client = await peer(proxy)
        assert (await client.ask(request(b"GET", b"/v1/models"))).status == 200
        await client.rest()
        assert client.goodbyes == [(1, ErrorCodes.NO_ERROR)]


async def test_draining_finishes_what_was_accepted(upstream: Upstream) -> None:
    go_on = asyncio.Event()

    async def slow(heard: Heard, reader: Reader, writer: Writer) -> None:
        await go_on.wait()
        await upstream.echo(heard, reader, writer)

    upstream.handler = slow
    limits = Limits(drain_idle_s=0.2)
    async with forwarding([upstream.target], limits=limits) as proxy:
        client = await peer(proxy)
        number = client.send(request(b"POST", CHAT.encode(), JSON), BODY)
        await until(lambda: len(proxy.proxy.live) == 1)
        drained = asyncio.ensure_future(proxy.listener.drain(5))
        # What runs may end before the client is told: many give up their answers when they are.
        while not client.goodbyes:
            assert await client.read()
        late = client.send(request(b"GET", b"/v1/late"))
        while len(client.goodbyes) < 2:
            assert await client.read()
        assert client.goodbyes == [(2**31 - 1, 0), (late, 0)]
        too_late = client.send(request(b"GET", b"/v1/later"))
        assert (await client.reply(too_late)).reset == ErrorCodes.REFUSED_STREAM
        go_on.set()
        for each in (number, late):
            assert (await client.reply(each)).status == 200
        await client.rest()
        assert await drained == 0
        assert {outcome.status for outcome in proxy.recorder.outcomes} == {200}


async def test_idle_connections_do_not_hold_up_draining(upstream: Upstream) -> None:
    upstream.handler = upstream.echo
    async with forwarding([upstream.target], limits=Limits(drain_idle_s=0.1)) as proxy:
        client = await peer(proxy)
        assert (await client.ask(request(b"GET", b"/v1/models"))).status == 200
        async with asyncio.timeout(2):
            assert await proxy.listener.drain(30) == 0
        await client.rest()
        assert client.goodbyes == [(2**31 - 1, 0), (1, 0)]


async def test_draining_takes_no_longer_than_it_may(upstream: Upstream) -> None:
    async def endless(heard: Heard, reader: Reader, writer: Writer) -> None:
        if heard.target == "/v1/stream":
            writer.write(STREAM + chunk(b"data: 1\n\n"))
        await upstream.gone(reader)

    upstream.handler = endless
    async with forwarding([upstream.target]) as proxy:
        client = await peer(proxy)
        streaming = client.send(request(b"POST", b"/v1/stream", JSON), BODY)
        waiting = client.send(request(b"POST", CHAT.encode(), JSON), BODY)
        await client.until(streaming, b"data: 1\n\n")
        await until(lambda: len(proxy.proxy.live) == 2)
        assert await proxy.listener.drain(0.1) == 2
        await client.rest()
        assert b'data: {"error":' in client.replies[streaming].body
        assert client.replies[waiting].status == 503
