"""HTTP/2 that is refused: heads that HTTP/1.1 could not have, frames that lie, and floods.

What is wrong with a request costs its stream or its connection; no upstream sees anything of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from h2.errors import ErrorCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from nearfield.edge.proxy.frames import MAX_ALLOWANCE, Flood, Frames, Patience
from nearfield.edge.proxy.limits import Limits

from tests.support.edge import CHAT, Forwarding, Heard, Upstream, forwarding
from tests.support.hosting import until
from tests.support.http2 import JSON, PREFACE, Fields, Peer, peer, request

pytestmark = pytest.mark.asyncio(loop_scope="module")

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
LIMITS = Limits(
    max_head_bytes=4096, max_headers=20, max_target_bytes=512, max_body_bytes=10_000, linger_s=0.2
)
BODY = b'{"model": "chat"}'
METHOD, PATH, SCHEME, AUTHORITY = b":method", b":path", b":scheme", b":authority"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def upstream() -> AsyncIterator[Upstream]:
    running = Upstream()
    await running.start()
    yield running
    await running.close()


@pytest_asyncio.fixture(loop_scope="module")
async def proxy(upstream: Upstream) -> AsyncIterator[Forwarding]:
    upstream.handler = upstream.echo
    async with forwarding([upstream.target], limits=LIMITS) as running:
        yield running


def changed(name: bytes, value: bytes | None) -> Fields:
    """A well-formed head, one pseudo-header changed or left out."""
    fields = [(n, value if n == name else v) for n, v in request(b"GET", b"/v1/models")]
    return [(n, v) for n, v in fields if v is not None]


def more(*fields: tuple[bytes, bytes]) -> Fields:
    return request(b"GET", b"/v1/models", *fields)


HEADS: dict[str, Fields] = {
    "no method": changed(METHOD, None),
    "no path": changed(PATH, None),
    "no scheme": changed(SCHEME, None),
    "no authority": changed(AUTHORITY, None),
    "another scheme": changed(SCHEME, b"file"),
    "an empty path": changed(PATH, b""),
    "a path without slash": changed(PATH, b"v1"),
    "an asterisk": [(METHOD, b"OPTIONS"), (PATH, b"*"), (SCHEME, b"http"), (AUTHORITY, b"x")],
    "a path that is a URL": changed(PATH, b"http://y/v1"),
    "a path with a space": changed(PATH, b"/v1 HTTP/1.1"),
    "a path with a line end": changed(PATH, b"/v1 HTTP/1.1\r\nHost: y\r\n\r\nGET /v1/smuggled"),
    "a path with a NUL": changed(PATH, b"/v1\0"),
    "a path with dots": changed(PATH, b"/chat/../admin"),
    "a path with encoded dots": changed(PATH, b"/chat/%2e%2e/admin"),
    "a path with a fragment": changed(PATH, b"/v1#x"),
    "a path over 127": changed(PATH, b"/v1/\xc3\xa9"),
    "a long path": changed(PATH, b"/" + b"a" * 600),
    "CONNECT": [(METHOD, b"CONNECT"), (AUTHORITY, b"y:80")],
    "CONNECT with a path": changed(METHOD, b"CONNECT"),
    "CONNECT to a protocol": [
        (METHOD, b"CONNECT"), (b":protocol", b"websocket"), (SCHEME, b"http"), (PATH, b"/v1"),
        (AUTHORITY, b"x"),
    ],
    "TRACE": changed(METHOD, b"TRACE"),
    "a method in lower case": changed(METHOD, b"get"),
    "a method with a path": changed(METHOD, b"GET /v1/smuggled"),
    "an empty method": changed(METHOD, b""),
    "an authority with a user": changed(AUTHORITY, b"a@b"),
    "an authority with a path": changed(AUTHORITY, b"a/b"),
    "an empty authority": changed(AUTHORITY, b""),
    "another host": more((b"host", b"y")),
    "two hosts": more((b"host", b"x"), (b"host", b"x")),
    "a status": more((b":status", b"200")),
    "an unknown pseudo-header": [*request(b"GET", b"/v1"), (b":x", b"y")],
    "two paths": [*request(b"GET", b"/v1"), (PATH, b"/v1")],
    "a pseudo-header behind others": [
        (METHOD, b"GET"), (PATH, b"/v1"), (SCHEME, b"http"), (b"a", b"b"), (AUTHORITY, b"x"),
    ],
    "connection": more((b"connection", b"close")),
    "keep-alive": more((b"keep-alive", b"timeout=5")),
    "proxy-connection": more((b"proxy-connection", b"close")),
    "transfer-encoding": more((b"transfer-encoding", b"chunked")),
    "upgrade": more((b"upgrade", b"h2c")),
    "te": more((b"te", b"gzip")),
    "upper case": more((b"X-Mine", b"a")),
    "an empty name": more((b"", b"a")),
    "a name with a colon": more((b"a:b", b"c")),
    "a name with a space": more((b"a b", b"c")),
    "a name with a line end": more((b"a\r\nb", b"c")),
    "a name over 127": more((b"f\xc3\xb6", b"c")),
    "a value with a line end": more((b"a", b"b\r\nauthorization: forged")),
    "a value with a LF": more((b"a", b"b\nc")),
    "a value with a CR": more((b"a", b"b\rc")),
    "a value with a NUL": more((b"a", b"b\0c")),
    "a value with a control": more((b"a", b"b\x01c")),
    "a value with a DEL": more((b"a", b"b\x7fc")),
    "a value with a blank first": more((b"a", b" b")),
    "a value with a blank last": more((b"a", b"b\t")),
    "two keys": more((b"authorization", b"a"), (b"authorization", b"b")),
    "two lengths": more((b"content-length", b"0"), (b"content-length", b"0")),
    "a length of a body that is not there": more((b"content-length", b"5")),
    "a length with plus": more((b"content-length", b"+0")),
    "a length with underscore": more((b"content-length", b"0_0")),
    "a length in letters": more((b"content-length", b"none")),
    "a length over 64 bits": more((b"content-length", b"18446744073709551616")),
    "a body that is too large": more((b"content-length", b"10001")),
    "too many fields": more(*((b"a%d" % n, b"b") for n in range(25))),
    "a large field": more((b"a", b"b" * 5000)),
    "a field that is much too large": more((b"a", b"b" * 16_000)),
    "a deadline that is none": more((b"x-request-timeout-ms", b"soon")),
    "another expectation": more((b"expect", b"200-ok")),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
async def test_a_head_that_is_refused(proxy: Forwarding, upstream: Upstream, name: str) -> None:
    before = len(upstream.heard)
    client = await peer(proxy)
    client.open(HEADS[name], end=True)
    reply = client.replies[1]
    while not reply.ended and reply.reset is None and await client.read():
        pass
    if client.closed:
        assert client.goodbyes
        assert client.goodbyes[0][1] != ErrorCodes.NO_ERROR
    else:
        assert 400 <= reply.status < 500
        # The next request of the same connection is as good as any.
        assert (await client.ask(request(b"HEAD", b"/v1/models"))).status == 200
        before += 1
    assert len(upstream.heard) == before


async def test_every_refusal_is_counted(proxy: Forwarding) -> None:
    client = await peer(proxy)
    await client.ask(more((b"x-request-timeout-ms", b"soon")))
    assert sum(proxy.recorder.refused.values()) == 1


def lengths(proxy: Forwarding, said: bytes, sent: bytes) -> Callable[[Peer], None]:
    def send(client: Peer) -> None:
        client.raw_head(1, request(b"POST", CHAT.encode(), JSON, (b"content-length", said)))
        client.raw(DataFrame(1, sent, flags=["END_STREAM"]))

    return send


@pytest.mark.parametrize(("said", "sent"), [(b"5", BODY), (b"500", BODY), (b"0", BODY)])
async def test_a_length_that_lies(
    proxy: Forwarding, upstream: Upstream, said: bytes, sent: bytes
) -> None:
    before = len(upstream.heard)
    client = await peer(proxy, greet=False)
    client.raw_greet()
    lengths(proxy, said, sent)(client)
    assert GOAWAY in await client.reader.read()
    assert len(upstream.heard) == before


GOAWAY = b"\x07\x00\x00\x00\x00\x00"
"""Of its frame's head: the type, no flags, and no stream."""


def on_stream(*frames: Frame) -> Callable[[Peer], None]:
    return lambda client: client.raw(*frames)


RAW: dict[str, Callable[[Peer], None]] = {
    "data before a head": on_stream(DataFrame(1, b"a")),
    "data on the connection": lambda c: c.writer.write(b"\0\0\1\0\0\0\0\0\0a"),
    "a head on the connection": lambda c: c.writer.write(b"\0\0\1\1\4\0\0\0\0\x82"),
    "an even stream": lambda c: c.raw_head(2, request(b"GET", b"/v1"), "END_STREAM"),
    "a frame that is too large": lambda c: c.writer.write(b"\1\0\0\0\0\0\0\0\1"),
    "a setting that is none": on_stream(SettingsFrame(0, {5: 100})),
    "settings on a stream": lambda c: c.writer.write(b"\0\0\0\4\0\0\0\0\1"),
    "settings of five bytes": lambda c: c.writer.write(b"\0\0\5\4\0\0\0\0\0aaaaa"),
    "a ping of three bytes": lambda c: c.writer.write(b"\0\0\3\6\0\0\0\0\0aaa"),
    "a window of nothing": lambda c: c.writer.write(b"\0\0\4\x08\0\0\0\0\0\0\0\0\0"),
    "a window over 31 bits": on_stream(
        WindowUpdateFrame(0, 2**31 - 1), WindowUpdateFrame(0, 2**31 - 1)
    ),
    "a promise": lambda c: c.writer.write(b"\0\0\5\5\4\0\0\0\1\0\0\0\2\x82"),
    "a continuation of nothing": on_stream(ContinuationFrame(1, b"", flags=["END_HEADERS"])),
    "a ping inside a head": lambda c: c.raw(
        HeadersFrame(1, c.block(request(b"GET", b"/v1"))), PingFrame(0, b"12345678")
    ),
    "a head that is no HPACK": on_stream(
        HeadersFrame(1, b"\xff\xff\xff\xff\xff\xff", flags=["END_HEADERS"])
    ),
    "padding that is longer": lambda c: c.writer.write(b"\0\0\2\1\x0d\0\0\0\1\x09\x82"),
}


@pytest.mark.parametrize("name", RAW)
async def test_frames_that_break_the_rules(
    proxy: Forwarding, upstream: Upstream, name: str
) -> None:
    before = len(upstream.heard)
    client = await peer(proxy, greet=False)
    client.raw_greet()
    RAW[name](client)
    async with asyncio.timeout(5):
        assert GOAWAY in await client.reader.read()
    assert len(upstream.heard) == before
    assert sum(proxy.recorder.refused.values()) == 1


async def test_a_preface_that_goes_wrong(proxy: Forwarding) -> None:
    client = await peer(proxy, greet=False)
    client.writer.write(PREFACE[:-4] + b"XX\r\n" + SettingsFrame(0).serialize())
    async with asyncio.timeout(5):
        await client.reader.read()
    await until(lambda: not proxy.proxy.clients)


# ---- floods -------------------------------------------------------------------------------------

FLOODS: dict[str, bytes] = {
    "pings": PingFrame(0, b"12345678").serialize(),
    "settings": SettingsFrame(0, {3: 100}).serialize(),
    "empty settings": SettingsFrame(0).serialize(),
    "priorities": PriorityFrame(1, depends_on=0, stream_weight=1).serialize(),
    "windows": WindowUpdateFrame(0, 1).serialize(),
    "unknown frames": b"\0\0\0\xfa\0\0\0\0\0",
    "empty data": DataFrame(1, b"").serialize(),
    "small data": DataFrame(1, b"a").serialize(),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood(proxy: Forwarding, name: str) -> None:
    client = await peer(proxy, greet=False)
    client.raw_greet()
    client.raw_head(1, request(b"POST", CHAT.encode(), JSON))
    client.writer.write(FLOODS[name] * (2 * MAX_ALLOWANCE))
    await until(lambda: not proxy.proxy.clients)
    assert proxy.recorder.refused == {"http2_flood": 1}
    assert proxy.proxy.held_bytes == 0


async def test_heads_without_end(proxy: Forwarding) -> None:
    client = await peer(proxy, greet=False)
    client.raw_greet()
    client.raw(HeadersFrame(1, b"\x82"))
    client.raw(*(ContinuationFrame(1, b"\0\1a" + b"\x7f" + b"b" * 127) for _ in range(300)))
    await until(lambda: not proxy.proxy.clients)
    assert proxy.recorder.refused == {"headers_too_large": 1}


async def test_a_head_that_grows_when_it_is_unpacked(proxy: Forwarding) -> None:
    client = await peer(proxy, greet=False)
    client.raw_greet()
    name = b"a" * 2000
    block = client.block([*request(b"GET", b"/v1"), (name, b"b" * 1000)])
    client.raw(HeadersFrame(1, block + b"\xbe" * 5000, flags=["END_HEADERS", "END_STREAM"]))
    await until(lambda: not proxy.proxy.clients)
    assert sum(proxy.recorder.refused.values()) == 1


@pytest.mark.parametrize("at_once", [True, False])
async def test_requests_that_are_taken_back_at_once(upstream: Upstream, at_once: bool) -> None:
    async def never(heard: Heard, reader: Reader, writer: Writer) -> None:
        await upstream.gone(reader)

    upstream.handler = never
    async with forwarding([upstream.target]) as proxy:
        before = len(upstream.heard)
        client = await peer(proxy)
        for _ in range(3):
            opened = [client.open(request(b"POST", CHAT.encode(), JSON)) for _ in range(100)]
            if not at_once:
                for number in opened:
                    client.send_data(number, BODY, end=True)
                await until(lambda: len(proxy.proxy.live) == 100)
            for number in opened:
                client.cancel(number)
            await until(lambda: not proxy.proxy.live)
        await until(lambda: not proxy.proxy.clients)
        assert proxy.recorder.refused == {"http2_rapid_reset": 1}
        if at_once:
            assert len(upstream.heard) == before
        await until(lambda: not proxy.proxy.live)


async def test_a_client_that_cancels_now_and_then_is_welcome() -> None:
    patience = Patience(0.0)
    for second in range(100):
        for _ in range(int(Patience.PER_S)):
            patience.spend(float(second))
    for _ in range(int(Patience.MOST)):
        patience.spend(100.0)
    with pytest.raises(Flood):
        patience.spend(100.0)


async def test_work_refills_what_frames_may_cost() -> None:
    frames = Frames(10_000)
    frames.read(PREFACE)
    work = b"\0\4\0\0\0\0\0\0\1" + b"x" * 1024
    for _ in range(20 * MAX_ALLOWANCE):
        frames.read(work + FLOODS["windows"])


# ---- slow clients -------------------------------------------------------------------------------


async def test_a_connection_that_says_nothing(upstream: Upstream) -> None:
    async with forwarding([upstream.target], limits=Limits(head_s=0.2)) as proxy:
        client = await peer(proxy, greet=False)
        client.writer.write(PREFACE)
        async with asyncio.timeout(5):
            await client.reader.read()
        assert proxy.recorder.refused == {"request_timeout": 1}


async def test_a_slow_head(upstream: Upstream) -> None:
    async with forwarding([upstream.target], limits=Limits(head_s=0.2)) as proxy:
        client = await peer(proxy, greet=False)
        client.raw_greet()
        client.raw(HeadersFrame(1, client.block(request(b"GET", b"/v1"))))
        async with asyncio.timeout(5):
            assert GOAWAY in await client.reader.read()
        assert proxy.recorder.refused == {"request_timeout": 1}


async def test_a_slow_body(upstream: Upstream) -> None:
    upstream.handler = upstream.echo
    limits = Limits(body_grace_s=0.2, min_body_bytes_per_s=1000)
    async with forwarding([upstream.target], limits=limits) as proxy:
        client = await peer(proxy)
        number = client.open(request(b"POST", CHAT.encode(), JSON))
        for _ in range(15):
            client.send_data(number, b" ")
            await asyncio.sleep(0.02)
        found = await client.reply(number)
        assert found.status == 408
        assert proxy.proxy.held_bytes == 0
        assert (await client.ask(request(b"GET", b"/v1/models"))).status == 200


async def test_connections(upstream: Upstream) -> None:
    upstream.handler = upstream.echo
    async with forwarding([upstream.target], limits=Limits(max_connections=1)) as proxy:
        first = await peer(proxy)
        assert (await first.ask(request(b"GET", b"/v1/models"))).status == 200
        second = await peer(proxy)
        async with asyncio.timeout(5):
            assert b"503" in await second.reader.readline()


async def test_a_stream_that_was_reset_gets_no_more(proxy: Forwarding) -> None:
    """Frames of a stream that is over are answered, or not, but bring nothing to life."""
    client = await peer(proxy, greet=False)
    client.raw_greet()
    client.raw_head(1, request(b"POST", CHAT.encode(), JSON))
    client.raw(RstStreamFrame(1, 8), DataFrame(1, BODY, flags=["END_STREAM"]))
    client.raw_head(3, request(b"GET", b"/v1/models"), "END_STREAM")
    await until(lambda: bool(proxy.recorder.outcomes))
    assert [outcome.request.method for outcome in proxy.recorder.outcomes] == [b"GET"]
