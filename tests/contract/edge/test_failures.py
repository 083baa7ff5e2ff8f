"""Upstreams that fail, clients that leave, deadlines that pass: every request ends once."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.plain import Careful, OpenGate, Spread
from nearfield.edge.proxy.ports import Attempt, Grant, Leg, Request, Target

from tests.support.edge import (
    CHAT,
    STREAM,
    Forwarding,
    Handler,
    Heard,
    Upstream,
    answer,
    chunk,
    closed_port,
    forwarding,
    get,
    post,
)
from tests.support.hosting import until

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
Act = Callable[[Heard, Reader, Writer], Awaitable[None]]


class InTurn(Spread):
    """Targets in the order given, the next one for each try."""

    def pick(self, request: Request, grant: Grant, attempts: Sequence[Attempt]) -> Leg:
        return self._legs[min(len(attempts), len(self._legs) - 1)]


@asynccontextmanager
async def upstreams(*handlers: Handler | None) -> AsyncIterator[list[Upstream]]:
    running = [Upstream(handler) for handler in handlers]
    for each in running:
        await each.start()
    try:
        yield running
    finally:
        for each in running:
            await each.close()


@asynccontextmanager
async def in_turn(
    *handlers: Handler | None, retries: Careful | None = None, limits: Limits | None = None
) -> AsyncIterator[tuple[Forwarding, list[Upstream]]]:
    async with upstreams(*handlers) as running:
        targets = [each.target for each in running]
        router = InTurn(targets)
        async with forwarding(targets, router=router, retries=retries, limits=limits) as proxy:
            yield proxy, running
        assert set(router.running.values()) == {0}


def sends(raw: bytes, *, reset: bool = False) -> Handler:
    """Sends this and ends the connection."""

    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(raw)
        await writer.drain()
        await asyncio.sleep(0.005)
        if reset:
            plain: socket.socket = writer.get_extra_info("socket")
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        raise ConnectionError

    return handler


async def hangs(heard: Heard, reader: Reader, writer: Writer) -> None:
    """Never answers, until the proxy gives up."""
    while await reader.read(1000):
        pass
    raise ConnectionError


# ---- before the first byte --------------------------------------------------------------------


async def test_nobody_listens() -> None:
    async with forwarding([Target("127.0.0.1", closed_port())]) as proxy:
        found = await proxy.ask(post())
        assert (found.status, found.headers["retry-after"]) == (503, "1")
        assert [a.failure for a in proxy.outcome.attempts] == ["refused"] * 3


async def test_nobody_listens_at_the_first() -> None:
    async with upstreams(None) as (good,):
        targets = [Target("127.0.0.1", closed_port()), good.target]
        async with forwarding(targets, router=InTurn(targets)) as proxy:
            found = await proxy.ask(post({"model": "chat"}))
            assert found.status == 200
            assert [a.failure for a in proxy.outcome.attempts] == ["refused", None]


async def test_a_connection_that_is_not_made_in_time() -> None:
    # Its accept queue is full: further connections are neither made nor refused.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", port))
        await asyncio.sleep(0.02)
        async with upstreams(None) as (good,):
            targets = [Target("127.0.0.1", port, connect_s=0.1), good.target]
            async with forwarding(targets, router=InTurn(targets)) as proxy:
                assert (await proxy.ask(post())).status == 200
                assert [a.failure for a in proxy.outcome.attempts] == ["connect_timeout", None]
        for each in waiting:
            each.close()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("replayable", [False, True])
async def test_an_upstream_that_ends_the_connection(reset: bool, replayable: bool) -> None:
    async with in_turn(sends(b"", reset=reset), None) as (proxy, (_, good)):
        path = CHAT if replayable else "/v1/files"
        body: object = {"model": "chat"} if replayable else {"purpose": "x"}
        found = await proxy.ask(post(body, path))
        assert found.status == (200 if replayable else 502)
        assert len(good.heard) == int(replayable)
        assert proxy.outcome.attempts[0].failure == "closed"
        if not replayable:
            assert (found.error["code"], found.error["type"]) == ("upstream_failed", "server_error")


async def test_what_may_be_sent_again_is_told_when() -> None:
    async with in_turn(sends(b""), retries=Careful(max_attempts=1)) as (proxy, _):
        found = await proxy.ask(post())
        assert (found.status, found.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\nx: y\n\n",
        b"HTTP/1.1 200 OK\r\nx: a\r\n b\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * 70_000,
    ],
)
async def test_an_answer_that_is_not_http(raw: bytes) -> None:
    async with in_turn(sends(raw), None) as (proxy, _):
        assert (await proxy.ask(post())).status == 200
        assert [a.failure for a in proxy.outcome.attempts] == ["protocol", None]
        assert (await proxy.ask(post({}, "/v1/files"))).status == 502


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_not_here_not_now(status: int) -> None:
    async def refuses(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(answer(b'{"error": "no"}', status, retry_after="7"))

    async with in_turn(refuses, None) as (proxy, (bad, _)):
        for _ in range(3):
            assert (await proxy.ask(post())).status == 200
        assert [a.failure for a in proxy.outcome.attempts] == ["status", None]
        assert [a.status for a in proxy.outcome.attempts] == [status, 200]
        assert bad.connections == 1  # a refusal does not cost the connection


async def test_what_an_engine_died_of_goes_nowhere_else() -> None:
    async def crashed(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(answer(b"{}", 500, x_nearfield_error_code="engine_crashed"))

    async with in_turn(crashed, None) as (proxy, (_, other)):
        found = await proxy.ask(post())
        assert (found.status, found.body) == (500, b"{}")
        assert other.heard == []


async def test_a_fault_is_passed_on_where_the_request_may_have_had_effects() -> None:
    async def fails(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(answer(b"{}", 500))

    async with in_turn(fails, None) as (proxy, (_, other)):
        assert (await proxy.ask(post({}, "/v1/files"))).status == 500
        assert other.heard == []


async def test_everybody_says_no_and_the_last_word_is_passed_on() -> None:
    async def refuses(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(answer(b'{"error": "no"}', 503, retry_after="7"))

    async with in_turn(refuses, refuses, refuses) as (proxy, _):
        found = await proxy.ask(post())
        assert (found.status, found.headers["retry-after"]) == (503, "7")
        assert found.body == b'{"error": "no"}'
        assert [a.failure for a in proxy.outcome.attempts] == ["status"] * 3


async def test_a_word_that_tells_nothing_is_not_passed_on() -> None:
    """A proxy before the models has no server; its page is for its operator."""

    async def page(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(answer(b"<html>no server is available</html>", 503))

    async with in_turn(page, page, page) as (proxy, _):
        found = await proxy.ask(post())
        assert (found.status, found.headers["retry-after"]) == (503, "1")
        assert found.error["type"] == "service_unavailable"
        assert b"html" not in found.body


async def test_a_long_refusal_costs_the_connection_and_not_the_time() -> None:
    async def refuses(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 503 X\r\ncontent-length: 100000000\r\n\r\n" + b"x" * 1_000_000)
        await hangs(heard, reader, writer)

    async with in_turn(refuses, None) as (proxy, (bad, _)):
        assert (await proxy.ask(post())).status == 200
        await until(lambda: bad.open == 0)


async def test_a_kept_connection_that_died_is_replaced() -> None:
    async def once(heard: Heard, reader: Reader, writer: Writer) -> None:
        if len(restarted.heard) % 2:
            await restarted.echo(heard, reader, writer)
        else:
            await sends(b"", reset=True)(heard, reader, writer)

    async with upstreams(once) as (restarted,), forwarding([restarted.target]) as proxy:
        assert (await proxy.ask(post())).status == 200
        found = await proxy.ask(post())
        assert found.status == 200
        assert [(a.reused, a.failure) for a in proxy.outcome.attempts] == [
            (True, "closed"),
            (False, None),
        ]


async def test_an_upstream_that_closed_while_idle_is_not_asked_there() -> None:
    async def closes(heard: Heard, reader: Reader, writer: Writer) -> None:
        await once.echo(heard, reader, writer)
        await writer.drain()
        writer.close()
        raise ConnectionError

    async with upstreams(closes) as (once,), forwarding([once.target]) as proxy:
        for _ in range(3):
            found = await proxy.ask(post({}, "/v1/files"))
            assert found.status == 200
            await until(lambda: proxy.proxy.pools.open == 0)
        assert len(proxy.outcome.attempts) == 1


async def test_more_than_an_answer_costs_the_connection() -> None:
    """The next request on it could get what was not meant for it."""

    async def generous(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(answer(b"mine") + answer(b"not mine"))

    async with in_turn(generous) as (proxy, (upstream,)):
        for number in range(1, 4):
            assert (await proxy.ask(post())).body == b"mine"
            assert upstream.connections == number


async def test_bytes_that_nobody_asked_for_cost_the_connection() -> None:
    async def late(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(answer(b"mine"))
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(answer(b"not mine"))

    async with in_turn(late) as (proxy, _):
        assert (await proxy.ask(post())).body == b"mine"
        await until(lambda: proxy.proxy.pools.open == 0)
        assert (await proxy.ask(post())).body == b"mine"


async def test_no_more_connections_than_allowed() -> None:
    limits = Limits(max_upstream_connections=2)
    async with in_turn(hangs, limits=limits) as (proxy, (upstream,)):
        clients = [await proxy.client() for _ in range(2)]
        for client in clients:
            client.send(post())
        await until(lambda: upstream.open == 2)
        assert (await proxy.ask(post())).status == 503
        assert proxy.proxy.pools.open == 2


# ---- after the first byte ---------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("tail", [b"", b"data: {"])
async def test_a_broken_stream_ends_with_an_error_event(reset: bool, tail: bytes) -> None:
    events = chunk(b'data: {"a": 1}\n\n') + (chunk(tail) if tail else b"")
    async with in_turn(sends(STREAM + events, reset=reset), None) as (proxy, (_, other)):
        found = await proxy.ask(post())
        assert (found.status, found.complete) == (200, True)
        first, last, empty = found.body.split(b"\n\n")
        assert (first, empty) == (b'data: {"a": 1}', b"")
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == "upstream_failed"
        assert other.heard == []  # never twice once a byte was sent
        assert proxy.outcome.error == "upstream_failed"
        assert [a.failure for a in proxy.outcome.attempts] == ["truncated"]


async def test_a_broken_stream_of_open_inference() -> None:
    async with in_turn(sends(STREAM + chunk(b"data: 1\n\n"))) as (proxy, _):
        found = await proxy.ask(post({}, "/v2/models/m/generate_stream"))
        last = found.body.split(b"\n\n")[-2]
        assert isinstance(json.loads(last.removeprefix(b"data: "))["error"], str)


async def test_a_stream_that_breaks_inside_a_huge_event_is_cut() -> None:
    part = chunk(b"data: " + b"x" * 300_000)
    async with in_turn(sends(STREAM + part)) as (proxy, _):
        found = await proxy.ask(post())
        assert not found.complete
        assert b"error" not in found.body


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\ng\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n"
        b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ],
)
async def test_a_broken_answer_is_never_taken_for_a_whole_one(raw: bytes) -> None:
    async with in_turn(sends(raw), None) as (proxy, (_, other)):
        found = await proxy.ask(post())
        assert (found.status, found.complete, found.body[:3]) == (200, False, b"abc")
        assert other.heard == []
        await until(lambda: bool(proxy.recorder.outcomes))
        assert proxy.outcome.attempts[0].failure == "truncated"


async def test_a_broken_answer_to_http_1_0_is_reset() -> None:
    """The end of the connection is the end of the body there: it must not look like one."""
    raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"
    async with in_turn(sends(raw)) as (proxy, _):
        client = await proxy.client()
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await client.rest()


async def test_an_answer_until_the_end_that_is_reset() -> None:
    raw = b"HTTP/1.1 200 OK\r\n\r\nabc"
    async with in_turn(sends(raw, reset=True), sends(raw)) as (proxy, _):
        assert not (await proxy.ask(get(), "GET")).complete


# ---- clients that leave -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset", "half"])
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_leaves_cancels_its_request(how: str, streaming: bool) -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        if streaming:
            writer.write(STREAM + chunk(b"data: 1\n\n"))
        await hangs(heard, reader, writer)

    async with in_turn(handler) as (proxy, (upstream,)):
        client = await proxy.client()
        client.send(post())
        await until(lambda: len(upstream.heard) == 1)
        if streaming:
            await client.until(b"data: 1\n\n")
        if how == "half":
            client.writer.write_eof()
        elif how == "close":
            client.close()
        else:
            client.reset()
        await until(lambda: upstream.open == 0, 1.0)
        await until(lambda: bool(proxy.recorder.outcomes))
        assert proxy.outcome.error == "cancelled"
        assert proxy.outcome.status == (200 if streaming else 499)
        assert proxy.outcome.attempts[0].failure == "cancelled"


async def test_a_client_that_leaves_while_connecting() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", port))
        async with forwarding([Target("127.0.0.1", port, connect_s=5)]) as proxy:
            client = await proxy.client()
            client.send(post())
            await until(lambda: len(proxy.proxy.live) == 1)
            client.reset()
            await until(lambda: not proxy.proxy.pools.open)
            assert proxy.outcome.error == "cancelled"
        for each in waiting:
            each.close()


async def test_a_client_that_leaves_in_the_middle_of_its_body() -> None:
    async with in_turn(None) as (proxy, (upstream,)):
        client = await proxy.client()
        client.send(post({"x": "a" * 100_000})[:50_000])
        await until(lambda: proxy.proxy.held_bytes > 0)
        client.reset()
        await until(lambda: proxy.proxy.held_bytes == 0)
        assert (upstream.heard, list(proxy.recorder.outcomes)) == ([], [])


async def test_pipelined_requests_of_a_client_that_leaves() -> None:
    async with in_turn(hangs) as (proxy, (upstream,)):
        client = await proxy.client()
        client.send(post() * 5)
        await until(lambda: len(upstream.heard) == 1)
        client.reset()
        await until(lambda: upstream.open == 0)
        assert len(proxy.recorder.outcomes) == 1


# ---- deadlines --------------------------------------------------------------------------------


async def test_a_deadline() -> None:
    async with in_turn(hangs) as (proxy, (upstream,)):
        client = await proxy.client()
        client.send(post(x_request_timeout_ms="100"))
        found = await client.answer()
        assert (found.status, found.error["code"]) == (504, "deadline_exceeded")
        assert 0.09 < proxy.outcome.ended_s - proxy.outcome.request.started_s < 0.4
        assert [a.failure for a in proxy.outcome.attempts] == ["deadline"]
        await until(lambda: upstream.open == 0)
        upstream.handler = upstream.echo
        client.send(post())  # the client's connection is as good as before
        assert (await client.answer()).status == 200


async def test_a_deadline_in_a_stream() -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(STREAM + chunk(b"data: 1\n\n"))
        await hangs(heard, reader, writer)

    async with in_turn(handler) as (proxy, (upstream,)):
        found = await proxy.ask(post(x_request_timeout_ms="100"))
        assert b"deadline_exceeded" in found.body
        assert found.complete
        await until(lambda: upstream.open == 0)


async def test_a_deadline_of_the_gate() -> None:
    class Hurried(OpenGate):
        def admit(self, request: Request) -> Grant:
            request.deadline_s = min(request.deadline_s, request.started_s + 0.1)
            return Grant()

    async with (
        upstreams(hangs) as (upstream,),
        forwarding([upstream.target], gate=Hurried()) as proxy,
    ):
        assert (await proxy.ask(post())).status == 504
        assert int(upstream.heard[0].headers["x-request-timeout-ms"]) <= 100


async def test_the_default_deadline() -> None:
    async with in_turn(hangs, limits=Limits(timeout_s=1.5)) as (proxy, _):
        assert (await proxy.ask(post())).status == 504
        assert 1.4 < proxy.outcome.ended_s - proxy.outcome.request.started_s < 1.9


# ---- giving up a target, hedging --------------------------------------------------------------


async def test_a_target_that_is_given_up_before_it_answered() -> None:
    async with in_turn(hangs, None) as (proxy, (frozen, good)):
        client = await proxy.client()
        client.send(post())
        await until(lambda: len(frozen.heard) == 1)
        proxy.proxy.abandon(frozen.target)
        found = await client.answer()
        assert (found.status, len(good.heard)) == (200, 1)
        assert [a.failure for a in proxy.outcome.attempts] == ["abandoned", None]
        await until(lambda: frozen.open == 0)


async def test_a_target_that_is_given_up_in_the_turn_in_which_it_was_chosen() -> None:
    """Before a line of the connecting was run: its connection must not be counted for ever."""
    async with in_turn(hangs, None) as (proxy, (dead, good)):
        began = proxy.proxy.router.began

        def give_up(attempt: Attempt) -> None:
            began(attempt)
            if attempt.leg.target is dead.target:
                proxy.proxy.loop.call_soon(proxy.proxy.abandon, dead.target)

        proxy.proxy.router.began = give_up  # type: ignore[method-assign]
        assert (await proxy.ask(post())).status == 200
        assert [a.failure for a in proxy.outcome.attempts] == ["abandoned", None]
        assert (dead.connections, good.connections) == (0, 1)


async def test_a_target_that_is_given_up_in_a_stream() -> None:
    async def handler(heard: Heard, reader: Reader, writer: Writer) -> None:
        writer.write(STREAM + chunk(b"data: 1\n\n"))
        await hangs(heard, reader, writer)

    async with in_turn(handler, None) as (proxy, (frozen, good)):
        client = await proxy.client()
        client.send(post())
        await client.until(b"data: 1\n\n")
        proxy.proxy.abandon(frozen.target)
        assert b'"code":"unavailable"' in await client.until(b"0\r\n\r\n")
        assert good.heard == []


async def test_a_hedge_that_wins() -> None:
    async with in_turn(hangs, None, retries=Careful(hedge_s=0.05)) as (proxy, (slow, quick)):
        found = await proxy.ask(post())
        assert (found.status, len(slow.heard), len(quick.heard)) == (200, 1, 1)
        assert [a.failure for a in proxy.outcome.attempts] == ["cancelled", None]
        await until(lambda: slow.open == 0)


async def test_a_hedge_that_loses() -> None:
    async def slow(heard: Heard, reader: Reader, writer: Writer) -> None:
        await asyncio.sleep(0.1)
        writer.write(answer(b"first"))

    async with in_turn(slow, hangs, retries=Careful(hedge_s=0.03)) as (proxy, (_, other)):
        found = await proxy.ask(post())
        assert (found.body, len(other.heard)) == (b"first", 1)
        assert [a.failure for a in proxy.outcome.attempts] == [None, "cancelled"]
        await until(lambda: other.open == 0)


async def test_no_hedge_for_what_is_quick() -> None:
    async with in_turn(None, None, retries=Careful(hedge_s=0.05)) as (proxy, (_, other)):
        assert (await proxy.ask(post())).status == 200
        await asyncio.sleep(0.08)
        assert other.heard == []


@pytest.mark.parametrize("first", ["closed", "status"])
async def test_a_try_that_fails_while_its_hedge_runs(first: str) -> None:
    async def fails(heard: Heard, reader: Reader, writer: Writer) -> None:
        await asyncio.sleep(0.08)
        await sends(answer(b"", 503) if first == "status" else b"")(heard, reader, writer)

    async def slower(heard: Heard, reader: Reader, writer: Writer) -> None:
        await asyncio.sleep(0.15)
        writer.write(answer(b"second"))

    async with in_turn(fails, slower, retries=Careful(hedge_s=0.03)) as (proxy, _):
        assert (await proxy.ask(post())).body == b"second"
        assert [a.failure for a in proxy.outcome.attempts] == [first, None]


async def test_the_books_balance_under_chaos() -> None:
    """Hundreds of requests, every way of failing, clients that leave: nothing is left counted."""
    kinds: list[Handler] = [
        sends(b""),
        sends(b"", reset=True),
        sends(STREAM + chunk(b"data: 1\n\n")),
        sends(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc"),
        hangs,
        sends(b"not http"),
    ]
    async with upstreams(*kinds, None, None) as running:
        targets = [each.target for each in running] + [Target("127.0.0.1", closed_port())]
        router = Spread(targets, seed=3)
        limits = Limits(timeout_s=0.3, head_s=0.3)
        async with forwarding(
            targets, router=router, retries=Careful(hedge_s=0.02), limits=limits
        ) as proxy:

            async def one(number: int) -> None:
                client = await proxy.client()
                client.send(post()[: 50 if number % 11 == 0 else None])
                if number % 7 == 0:
                    await asyncio.sleep(0.001 * (number % 20))
                    client.reset()
                else:
                    try:
                        await client.answer()
                    except ConnectionResetError:
                        assert number % 11 == 0
                client.close()

            await asyncio.gather(*(one(number) for number in range(300)))
            await until(lambda: not proxy.proxy.live)
        assert set(router.running.values()) == {0}
        for outcome in proxy.recorder.outcomes:
            assert outcome.status
            assert outcome.error or any(a.failure is None for a in outcome.attempts)
