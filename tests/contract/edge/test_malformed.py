"""What may reach an upstream: nothing that two parsers could read differently.

Raw bytes on a socket. Each case must be refused with its status, the connection closed, and no
upstream may have seen anything of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from nearfield.edge.proxy.limits import Limits

from tests.support.edge import Forwarding, Upstream, forwarding, get, post
from tests.support.hosting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HOST + b"Transfer-Encoding: chunked\r\n\r\n"
SMUGGLED = b"GET /v1/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

LIMITS = Limits(
    max_head_bytes=4096,
    max_headers=20,
    max_target_bytes=512,
    max_body_bytes=10_000,
    linger_s=0.2,
)


def line(text: bytes) -> bytes:
    return text + b"\r\nHost: x\r\n\r\n"


def field(text: bytes) -> bytes:
    return HOST + text + b"\r\n\r\n"


def sized(text: bytes) -> bytes:
    return HOST + text + b"\r\n\r\nabc" + SMUGGLED


def chunks(text: bytes) -> bytes:
    return CHUNKED + text


# name: (what is sent, the status)
CORPUS: dict[str, tuple[bytes, int]] = {
    # the request line
    "no HTTP": (b"hello\r\n\r\n", 400),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "an HTTP/2 preface with a field": (b"PRI * HTTP/2.0\r\nHost: x\r\n\r\nSM\r\n\r\n", 505),
    "an HTTP/2 preface of another kind": (line(b"PRI / HTTP/2.0"), 505),
    "HTTP/0.9 without version": (b"GET /\r\n\r\n", 400),
    "HTTP/0.9": (line(b"GET / HTTP/0.9"), 505),
    "HTTP/1.2": (line(b"GET / HTTP/1.2"), 505),
    "HTTP/2.0": (line(b"GET / HTTP/2.0"), 505),
    "HTTP/1.10": (line(b"GET / HTTP/1.10"), 400),
    "http in lower case": (line(b"GET / http/1.1"), 400),
    "another protocol": (line(b"GET / RTSP/1.0"), 400),
    "a method in lower case": (line(b"get / HTTP/1.1"), 400),
    "a method of symbols": (line(b"G@T / HTTP/1.1"), 400),
    "an unknown method": (line(b"FOO / HTTP/1.1"), 405),
    "TRACE": (line(b"TRACE / HTTP/1.1"), 405),
    "CONNECT": (line(b"CONNECT y:80 HTTP/1.1"), 400),
    "CONNECT of a path": (line(b"CONNECT /v1/models HTTP/1.1"), 405),
    "PURGE": (line(b"PURGE / HTTP/1.1"), 405),
    "a vertical tab for a space": (line(b"GET\x0b/ HTTP/1.1"), 400),
    "a form feed at the end": (line(b"GET / HTTP/1.1\x0c"), 400),
    "a no-break space": (line(b"GET\xa0/ HTTP/1.1"), 400),
    "another request in the target": (line(b"GET /a HTTP/1.1\nHost: y HTTP/1.1"), 400),
    "two spaces": (line(b"GET  / HTTP/1.1"), 400),
    "a tab": (line(b"GET\t/ HTTP/1.1"), 400),
    "a space in the target": (line(b"GET /a b HTTP/1.1"), 400),
    "a space at the end": (line(b"GET /a HTTP/1.1 "), 400),
    "a space at the start": (line(b" GET /a HTTP/1.1"), 400),
    "many empty lines first": (b"\r\n\r\n\r\n" + get(), 400),
    "a bare LF after the line": (b"GET / HTTP/1.1\nHost: x\r\n\r\n", 400),
    "a bare CR after the line": (b"GET / HTTP/1.1\rHost: x\r\r", 400),
    "only bare LF": (b"GET / HTTP/1.1\nHost: x\n\n", 400),
    "no target": (line(b"GET HTTP/1.1"), 400),
    # the target
    "absolute form": (line(b"GET http://y/v1/models HTTP/1.1"), 400),
    "absolute form of a file": (line(b"GET file:///etc/passwd HTTP/1.1"), 400),
    "authority form": (line(b"GET y:80 HTTP/1.1"), 400),
    "asterisk form": (line(b"OPTIONS * HTTP/1.1"), 400),
    "a fragment": (line(b"GET /v1/models#x HTTP/1.1"), 400),
    "a NUL in the target": (line(b"GET /v1\0/models HTTP/1.1"), 400),
    "a byte over 127": (line(b"GET /v1/\xc3\xa9 HTTP/1.1"), 400),
    "a backslash": (line(b"GET /v1\\..\\admin HTTP/1.1"), 400),
    "dot dot": (line(b"GET /chat/../admin HTTP/1.1"), 400),
    "dot dot at the end": (line(b"GET /chat/.. HTTP/1.1"), 400),
    "a dot": (line(b"GET /./v1/models HTTP/1.1"), 400),
    "encoded dots": (line(b"GET /chat/%2e%2E/admin HTTP/1.1"), 400),
    "dots, the slash encoded": (line(b"GET /v2/models/..%2f..%2fadmin HTTP/1.1"), 400),
    "an encoded letter in a model": (line(b"GET /v2/models/ch%61t/ready HTTP/1.1"), 400),
    "a model encoded twice": (line(b"GET /v2/models/%252e%252e/ready HTTP/1.1"), 400),
    "an overlong slash in a model": (line(b"GET /v2/models/a%c0%afb/ready HTTP/1.1"), 400),
    "a full-width slash in a model": (line(b"GET /v2/models/a%ef%bc%8fb HTTP/1.1"), 400),
    "a model of dots": (line(b"GET /v2/models/../infer HTTP/1.1"), 400),
    "a long model": (line(b"GET /v2/models/" + b"a" * 129 + b" HTTP/1.1"), 400),
    "an escape that is cut off": (line(b"GET /v1/a% HTTP/1.1"), 400),
    "an encoded slash": (line(b"GET /v2/models/a%2fb HTTP/1.1"), 400),
    "an encoded backslash": (line(b"GET /v2/models/a%5Cb HTTP/1.1"), 400),
    "an encoded NUL": (line(b"GET /v2/models/a%00 HTTP/1.1"), 400),
    "an encoded line end": (line(b"GET /v1/a%0d%0aHost:%20y HTTP/1.1"), 400),
    "a broken escape": (line(b"GET /v1/a%zz HTTP/1.1"), 400),
    "a model that is none": (line(b"GET /v2/models/a;b/infer HTTP/1.1"), 400),
    "a long target": (line(b"GET /" + b"a" * 600 + b" HTTP/1.1"), 414),
    # fields
    "no host": (b"GET / HTTP/1.1\r\nAccept: a\r\n\r\n", 400),
    "no fields at all": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (field(b"Host: y"), 400),
    "two equal hosts": (field(b"Host: x"), 400),
    "an empty host": (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
    "a host with a path": (b"GET / HTTP/1.1\r\nHost: localhost:4000/#@x\r\n\r\n", 400),
    "a host with a user": (b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
    "a host with spaces around a colon": (b"GET / HTTP/1.1\r\nHost: a : 80\r\n\r\n", 400),
    "a host with two ports": (b"GET / HTTP/1.1\r\nHost: a:80:80\r\n\r\n", 400),
    "a host with a long port": (b"GET / HTTP/1.1\r\nHost: a:123456\r\n\r\n", 400),
    "a host that is a URL": (b"GET / HTTP/1.1\r\nHost: http://a/\r\n\r\n", 400),
    "a host with a query": (b"GET / HTTP/1.1\r\nHost: a?b\r\n\r\n", 400),
    "a host with a zone": (b"GET / HTTP/1.1\r\nHost: [fe80::1%25eth0]\r\n\r\n", 400),
    "a host over 127": (b"GET / HTTP/1.1\r\nHost: \xd0\xb0\r\n\r\n", 400),
    "a folded host": (b"GET / HTTP/1.1\r\nHost: x\r\n y\r\n\r\n", 400),
    "a list of hosts": (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    "a space before the colon": (field(b"Accept : a"), 400),
    "a field without colon": (field(b"Accept"), 400),
    "a field without name": (field(b": a"), 400),
    "a name with a bracket": (field(b"A(b: c"), 400),
    "a name over 127": (field(b"f\xc3\xb6o: c"), 400),
    "a name with a NUL": (field(b"A\0b: c"), 400),
    "folding with a space": (field(b"A: b\r\n c"), 400),
    "folding with a tab": (field(b"A: b\r\n\tc"), 400),
    "folding of an empty value": (field(b"A:\r\n b"), 400),
    "folding of the first field": (b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "a bare LF between fields": (b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", 400),
    "a bare CR in a value": (field(b"A: b\rc"), 400),
    "two CR": (field(b"A: b\r"), 400),
    "a NUL in a value": (field(b"A: b\0c"), 400),
    "a control in a value": (field(b"A: b\x01c"), 400),
    "a DEL in a value": (field(b"A: b\x7fc"), 400),
    "two keys": (field(b"Authorization: a\r\nAuthorization: b"), 400),
    "two content types": (field(b"Content-Type: a/b\r\nContent-Type: c/d"), 400),
    "too many fields": (field(b"\r\n".join(b"a%d: b" % n for n in range(25))), 431),
    "a large field": (field(b"A: " + b"b" * 5000), 431),
    "connection lists the key": (field(b"Connection: close, authorization"), 400),
    "connection lists the length": (field(b"Connection: content-length"), 400),
    "connection lists ours": (field(b"Connection: x-nearfield-passport"), 400),
    "a deadline that is none": (field(b"x-request-timeout-ms: soon"), 400),
    "a deadline of nothing": (field(b"x-request-timeout-ms: 0"), 400),
    "another expectation": (field(b"Expect: 200-ok\r\nContent-Length: 3"), 417),
    # length against chunks
    "length and chunks": (sized(b"Content-Length: 3\r\nTransfer-Encoding: chunked"), 400),
    "chunks and length": (sized(b"Transfer-Encoding: chunked\r\nContent-Length: 3"), 400),
    "two lengths": (sized(b"Content-Length: 3\r\nContent-Length: 5"), 400),
    "two equal lengths": (sized(b"Content-Length: 3\r\nContent-Length: 3"), 400),
    "a list of lengths": (sized(b"Content-Length: 3, 3"), 400),
    "a length with plus": (sized(b"Content-Length: +3"), 400),
    "a negative length": (sized(b"Content-Length: -3"), 400),
    "a hexadecimal length": (sized(b"Content-Length: 0x3"), 400),
    "a length with underscore": (sized(b"Content-Length: 1_0"), 400),
    "an empty length": (sized(b"Content-Length:"), 400),
    "a length in other digits": (sized(b"Content-Length: \xd9\xa3"), 400),
    "a length with a fraction": (sized(b"Content-Length: 3.0"), 400),
    "a length in letters": (sized(b"Content-Length: three"), 400),
    "lengths, one behind a space": (sized(b"Content-Length : 0\r\nContent-Length: 3"), 400),
    "a length with a space in it": (sized(b"Content-Length: 3 5"), 400),
    "a folded length": (sized(b"Content-Length:\r\n 3"), 400),
    "a length over 64 bits": (sized(b"Content-Length: 18446744073709551617"), 400),
    "a body that is too large": (sized(b"Content-Length: 10001"), 413),
    "an unknown coding": (sized(b"Transfer-Encoding: xchunked"), 400),
    "identity": (sized(b"Transfer-Encoding: identity"), 400),
    "chunked, identity": (sized(b"Transfer-Encoding: chunked, identity"), 400),
    "gzip, chunked": (sized(b"Transfer-Encoding: gzip, chunked"), 400),
    "a space before the coding's colon": (sized(b"Transfer-Encoding : chunked"), 400),
    "a tab before the coding's colon": (sized(b"Transfer-Encoding\t: chunked"), 400),
    "a folded coding": (sized(b"Transfer-Encoding:\r\n chunked"), 400),
    "a coding after a bare LF": (sized(b"A: b\nTransfer-Encoding: chunked"), 400),
    "a coding after a bare CR": (sized(b"A: b\rTransfer-Encoding: chunked"), 400),
    "a NUL in a coding's name": (sized(b"Transfer-Encoding\0: chunked"), 400),
    "a NUL in a coding": (sized(b"Transfer-Encoding: chunked\0"), 400),
    "chunked and a comma": (sized(b"Transfer-Encoding: chunked,"), 400),
    "chunked, chunked": (sized(b"Transfer-Encoding: chunked, chunked"), 400),
    "a coding and an upper-case length": (
        sized(b"TRANSFER-ENCODING: chunked\r\nCONTENT-LENGTH: 3"), 400,
    ),
    "an empty coding": (sized(b"Transfer-Encoding:"), 400),
    "a comma first": (sized(b"Transfer-Encoding: ,chunked"), 400),
    "a quoted coding": (sized(b'Transfer-Encoding: "chunked"'), 400),
    "a coding with parameters": (sized(b"Transfer-Encoding: chunked;q=1"), 400),
    "a vertical tab": (sized(b"Transfer-Encoding:\x0bchunked"), 400),
    "two codings": (sized(b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked"), 400),
    "chunked twice": (sized(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"), 400),
    "chunks in HTTP/1.0": (
        b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400,
    ),
    "chunks and an upgrade": (
        sized(b"Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked"), 400,
    ),
    # chunks
    "a chunk of no size": (chunks(b"\r\nabc\r\n0\r\n\r\n"), 400),
    "a size that is none": (chunks(b"g\r\nabc\r\n0\r\n\r\n"), 400),
    "a size with 0x": (chunks(b"0x3\r\nabc\r\n0\r\n\r\n"), 400),
    "a negative size": (chunks(b"-3\r\nabc\r\n0\r\n\r\n"), 400),
    "a space after the size": (chunks(b"3 \r\nabc\r\n0\r\n\r\n"), 400),
    "a space before the size": (chunks(b" 3\r\nabc\r\n0\r\n\r\n"), 400),
    "a size over 64 bits": (chunks(b"10000000000000003\r\nabc\r\n0\r\n\r\n"), 400),
    "a bare LF after the size": (chunks(b"3\nabc\r\n0\r\n\r\n"), 400),
    "a bare LF in an extension": (chunks(b"3;a\nabc\r\n0\r\n\r\n"), 400),
    "a bare CR in an extension": (chunks(b"3;a\rb\r\nabc\r\n0\r\n\r\n"), 400),
    "a NUL in an extension": (chunks(b"3;\0\r\nabc\r\n0\r\n\r\n"), 400),
    "a long extension": (chunks(b"3;" + b"a" * 70_000 + b"\r\nabc\r\n0\r\n\r\n"), 400),
    "ever so small chunks": (chunks(b"1\r\na\r\n" * 16_000), 413),
    "smaller chunks than may be": (chunks(b"1;abcdefgh\r\na\r\n" * 9_000), 400),
    "a size with plus": (chunks(b"+3\r\nabc\r\n0\r\n\r\n"), 400),
    "a size with underscore": (chunks(b"0_3\r\nabc\r\n0\r\n\r\n"), 400),
    "a size and a NUL": (chunks(b"3\0\r\nabc\r\n0\r\n\r\n"), 400),
    "a size and a bare CR": (chunks(b"3\rabc\r\n0\r\n\r\n"), 400),
    "an extension over two lines": (chunks(b'3;a="\nb"\r\nabc\r\n0\r\n\r\n'), 400),
    "a last chunk with a bare LF": (chunks(b"3\r\nabc\r\n0\n\n"), 400),
    "a chunk that is longer": (chunks(b"3\r\nabcd\r\n0\r\n\r\n"), 400),
    "a chunk without end": (chunks(b"3\r\nabc0\r\n\r\n"), 400),
    "a bare LF after a chunk": (chunks(b"3\r\nabc\n0\r\n\r\n"), 400),
    "a bare LF at the end": (chunks(b"3\r\nabc\r\n0\r\n\n"), 400),
    "chunks that are too much": (chunks(b"3000\r\n" + b"a" * 0x3000 + b"\r\n"), 413),
    "a length as trailer": (chunks(b"0\r\nContent-Length: 7\r\n\r\n"), 400),
    "a coding as trailer": (chunks(b"0\r\nTransfer-Encoding: chunked\r\n\r\n"), 400),
    "a folded trailer": (chunks(b"0\r\nA: b\r\n c\r\n\r\n"), 400),
    "a trailer with a NUL": (chunks(b"0\r\nA: \0\r\n\r\n"), 400),
    "a trailer with a bare LF": (chunks(b"0\r\nA: b\n\r\n"), 400),
    "a request for a trailer": (chunks(b"0\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n"), 400),
    "a trailer without colon": (chunks(b"0\r\nA\r\n\r\n"), 400),
}  # fmt: skip


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def upstream() -> AsyncIterator[Upstream]:
    running = Upstream()
    await running.start()
    yield running
    await running.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def proxy(upstream: Upstream) -> AsyncIterator[Forwarding]:
    async with forwarding([upstream.target], limits=LIMITS) as running:
        yield running


@pytest.mark.parametrize("name", CORPUS)
async def test_refused_and_closed(proxy: Forwarding, upstream: Upstream, name: str) -> None:
    raw, status = CORPUS[name]
    before = len(upstream.heard)
    client = await proxy.client()
    client.send(raw)
    found = await client.answer("GET")
    assert found.status == status, found
    assert found.headers["connection"] == "close"
    assert found.error["message"]
    client.writer.write_eof()
    assert await client.rest() == b""
    assert len(upstream.heard) == before


@pytest.mark.parametrize("name", [n for n, (_, status) in CORPUS.items() if status != 413])
async def test_refused_however_it_arrives(proxy: Forwarding, upstream: Upstream, name: str) -> None:
    """In two packets, cut anywhere in its first line, first field and end."""
    raw, status = CORPUS[name]
    before = len(upstream.heard)
    for cut in {1, 7, len(raw) // 2, max(1, len(raw) - 3)}:
        client = await proxy.client()
        client.send(raw[:cut])
        await client.writer.drain()
        await asyncio.sleep(0.002)
        client.send(raw[cut:])
        found = await client.answer("GET")
        # What is refused at once may be refused for another reason than the whole would be.
        assert found.status in (status, 400), found
        client.close()
    assert len(upstream.heard) == before


async def test_every_refusal_is_counted_once(proxy: Forwarding) -> None:
    before = sum(proxy.recorder.refused.values())
    await proxy.ask(CORPUS["folding with a tab"][0])
    assert sum(proxy.recorder.refused.values()) == before + 1


async def test_a_refusal_reaches_a_client_that_is_still_sending(proxy: Forwarding) -> None:
    client = await proxy.client()
    client.send(HOST + b"Content-Length: 9000000\r\n\r\n" + b"a" * 5_000_000)
    assert (await client.answer()).status == 413


async def test_what_follows_a_refused_request_is_not_read(
    proxy: Forwarding, upstream: Upstream
) -> None:
    client = await proxy.client()
    before = len(upstream.heard)
    client.send(sized(b"Transfer-Encoding: xchunked"))
    assert (await client.answer()).status == 400
    client.send(post())
    client.writer.write_eof()
    assert await client.rest() == b""
    assert len(upstream.heard) == before


async def test_open_inference_gets_its_own_dialect(proxy: Forwarding) -> None:
    found = await proxy.ask(
        b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 10001\r\n\r\n"
    )
    assert (found.status, list(found.json())) == (413, ["error"])
    assert isinstance(found.json()["error"], str)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"model": "a",}', "invalid_json"),
        (b'{"model": "a"} x', "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'{"a": ' + b"[" * 4000 + b"]" * 4000 + b"}", "invalid_json"),
        (b'{"model": 5}', None),
        (b'{"model": ["a"]}', None),
    ],
)
async def test_a_body_that_names_no_model(
    proxy: Forwarding, upstream: Upstream, body: bytes, code: str | None
) -> None:
    before = len(upstream.heard)
    found = await proxy.ask(post(body))
    assert (found.status, found.error["code"]) == (400, code)
    assert len(upstream.heard) == before
    assert proxy.outcome.error == (code or "invalid_request_error")


class TestSlow:
    """Clients that take their time are cut off; others do not notice."""

    async def test_head(self, upstream: Upstream) -> None:
        limits = Limits(head_s=0.2)
        async with forwarding([upstream.target], limits=limits) as running:
            client = await running.client()
            for byte in b"POST /v1/chat":
                client.send(bytes([byte]))
                await asyncio.sleep(0.01)
            found = await client.answer()
            assert (found.status, found.headers["connection"]) == (408, "close")
            assert running.recorder.refused == {"request_timeout": 1}

    async def test_a_connection_that_says_nothing(self, upstream: Upstream) -> None:
        async with forwarding([upstream.target], limits=Limits(head_s=0.1)) as running:
            client = await running.client()
            assert await client.rest() == b""

    @pytest.mark.parametrize(
        "framing", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n"]
    )
    async def test_body(self, upstream: Upstream, framing: bytes) -> None:
        limits = Limits(body_grace_s=0.2, min_body_bytes_per_s=1000)
        async with forwarding([upstream.target], limits=limits) as running:
            client = await running.client()
            client.send(HOST + framing)
            for _ in range(15):
                client.send(b"a")
                await asyncio.sleep(0.02)
            assert (await client.answer()).status == 408
            await until(lambda: not running.proxy.held_bytes)
            assert running.proxy.held_bytes == 0

    async def test_a_slow_body_within_the_rate_is_taken(self, upstream: Upstream) -> None:
        limits = Limits(body_grace_s=0.15, min_body_bytes_per_s=100)
        async with forwarding([upstream.target], limits=limits) as running:
            client = await running.client()
            client.send(HOST + b"Content-Type: text/plain\r\nContent-Length: 60\r\n\r\n")
            for _ in range(30):
                client.send(b"ab")
                await asyncio.sleep(0.01)
            assert (await client.answer()).status == 200

    async def test_between_requests(self, upstream: Upstream) -> None:
        async with forwarding([upstream.target], limits=Limits(idle_s=0.1)) as running:
            client = await running.client()
            client.send(post())
            assert (await client.answer()).status == 200
            assert await client.rest() == b""


class TestBounds:
    async def test_connections(self, upstream: Upstream) -> None:
        limits = Limits(max_connections=2, linger_s=0.1)
        async with forwarding([upstream.target], limits=limits) as running:
            for _ in range(2):
                client = await running.client()
                client.send(post())
                assert (await client.answer()).status == 200
            third = await running.client()
            found = await third.answer()
            assert (found.status, found.headers["retry-after"]) == (503, "1")
            running.clients[0].close()
            await until(lambda: len(running.proxy.clients) < 2)
            assert (await running.ask(post())).status == 200

    async def test_memory_of_all_bodies(self, upstream: Upstream) -> None:
        limits = Limits(max_body_bytes=1000, max_held_bytes=1500, linger_s=0.1)
        async with forwarding([upstream.target], limits=limits) as running:
            first, second = await running.client(), await running.client()
            for client in (first, second):
                client.send(HOST + b"Content-Length: 1000\r\n\r\n" + b" " * 800)
            await until(lambda: running.proxy.held_bytes == 800)
            assert (await second.answer()).status == 503
            first.send(b" " * 180 + b'{"model": "chat"}   ')
            assert (await first.answer()).status == 200
            assert running.proxy.held_bytes == 0
